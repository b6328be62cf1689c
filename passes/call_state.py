"""What a call of a module may leave behind and give back, as far as its code itself says."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn


def attributes_set_by_calls(module: nn.Module) -> frozenset[str]:
    """Names of the attributes that a call of ``module`` may assign, on whatever object."""
    own: object = vars(module).get("forward")
    kind: type = type(module)
    names = _stored(kind)
    return names | _stored_by(own.__code__) if isinstance(own, FunctionType) else names


def may_return_none(module: nn.Module) -> bool:
    """Whether the code of ``forward`` has a way out with None as the result."""
    forward: Any = vars(module).get("forward", type(module).forward)
    if not isinstance(forward, FunctionType):
        return True
    instructions = list(dis.get_instructions(forward))
    return any(
        one.argval is None
        and (one.opname == "RETURN_CONST" or other.opname == "RETURN_VALUE")
        and one.opname in ("LOAD_CONST", "RETURN_CONST")
        for one, other in zip(instructions, (*instructions[1:], instructions[-1]), strict=True)
    )


@cache
def _stored(kind: Any) -> frozenset[str]:
    """Names that ``forward``, and the methods that it calls, assign."""
    methods = {
        name: function.__code__
        for base in reversed(kind.__mro__)
        if base.__module__.split(".")[0] != "torch"
        for name, function in vars(base).items()
        if isinstance(function, FunctionType)
    }
    reached, waiting = set[str](), ["forward", "__call__"]
    while waiting:
        name = waiting.pop()
        if name in methods and name not in reached:
            reached.add(name)
            waiting += [called for code in _nested(methods[name]) for called in code.co_names]
    return frozenset(stored for name in reached for stored in _stored_by(methods[name]))


def _stored_by(code: CodeType) -> frozenset[str]:
    return frozenset(
        str(instruction.argval)
        for part in _nested(code)
        for instruction in dis.get_instructions(part)
        if instruction.opname == "STORE_ATTR"
    )


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)
