"""Functions with a backward of their own, as operations of a graph."""

from __future__ import annotations

from types import FunctionType
from typing import Any


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
    """Whether a class was made by code whose variables its methods read."""
    return any(
        value.__code__.co_freevars
        for base in kind.__mro__
        if base.__module__.split(".")[0] != "torch"
        for value in (getattr(each, "__func__", each) for each in vars(base).values())
        if isinstance(value, FunctionType)
    )
