"""Objects of the user's own classes in what a model returns: key-value caches and alike."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

_FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType)
# Attributes of these types are the same at each call.
FIXED = (*_FUNCTIONS, type, ModuleType, enum.Enum, np.generic)
_NOT_PLAIN = (
    *(*FIXED, Tensor, nn.Module, fx.Node, fx.Proxy, torch.Generator, torch.dtype, torch.device),
    *(torch.layout, torch.memory_format, torch.finfo, torch.iinfo),
    *(dict, list, tuple, set, frozenset, str, bytes, int, float, complex),
)


def is_plain_object(value: object) -> bool:
    """Whether a value is all in its attributes, so that it can be made again from these."""
    if isinstance(value, _NOT_PLAIN) or not hasattr(value, "__dict__"):
        return False
    return not any(vars(base).get("__slots__") for base in type(value).__mro__)


class RemakeObject:
    """Makes an object of a class with the attributes that it had, without running its code.

    Args:
        kind: the class.
        names: of its attributes, in order.
        fixed: those that are the same each time.
    """

    def __init__(self, kind: type, names: Iterable[str], fixed: Mapping[str, Any]) -> None:
        self.kind = kind
        self.names = tuple(names)
        self.fixed = dict(fixed)
        self.__name__ = self.__qualname__ = f"remake_{kind.__name__}"

    def __call__(self, attributes: Mapping[str, Any]) -> Any:
        """Make an object.

        Args:
            attributes: name -> value, of those that are not fixed.
        """
        made: Any = object.__new__(self.kind)
        values = {**self.fixed, **attributes}
        vars(made).update({name: values[name] for name in self.names})
        return made

    def __eq__(self, other: object) -> bool:
        """Tell what makes the same: train and eval mode are compared by it."""
        if not isinstance(other, RemakeObject):
            return NotImplemented
        mine = self.kind, self.names, self.fixed
        return mine == (other.kind, other.names, other.fixed)

    def __hash__(self) -> int:
        """Hash what equality looks at first."""
        return hash(self.kind)
