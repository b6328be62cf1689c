"""Functions with a backward of their own, as operations of a graph."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch

_FIXED = (FunctionType, type, bool, int, float, str, type(None), torch.dtype)


class ApplyFunction:
    """Calls a ``torch.autograd.Function``, so that its own backward runs.

    Args:
        kind: the class.
    """

    def __init__(self, kind: Any) -> None:
        self.kind = kind
        self.__name__ = self.__qualname__ = f"apply_{kind.__name__}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the function."""
        return self.kind.apply(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        """Tell what applies the same: train and eval mode are compared by it."""
        if not isinstance(other, ApplyFunction):
            return NotImplemented
        return self.kind is other.kind

    def __hash__(self) -> int:
        """Hash what equality looks at."""
        return hash(self.kind)


def reads_code_around(kind: type) -> bool:
    """Whether a class was made by code whose variables its methods read, but for constants."""
    return any(
        _reads_code_around(getattr(value, "__func__", value))
        for base in kind.__mro__
        if base.__module__.split(".")[0] != "torch"
        for value in vars(base).values()
    )


def _reads_code_around(function: Any) -> bool:
    """The same for a function; one that is a decorator's reads the function that it was given."""
    if not isinstance(function, FunctionType):
        return False
    values = [cell.cell_contents for cell in function.__closure__ or ()]
    return any(not isinstance(v, _FIXED) or _reads_code_around(v) for v in values)
