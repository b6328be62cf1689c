"""What a value of a graph is made of, and whether an operation changes it."""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch import fx

from npas_fx.passes.functions import ApplyFunction
from npas_fx.passes.rebinding import rebound_by

_IN_PLACE = (
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
)
IN_PLACE_FUNCTIONS = frozenset(getattr(operator, name) for name in _IN_PLACE)
_CHANGES_FIRST = IN_PLACE_FUNCTIONS | {operator.setitem}
_RANDOM = (
    *("rand", "normal", "bernoulli", "dropout", "multinomial", "poisson", "empty", "uniform"),
    *("exponential", "geometric", "cauchy", "binomial", "rrelu", "gumbel"),
)


def is_mutated(node: fx.Node) -> bool:
    """Whether an operation changes a weight, or what may be a view of it, in place.

    A buffer that is bound to another tensor counts as changed.
    """
    if node.op == "get_attr" and node.target in rebound_by(node.graph):
        return True
    return any(True for _ in _changers(node))


def _changers(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the operations that change a value, or what may be a view of it, in place."""
    for user in node.users:
        if user.all_input_nodes[0] is not node or user.op == "output":
            continue
        name = user.target if isinstance(user.target, str) else user.target.__name__
        is_in_place = name.endswith("_") and not name.endswith("__")
        asks_for_data = user.target is getattr and user.args[1] in ("data", "grad")
        if user.target in _CHANGES_FIRST or is_in_place or asks_for_data:
            yield user
        elif user.op != "call_module" and len(user.all_input_nodes) == 1:  # it may be a view
            yield from _changers(user)


def _is_random(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else node.target.__name__
    return node.op != "placeholder" and any(word in name for word in _RANDOM)


def is_pure(node: fx.Node) -> bool:
    """Whether a value is made of parameters and buffers alone, which no call changes."""
    if node.op == "get_attr":
        return not is_mutated(node)
    return _repeats(node) and bool(node.all_input_nodes) and all(map(is_pure, node.all_input_nodes))


def is_of_sizes(node: fx.Node) -> bool:
    """Whether a value is made of sizes, constants, and tensors that no operation changes.

    In each call with the same sizes it is the same; also where it is built up in place.
    """
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        each = waiting.pop()
        if each in found or _asks_size(each):
            continue
        found.add(each)
        if each.op == "get_attr":
            if is_mutated(each):
                return False
        elif _repeats(each):
            waiting += (*each.all_input_nodes, *_changers(each))
        else:
            return False
    return True


def _asks_size(node: fx.Node) -> bool:
    """Whether an operation asks a tensor for what does not depend on its data."""
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device", "layout")
    return node.op == "call_method" and node.target in ("size", "dim", "numel", "get_device")


def can_be_fixed(node: fx.Node) -> bool:
    """Whether a node, as far as itself tells, gives the same wherever its arguments are the same.

    A call of a module may not; a parameter or buffer does unless the graph changes it.
    """
    return (node.op == "get_attr" or _repeats(node)) and not is_mutated(node)


def _repeats(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method") or isinstance(node.target, ApplyFunction):
        return False  # it may keep something, or draw random numbers
    return not _is_random(node)
