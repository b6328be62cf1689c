"""One architecture of the zoo: how to make it, and how to draw inputs for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

Inputs: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """An architecture.

    Attributes:
        make: builds it with random weights.
        draw: size of a batch -> positional and keyword arguments.
    """

    make: Callable[[], nn.Module]
    draw: Callable[[int], Inputs]
