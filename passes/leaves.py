"""Which modules own nothing that could be shared, and so may stay calls."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn

MODULE_FIELDS = frozenset(vars(nn.Module()))


def owns_nothing_shareable(module: nn.Module) -> bool:
    """Whether no parameter in or below ``module`` has two or more dimensions.

    A module that refers to others behind torch's back (in a list, say) could read their weights.
    """
    if any(parameter.dim() > 1 for _, parameter in module.named_parameters()):
        return False
    return not any(_hides_tensors(value) for part in module.modules() for value in _plain(part))


def _plain(module: nn.Module) -> Iterator[Any]:
    for name, value in vars(module).items():
        if not (name.startswith("_") and name in MODULE_FIELDS):
            yield value


def _hides_tensors(value: Any) -> bool:
    if isinstance(value, (list, tuple, set)):
        return any(_hides_tensors(item) for item in value)
    if isinstance(value, dict):
        return any(_hides_tensors(item) for item in value.values())
    if isinstance(value, MethodType):
        return _hides_tensors(value.__self__)
    if isinstance(value, partial):
        return _hides_tensors((value.func, value.args, value.keywords))
    if isinstance(value, FunctionType):
        return any(map(_hides_tensors, inspect.getclosurevars(value).nonlocals.values()))
    return isinstance(value, (nn.Module, nn.Parameter))
