"""Compare the traces of train mode and eval mode, and merge their graphs into one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
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


def merge_modes(train: Trace, evaluate: Trace) -> fx.Graph:
    """Merge two graphs that differ in constants only: these read the flag of the owning module.

    Before ``dropout(x, p=0.1, training=True)``; after ``flag = get_attr[block.training]``,
    ``value = choose(flag, True, False)``, ``dropout(x, p=0.1, training=value)``. A constant belongs
    to the innermost module around it whose ``training`` flag was read while tracing.

    Raises:
        RewriteError: the graphs differ in more than constants.
    """
    merged = copy.deepcopy(train.graph)
    asked = train.asked_training | evaluate.asked_training
    if len(merged.nodes) != len(evaluate.graph.nodes):
        raise RewriteError("train and eval mode differ in their number of operations")
    counterpart = dict(zip(merged.nodes, evaluate.graph.nodes, strict=True))
    flags: dict[str, fx.Node] = {}
    first = next(node for node in merged.nodes if node.op != "placeholder")
    for node, other in counterpart.items():

        def read(train_value: Any, eval_value: Any, node: fx.Node = node) -> fx.Node:
            owner = _owner(node, asked)
            if owner not in flags:
                with merged.inserting_before(first):
                    flags[owner] = merged.get_attr(f"{owner}.training" if owner else "training")
            with merged.inserting_before(node):
                return merged.call_function(choose, (flags[owner], train_value, eval_value))

        def merge(a: Any, b: Any, node: fx.Node = node, read: Any = read) -> Any:
            if isinstance(a, fx.Node):
                if counterpart[a] is not b:
                    raise RewriteError(f"train and eval mode differ at {node.format_node()}")
                return a
            if isinstance(a, (tuple, list)):
                items = [merge(x, y) for x, y in zip(a, b, strict=True)]
                return type(a)(*items) if hasattr(a, "_fields") else type(a)(items)
            if isinstance(a, Mapping):
                return {key: merge(value, b[key]) for key, value in a.items()}
            if isinstance(a, slice):
                return slice(merge(a.start, b.start), merge(a.stop, b.stop), merge(a.step, b.step))
            return a if _same(a, b) else read(a, b)

        if (node.op, node.target) != (other.op, other.target):
            raise RewriteError(f"train and eval mode differ at {node.format_node()}")
        node.args = merge(node.args, other.args)
        node.kwargs = merge(node.kwargs, other.kwargs)
    merged.lint()
    return merged


def _owner(node: fx.Node, asked: frozenset[str]) -> str:
    stack: list[str] = ["", *(path for path, _ in node.meta.get("nn_module_stack", {}).values())]
    asked_here = [path for path in stack if path in asked]
    return (asked_here or stack)[-1]


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b or (a != a and b != b))
