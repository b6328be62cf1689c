"""``tied``: all sites read one template, each with a mean and scale of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from npas_fx.generators import mixing
from npas_fx.generators.generator import Moments, Shapes, Tensors
from npas_fx.ir import Mixture, Size


class Tied:
    """``W_i = offset_i + gain_i * T`` for weights of one shape; owns the template and the gains.

    Source: strict tying as in Lan et al., ALBERT, section 3.1; the gain is ours.
    """

    name = "tied"

    def propose(self, shapes: Shapes, *, above: bool) -> Iterator[Size]:
        """Yield the one size that there is, if several weights have the same shape."""
        if len(shapes) > 1 and len(set(shapes)) == 1:
            yield Size(num_templates=1, template_size=math.prod(shapes[0]))

    def refuse(self, shapes: Shapes, size: Size) -> str | None:
        """All weights have one shape, and the template has it too."""
        if len(set(shapes)) > 1:
            return f"tied weights have one shape, {', '.join(map(str, shapes))} differ"
        if replace(size, num_partial=0) != Size(
            num_templates=1, template_size=math.prod(shapes[0])
        ):
            return f"tied weights are one template of {math.prod(shapes[0])} elements"
        return None

    def enlarge(self, shapes: Shapes, size: Size, parameters: int) -> Size | None:
        """There is one size only."""
        return None

    def describe(self, shapes: Shapes, size: Size) -> Mixture:
        """One template for all."""
        return mixing.describe(shapes, size)

    def flops(self, shapes: Shapes, size: Size) -> int:
        """One multiplication for each element, and what the partial template takes."""
        return mixing.count_flops(shapes, size)

    def parameters(self, shapes: Shapes, size: Size) -> Mapping[str, tuple[int, ...]]:
        """``templates (1, n)``, ``gain (S,)``, and ``partial (1, r)`` where there is one."""
        return {**mixing.template_shapes(size), "gain": (len(shapes),)}

    def buffers(self, shapes: Shapes, size: Size) -> Mapping[str, tuple[int, ...]]:
        """``partial_coefficients`` where there is a partial template."""
        return mixing.constant_shapes(shapes, size)

    def birth(
        self, shapes: Shapes, size: Size, moments: Sequence[Moments], random: torch.Generator
    ) -> dict[str, Tensor]:
        """Draw the template; see ``mixing.draw``."""
        return mixing.draw(shapes, size, moments, random, None)

    def generate(self, tensors: Tensors, shapes: Shapes, size: Size) -> tuple[Tensor, ...]:
        """Scale the template for each site."""
        return mixing.mix_sites(tensors, shapes, size)
