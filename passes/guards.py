"""Guards: what an example has answered is checked at each call."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from npas_fx.errors import GuardError

# Packages whose frames are not the user's code.
STEPPED_OVER = ("torch", "npas_fx", "contextlib", "unittest", "collections", "dataclasses")


def _is_true(value: Any) -> bool:
    # Not bool(value): comparing that with a constant fails in torch.compile (torch 2.13) where it
    # depends on a size that may vary.
    return True if value else False  # noqa: SIM210


def _keys(value: Any) -> Any:
    return tuple(value.keys()) if isinstance(value, Mapping) else type(value).__qualname__


def _has_key(value: Any, key: Any) -> Any:
    return key in value if isinstance(value, Mapping) else type(value).__qualname__


QUESTIONS: Mapping[str, Callable[..., Any]] = {
    "bool": _is_true,
    "int": int,
    "float": float,
    "len": len,
    "str": str,
    "is None": lambda value: value is None,
    "type": lambda value: "Tensor" if isinstance(value, Tensor) else type(value).__qualname__,
    "value": lambda value: value,
    "keys": _keys,
    "has key": _has_key,
    "has attribute": hasattr,
}

# What may be asked of the data of a tensor -> the same as a tensor.
OF_DATA: Mapping[str, Callable[[Tensor], Tensor]] = {
    "bool": lambda value: value.bool().all(),
    "int": lambda value: value.to(torch.int64).sum(),
    "float": lambda value: value.sum(),
}


def check_guard(
    value: Any, question: str, expected: Any, what: str, where: str, *about: Any
) -> None:
    """Refuse a call for which the code of the model would go another way than in the example.

    Args:
        value: that is asked about.
        question: one of ``QUESTIONS``.
        expected: the answer in the example.
        what: the question, for the user to read.
        where: line of the user's code.
        about: what the question names, such as a key.

    Raises:
        GuardError: what was asked, both answers and the line.
    """
    if isinstance(value, Tensor) and question in OF_DATA and torch.compiler.is_compiling():
        # Asked in Python, data would break the graph where the model's own code does not ask.
        torch._assert_async(OF_DATA[question](value) == expected, f"{what} = {expected} at {where}")
        return
    answer = QUESTIONS[question](value, *about)
    if answer != expected:
        raise GuardError(
            f"captured for {what} = {expected!r}, called with {answer!r} at {where}; pass an "
            'example that covers it in more_examples, or use on_guard="fallback"'
        )


_SYMBOLS = {
    **{operator.add: "+", operator.sub: "-", operator.mul: "*", operator.mod: "%"},
    **{operator.floordiv: "//", operator.truediv: "/", operator.pow: "**"},
    **{operator.eq: "==", operator.ne: "!=", operator.lt: "<", operator.le: "<="},
    **{operator.gt: ">", operator.ge: ">="},
}


def describe(value: Any) -> str:
    """Write a value as the code did, as far as its nodes tell."""
    if not isinstance(value, fx.Node):
        return repr(value)
    if value.op == "call_method":
        receiver, *args = map(describe, value.args)
        receiver = f"({receiver})" if " " in receiver else receiver
        return f"{receiver}.{value.target}({', '.join(args)})"
    args = [describe(arg) for arg in value.args[:2]] if value.op == "call_function" else []
    if value.target in _SYMBOLS and len(args) == 2:
        return f"{args[0]} {_SYMBOLS[value.target]} {args[1]}"
    if value.target is getattr:
        return f"{args[0]}.{value.args[1]}"
    if value.target is operator.getitem:
        return f"{args[0]}[{args[1]}]"
    return f"len({args[0]})" if value.target is len else value.name


def user_line() -> str:
    """File and line of the user's code that is running."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        module = frame.f_globals.get("__name__", "").split(".")[0]
        if module not in STEPPED_OVER:
            break
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
