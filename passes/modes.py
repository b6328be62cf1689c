"""Compare the traces of train mode and eval mode, and merge their graphs into one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from npas_fx.errors import RewriteError
from npas_fx.passes.tracer import Trace


def choose(is_training: bool, train_value: Any, eval_value: Any) -> Any:
    """Pick the constant of the current mode."""
    return train_value if is_training else eval_value


def differing_modules(train: Trace, evaluate: Trace) -> tuple[str, ...]:
    """Find the smallest modules whose own code differs in structure between the modes.

    Returns:
        Their paths, the root as ``""``; empty when the modes differ in constants at most.
    """
    differing = [
        path
        for path in train.steps.keys() & evaluate.steps.keys()
        if train.steps[path] != evaluate.steps[path]
    ]
    # A parent may differ just because of what its child returned: the child comes first.
    return tuple(
        sorted(
            path
            for path in differing
            if not any(is_inside(other, path) for other in differing if other != path)
        )
    )


def is_inside(path: str, parent: str) -> bool:
    """Whether a module path is ``parent`` or lies below it; everything lies below the root."""
    return not parent or path == parent or path.startswith(f"{parent}.")


def differs_in_constants(train: Trace, evaluate: Trace) -> bool:
    """Whether the graphs of two modes of equal structure differ in anything."""
    return str(train.graph) != str(evaluate.graph)


def mode_patterns(asked: frozenset[str]) -> list[dict[str, bool]]:
    """Patterns of training flags by which a constant shows whose flag it depends on.

    Each path has a number of its own; a pattern is one bit of all numbers, or its complement. A
    constant that depends on two flags at once follows the number of neither. In the first pattern
    no flag is set: a constant that then keeps its value depends on none.
    """
    paths = sorted(asked)
    if not paths:
        return []
    bits = range((len(paths) - 1).bit_length())
    return [dict.fromkeys(paths, False)] + [
        {path: bool(number >> bit & 1) is is_plain for number, path in enumerate(paths)}
        for bit in bits
        for is_plain in (True, False)
    ]


def merge_modes(
    train: Trace,
    evaluate: Trace,
    mixed: Sequence[tuple[Mapping[str, bool], fx.Graph]] = (),
) -> fx.Graph:
    """Merge two graphs that differ in constants only: these read the flag of the owning module.

    Before ``dropout(x, p=0.1, training=True)``; after ``flag = get_attr[block.training]``,
    ``value = choose(flag, True, False)``, ``dropout(x, p=0.1, training=value)``.

    Args:
        train: the trace of train mode.
        evaluate: the trace of eval mode.
        mixed: training flags by the ``mode_patterns`` of the modules whose flag was read -> the
            graph that was traced with them.

    Raises:
        RewriteError: the graphs differ in more than constants, or a constant depends on the flags
            of more than one module.
    """
    merged = copy.deepcopy(train.graph)
    asked = sorted(train.asked_training | evaluate.asked_training)
    graphs = (merged, evaluate.graph, *(graph for _, graph in mixed))
    if len({len(graph.nodes) for graph in graphs}) > 1:
        raise RewriteError("train and eval mode differ in their number of operations")
    counterparts = {nodes[0]: nodes for nodes in zip(*(g.nodes for g in graphs), strict=True)}
    flags: dict[str, fx.Node] = {}
    first = next(node for node in merged.nodes if node.op != "placeholder")

    def owner(node: fx.Node, values: Sequence[Any]) -> str:
        is_train = [_same(value, values[0]) for value in values[2:]]
        if all(is_train):  # no flag decides: what does is set by train() itself
            return _innermost(node)
        followed = [path for path in asked if is_train == [flag[path] for flag, _ in mixed]]
        if len(followed) != 1 or not all(
            is_train[k] or _same(value, values[1]) for k, value in enumerate(values[2:])
        ):
            raise RewriteError(
                f"a constant of {node.format_node()} depends on the training flags of more than "
                "one module"
            )
        return followed[0]

    for node, others in counterparts.items():

        def merge(values: Sequence[Any], node: fx.Node = node) -> Any:
            a = values[0]
            if isinstance(a, fx.Node):
                if counterparts[a] != tuple(values):
                    raise RewriteError(f"train and eval mode differ at {node.format_node()}")
                return a
            if isinstance(a, (tuple, list)):
                items = [merge(items) for items in zip(*values, strict=True)]
                return type(a)(*items) if hasattr(a, "_fields") else type(a)(items)
            if isinstance(a, Mapping):
                return {key: merge([value[key] for value in values]) for key in a}
            if isinstance(a, slice):
                parts = [(value.start, value.stop, value.step) for value in values]
                return slice(*map(merge, zip(*parts, strict=True)))
            if all(_same(a, value) for value in values[1:]):
                return a
            path = owner(node, values)
            if path not in flags:
                with merged.inserting_before(first):
                    flags[path] = merged.get_attr(f"{path}.training" if path else "training")
            with merged.inserting_before(node):
                return merged.call_function(choose, (flags[path], a, values[1]))

        if len({(other.op, other.target) for other in others}) > 1:
            raise RewriteError(f"train and eval mode differ at {node.format_node()}")
        node.args = merge([other.args for other in others])
        node.kwargs = merge([other.kwargs for other in others])
    merged.lint()
    return merged


def _innermost(node: fx.Node) -> str:
    stack: list[str] = ["", *(path for path, _ in node.meta.get("nn_module_stack", {}).values())]
    return stack[-1]


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b or (a != a and b != b))
