"""Compare the traces of train mode and eval mode, and merge their graphs into one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

from torch import fx

from npas_fx.errors import UntraceableError
from npas_fx.passes.flag_patterns import mode_patterns, number_each, number_rivals
from npas_fx.passes.tracer import Trace

Mixed: TypeAlias = Sequence[tuple[Mapping[str, bool], fx.Graph]]


def choose(is_training: bool, train_value: Any, eval_value: Any) -> Any:
    """Pick the constant of the current mode."""
    return train_value if is_training else eval_value


def merge_modes(
    train: Trace, evaluate: Trace, trace_with: Callable[[Mapping[str, bool]], Trace]
) -> fx.Graph | None:
    """Merge two graphs that differ in constants only: these read the flag of the owning module.

    Before ``dropout(x, p=0.1, training=True)``; after ``flag = get_attr[block.training]``,
    ``value = choose(flag, True, False)``, ``dropout(x, p=0.1, training=value)``.

    Whose flag a constant follows is seen in further traces, with some flags set and others not. A
    few of them tell apart the modules that come into question: those whose flag was read by the
    calls around the constant. Only if none of these fits, all modules are told apart.

    Args:
        train: the trace of train mode.
        evaluate: the trace of eval mode.
        trace_with: training flags of the modules whose flag was read -> the trace with them.

    Returns:
        The graph; None where the modes differ in more than constants, or a constant depends on the
        flags of more than one module.
    """
    if train.failed.keys() != evaluate.failed.keys():
        return None
    operations, others = (
        [(node.op, node.target) for node in trace.graph.nodes] for trace in (train, evaluate)
    )
    if operations != others:
        return None
    if str(train.graph) == str(evaluate.graph):
        return copy.deepcopy(train.graph)
    with suppress(_DifferError, UntraceableError):
        return _merge_constants(train, evaluate, trace_with)
    return None


class _DifferError(Exception):
    """Graphs differ in more than constants, or in constants of which no one flag decides."""


def _merge_constants(
    train: Trace, evaluate: Trace, trace_with: Callable[[Mapping[str, bool]], Trace]
) -> fx.Graph:
    def trace_mixed(flags: Mapping[str, bool]) -> tuple[Mapping[str, bool], fx.Graph]:
        return flags, trace_with(flags).graph

    asked = train.asked_training | evaluate.asked_training
    nearby = [
        train.flags_before[a] | evaluate.flags_before[b]
        for a, b in zip(train.graph.nodes, evaluate.graph.nodes, strict=True)
    ]
    mixed = [trace_mixed(flags) for flags in mode_patterns(number_rivals(asked, set(nearby)))]
    with suppress(_DifferError):
        return _merge(train.graph, evaluate.graph, mixed, nearby)
    # With no flag set, what still keeps its value in train mode follows none.
    patterns = [dict.fromkeys(asked, False), *mode_patterns(number_each(asked))]
    mixed += [trace_mixed(flags) for flags in patterns]
    return _merge(train.graph, evaluate.graph, mixed, [asked] * len(nearby))


def _merge(
    train: fx.Graph, evaluate: fx.Graph, mixed: Mixed, candidates: Sequence[Collection[str]]
) -> fx.Graph:
    """Merge, with the modules that each node's constants may follow the flag of."""
    merged = copy.deepcopy(train)
    graphs = (merged, evaluate, *(graph for _, graph in mixed))
    if len({len(graph.nodes) for graph in graphs}) > 1:
        raise _DifferError
    rows = list(zip(*(graph.nodes for graph in graphs), strict=True))
    counterparts = {row[0]: row for row in rows}
    first = next(node for node in merged.nodes if node.op != "placeholder")
    flag_of: dict[str, fx.Node] = {}

    def read_flag(path: str) -> fx.Node:
        if path not in flag_of:
            with merged.inserting_before(first):
                flag_of[path] = merged.get_attr(f"{path}.training" if path else "training")
        return flag_of[path]

    for row, paths in zip(rows, candidates, strict=True):
        node = row[0]

        def merge(
            values: Sequence[Any], node: fx.Node = node, paths: Collection[str] = paths
        ) -> Any:
            a = values[0]
            if any(isinstance(value, fx.Node) for value in values):
                if counterparts.get(a) != tuple(values):
                    raise _DifferError
                return a
            if all(_same(a, value) for value in values[1:]):
                return a
            flag = read_flag(_find_owner(node, values, mixed, paths))
            with merged.inserting_before(node):
                return merged.call_function(choose, (flag, a, values[1]))

        if len({(other.op, other.target) for other in row}) > 1:
            raise _DifferError
        node.args = _map_rows(merge, [other.args for other in row])
        node.kwargs = _map_rows(merge, [other.kwargs for other in row])
    merged.lint()
    return merged


def _find_owner(
    node: fx.Node, values: Sequence[Any], mixed: Mixed, candidates: Collection[str]
) -> str:
    """Find the module whose flag a constant follows.

    Args:
        node: what has the constant.
        values: of the constant in train mode, in eval mode, and in the mixed modes.
        mixed: flags and graph of these.
        candidates: paths of the modules that come into question.
    """
    is_train = [_same(value, values[0]) for value in values[2:]]
    if all(is_train) and not all(any(flags.values()) for flags, _ in mixed):
        # No flag decides: what does is set by train() itself, on the module most likely.
        stack = node.meta.get("nn_module_stack", {}).values()
        return next((path for path, _ in reversed(stack)), "")
    followed = [path for path in candidates if is_train == [flags[path] for flags, _ in mixed]]
    is_two_valued = all(_same(value, values[0]) or _same(value, values[1]) for value in values[2:])
    if len(followed) != 1 or not is_two_valued:
        raise _DifferError
    return followed[0]


def _map_rows(function: Callable[[Sequence[Any]], Any], values: Sequence[Any]) -> Any:
    """Apply a function to what stands in the same place of several arguments."""
    a = values[0]
    if len(set(map(_form, values))) > 1:
        raise _DifferError
    if isinstance(a, (tuple, list)):
        items = [_map_rows(function, items) for items in zip(*values, strict=True)]
        return type(a)(*items) if hasattr(a, "_fields") else type(a)(items)
    if isinstance(a, Mapping):
        return {key: _map_rows(function, [value[key] for value in values]) for key in a}
    if isinstance(a, slice):
        parts = [(value.start, value.stop, value.step) for value in values]
        return slice(*_map_rows(function, parts))
    return function(values)


def _form(value: Any) -> tuple[Any, ...]:
    """Type of a container, and how many values it has under which keys; nothing for a value."""
    if isinstance(value, (tuple, list)):
        return type(value), len(value)
    if isinstance(value, Mapping):
        return type(value), *value
    return (slice,) if isinstance(value, slice) else ()


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b or (a != a and b != b))
