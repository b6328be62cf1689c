"""``…_within_…``: weights are the leading parts of larger ones, so that layers may grow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from npas_fx.errors import NPASError
from npas_fx.generators.birth import match_moments
from npas_fx.generators.generator import Generator, Moments, Shapes, Tensors
from npas_fx.ir import Mixture, Size


class Within:
    """``W_i = V_i[:o, :i, …]`` of weights ``V_i`` that another generator makes, all of one shape.

    Bank and sizes are those of the virtual weights ``V_i``. So a layer that grows within them
    changes no tensor of its bank, and what it had keeps its values. Elements of the bank that no
    weight reaches get no gradient.

    Args:
        base: makes the virtual weights; it has a ``gain``, ``(S,)``, that scales each of them.
        shape: of the virtual weights.

    Raises:
        NPASError: the shape is empty, or an axis is not a positive number.
    """

    def __init__(self, base: Generator, shape: Sequence[int]) -> None:
        if not shape or not all(isinstance(length, int) and length > 0 for length in shape):
            raise NPASError(f"shape={shape!r} is no shape of a weight; give its axes, as (64, 64)")
        self.base = base
        self.shape = tuple(shape)
        self.name = f"{base.name}_within_{'x'.join(map(str, self.shape))}"

    def propose(self, shapes: Shapes, *, above: bool) -> Iterator[Size]:
        """Yield the base's sizes for the virtual weights, if the weights fit."""
        if all(map(self._holds, shapes)):
            for size in self.base.propose(self._virtual(shapes), above=above):
                if not self.refuse(shapes, size):
                    yield size

    def refuse(self, shapes: Shapes, size: Size) -> str | None:
        """All weights fit, and the base makes the virtual ones, with a gain."""
        for shape in shapes:
            if not self._holds(shape):
                return f"a weight of shape {shape} does not fit within {self.shape}"
        virtual = self._virtual(shapes)
        if wrong := self.base.refuse(virtual, size):
            return wrong
        owned = {**self.base.parameters(virtual, size), **self.base.buffers(virtual, size)}
        return None if "gain" in owned else f"{self.base.name} has no gain"

    def enlarge(self, shapes: Shapes, size: Size, parameters: int) -> Size | None:
        """As the base does."""
        return self.base.enlarge(self._virtual(shapes), size, parameters)

    def describe(self, shapes: Shapes, size: Size) -> Mixture:
        """As the base does: of whole templates, a part as large as that of the weights is used."""
        return self.base.describe(self._virtual(shapes), size)

    def flops(self, shapes: Shapes, size: Size) -> int:
        """Those of the virtual weights, which are made in full."""
        return self.base.flops(self._virtual(shapes), size)

    def parameters(self, shapes: Shapes, size: Size) -> Mapping[str, tuple[int, ...]]:
        """Those of the base."""
        return self.base.parameters(self._virtual(shapes), size)

    def buffers(self, shapes: Shapes, size: Size) -> Mapping[str, tuple[int, ...]]:
        """Those of the base."""
        return self.base.buffers(self._virtual(shapes), size)

    def birth(
        self, shapes: Shapes, size: Size, moments: Sequence[Moments], random: torch.Generator
    ) -> dict[str, Tensor]:
        """Draw as the base does; only gains and offsets depend on the shapes of the weights.

        A part that is constant, as a corner of a small image that is stretched, gets the mean only.
        """
        tensors = self.base.birth(self._virtual(shapes), size, moments, random)
        weights = self.generate(tensors, shapes, size)
        drawn = map(Moments.of, weights)
        wanted = [
            w if d.std else Moments(mean=w.mean - d.mean, std=0.0)
            for w, d in zip(moments, drawn, strict=True)
        ]
        gain, tensors["offset"] = match_moments(weights, wanted)
        tensors["gain"] = tensors["gain"] * gain
        return tensors

    def generate(self, tensors: Tensors, shapes: Shapes, size: Size) -> tuple[Tensor, ...]:
        """Cut the virtual weights; copied, since for a view torch may pick other kernels."""
        virtual = self.base.generate(tensors, self._virtual(shapes), size)
        return tuple(
            weight[tuple(map(slice, shape))].contiguous()
            for weight, shape in zip(virtual, shapes, strict=True)
        )

    def _holds(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == len(self.shape) and all(
            length <= most for length, most in zip(shape, self.shape, strict=True)
        )

    def _virtual(self, shapes: Shapes) -> Shapes:
        return (self.shape,) * len(shapes)
