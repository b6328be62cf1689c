"""What a generator is: which tensors a bank owns, how they start, and what they generate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from npas_fx.ir import Mixture, Site, Size

Shapes: TypeAlias = Sequence[tuple[int, ...]]
Tensors: TypeAlias = Mapping[str, Tensor]
# How the names of tensors begin that weights are made of, other than those that combine them.
TEMPLATE_NAMES = ("templates", "partial")


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Mean and standard deviation of the weight that a generated one replaces.

    A constant weight has a standard deviation of exactly 0 and its value as mean.
    """

    mean: float
    std: float

    @classmethod
    def of(cls, weight: Tensor) -> Moments:
        """Measure a weight of any shape and floating dtype."""
        weight = weight.detach()
        low, high = torch.aminmax(weight)
        if low == high:
            return cls(mean=low.item(), std=0.0)
        std, mean = torch.std_mean(weight.double(), correction=0)
        return cls(mean=mean.item(), std=std.item())


class Generator(Protocol):
    """A rule from the tensors of a bank to the weights of its sites.

    A fused weight, such as that of a q/k/v projection, is several weights to a generator: its parts
    come one after the other in ``shapes``.
    """

    name: str

    def propose(self, shapes: Shapes, *, above: bool) -> Iterator[Size]:
        """Yield sizes that a bank for weights of these shapes may have; none if it cannot.

        Args:
            shapes: of the weights.
            above: whether banks larger than their weights are wanted too.
        """

    def refuse(self, shapes: Shapes, size: Size) -> str | None:
        """Say what is wrong with a bank of this size for these weights; None if nothing is.

        Args:
            shapes: of the weights.
            size: perhaps written by hand. No field is negative.
        """

    def enlarge(self, shapes: Shapes, size: Size, parameters: int) -> Size | None:
        """Find the next larger size that costs at most so many parameters more, if there is one."""

    def describe(self, shapes: Shapes, size: Size) -> Mixture:
        """Describe the bank to those who price it."""

    def flops(self, shapes: Shapes, size: Size) -> int:
        """Count the multiplications and additions that generating all weights once takes."""

    def parameters(self, shapes: Shapes, size: Size) -> Mapping[str, tuple[int, ...]]:
        """Name of each trainable tensor that the bank owns -> its shape.

        What weights are made of has a name that begins with ``templates`` or ``partial``;
        ``param_groups`` takes all else for coefficients, without weight decay.
        """

    def buffers(self, shapes: Shapes, size: Size) -> Mapping[str, tuple[int, ...]]:
        """Name of each constant tensor that the bank owns -> its shape."""

    def birth(
        self, shapes: Shapes, size: Size, moments: Sequence[Moments], random: torch.Generator
    ) -> dict[str, Tensor]:
        """Draw all tensors of a new bank in float32, so that the weights have these moments.

        Returns:
            The parameters and buffers by name, and ``offset``, ``(S,)``: what the bank adds to each
            generated weight.
        """

    def generate(self, tensors: Tensors, shapes: Shapes, size: Size) -> tuple[Tensor, ...]:
        """Generate all weights, but for their offsets, in the dtype of the tensors."""


def num_parameters(generator: Generator, shapes: Shapes, size: Size) -> int:
    """Count the trainable parameters of a bank, exactly."""
    return sum(math.prod(shape) for shape in generator.parameters(shapes, size).values())


def shapes_of(sites: Sequence[Site], generator: Generator) -> tuple[tuple[int, ...], ...]:
    """List the shapes that a generator sees: of the parts of fused weights, if it generates any."""
    if generator.name == "dedicated":
        return tuple(site.shape for site in sites)
    return tuple(shape for site in sites for shape in site.part_shapes)
