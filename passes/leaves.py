"""Which modules own nothing that could be shared, and so may stay calls."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

MODULE_FIELDS = frozenset(vars(nn.Module()))


def owns_nothing_shareable(module: nn.Module) -> bool:
    """Whether no parameter in or below ``module`` has two or more dimensions.

    A module that refers to others behind torch's back (in a list, say) could read their weights.
    """
    if any(parameter.dim() > 1 for _, parameter in module.named_parameters()):
        return False
    return not any(True for _ in _hidden(module))


def makes_own_weights(module: nn.Module) -> bool:
    """Whether it is a module whose weights are computed from others, or what computes them."""
    is_computed = is_parametrized(module) and not isinstance(module, nn.RNNBase)
    return is_computed or isinstance(module, ParametrizationList)


def hidden_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that the code of ``module`` may read behind torch's back.

    These are in lists and closures, themselves or in modules that are not below ``module``.
    """
    for value in _hidden(module):
        if isinstance(value, nn.Parameter):
            yield value
    for hidden in hidden_modules(module):
        yield from hidden.parameters(recurse=False)


def hidden_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that the code of ``module`` may find behind torch's back.

    They are in lists and closures, or below those, and not below ``module``.
    """
    own = set(module.modules())
    for value in _hidden(module):
        if isinstance(value, nn.Module) and value not in own:
            yield from value.modules()


def _hidden(module: nn.Module) -> Iterator[nn.Module | nn.Parameter]:
    for part in module.modules():
        for name, value in vars(part).items():
            is_of_torch = name in MODULE_FIELDS or (isinstance(part, nn.RNNBase) and "flat" in name)
            if not (name.startswith("_") and is_of_torch):
                yield from _find(value)


def _find(value: Any) -> Iterator[nn.Module | nn.Parameter]:
    """Modules and parameters in a value: in containers, bound methods and closures."""
    if isinstance(value, (nn.Module, nn.Parameter)):
        yield value
        return
    inside: Iterable[Any] = ()
    if isinstance(value, (list, tuple, set)):
        inside = value
    elif isinstance(value, dict):
        inside = value.values()
    elif isinstance(value, MethodType):
        inside = (value.__self__,)
    elif isinstance(value, partial):
        inside = (value.func, value.args, value.keywords)
    elif isinstance(value, FunctionType):
        inside = inspect.getclosurevars(value).nonlocals.values()
    for item in inside:
        yield from _find(item)
