"""What a value of a graph is made of, and whether an operation changes it."""

from __future__ import annotations

import operator

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
    for user in node.users:
        if user.all_input_nodes[0] is not node or user.op == "output":
            continue
        name = user.target if isinstance(user.target, str) else user.target.__name__
        if user.target in _CHANGES_FIRST or (name.endswith("_") and not name.endswith("__")):
            return True
        if user.target is getattr and user.args[1] in ("data", "grad"):
            return True
        may_be_view = user.op != "call_module" and len(user.all_input_nodes) == 1
        if may_be_view and is_mutated(user):
            return True
    return False


def _is_random(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else node.target.__name__
    return node.op != "placeholder" and any(word in name for word in _RANDOM)


def is_pure(node: fx.Node) -> bool:
    """Whether a value is made of parameters and buffers alone, which no call changes."""
    if node.op == "get_attr":
        return not is_mutated(node)
    return _repeats(node) and bool(node.all_input_nodes) and all(map(is_pure, node.all_input_nodes))


def can_be_fixed(node: fx.Node) -> bool:
    """Whether a node, as far as itself tells, gives the same wherever its arguments are the same.

    A call of a module may not; a parameter or buffer does unless the graph changes it.
    """
    return (node.op == "get_attr" or _repeats(node)) and not is_mutated(node)


def _repeats(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method") or isinstance(node.target, ApplyFunction):
        return False  # it may keep something, or draw random numbers
    return not _is_random(node)
