"""Copies of modules with functions that hold on to them: hooks and lambdas made in ``__init__``."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar

from torch import nn

_T = TypeVar("_T")


def deepcopy_with_closures(value: _T, model: nn.Module, memo: dict[int, Any]) -> _T:
    """``copy.deepcopy``, but a function that has closed over a module of the tree follows its copy.

    Python copies no function, so that the hook of a copy would go on writing into the original.

    Args:
        value: to copy; what the module is made of, or the module itself.
        model: whose functions to look for.
        memo: as for ``copy.deepcopy``.
    """
    followers = [(function, _without_cells(function)) for function in _find_followers(model)]
    memo.update({id(function): new for function, new in followers})
    copied = copy.deepcopy(value, memo)
    for function, new in followers:
        for old, cell in zip(function.__closure__ or (), new.__closure__ or (), strict=True):
            for held in _held_in([old]):
                cell.cell_contents = _followed(held, memo)
        new.__defaults__ = _followed_all(function.__defaults__, memo)
    return copied


def _without_cells(function: FunctionType) -> FunctionType:
    cells = tuple(CellType() for _ in function.__closure__ or ())
    made = FunctionType(
        function.__code__, function.__globals__, function.__name__, None, cells or None
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__qualname__ = function.__qualname__
    vars(made).update(vars(function))
    return made


def _followed(held: Any, memo: Mapping[int, Any]) -> Any:
    if isinstance(held, MethodType) and id(held.__self__) in memo:
        return MethodType(held.__func__, memo[id(held.__self__)])
    return memo.get(id(held), held)


def _followed_all(held: tuple[Any, ...] | None, memo: Mapping[int, Any]) -> tuple[Any, ...] | None:
    return None if held is None else tuple(_followed(each, memo) for each in held)


def _find_followers(model: nn.Module) -> list[FunctionType]:
    """Functions in the attributes and hooks of a tree that hold a part of it."""
    modules = list(model.modules())
    values = [value for module in modules for value in vars(module).values()]
    parts = {id(value) for value in values if isinstance(value, (dict, list, set))}
    parts |= set(map(id, modules))
    found: dict[int, FunctionType] = {}

    def follows(function: FunctionType) -> bool:
        if id(function) in found:
            return True
        held = [*_held_in(function.__closure__ or ()), *(function.__defaults__ or ())]
        inner = [each for each in held if isinstance(each, FunctionType) and each is not function]
        followed = [follows(each) for each in inner]
        is_follower = any(
            id(each) in parts or (isinstance(each, MethodType) and id(each.__self__) in parts)
            for each in held
        )
        if is_follower or any(followed):
            found[id(function)] = function
        return id(function) in found

    for function in _functions_in(values):
        follows(function)
    return list(found.values())


def _functions_in(values: Iterable[Any]) -> Iterator[FunctionType]:
    for value in values:
        inside = value.values() if isinstance(value, dict) else value
        for each in inside if isinstance(value, (dict, list, tuple)) else (value,):
            if isinstance(each, FunctionType):
                yield each


def _held_in(cells: Iterable[CellType]) -> Iterator[Any]:
    for cell in cells:
        try:
            yield cell.cell_contents
        except ValueError:  # a variable that is not set yet
            continue
