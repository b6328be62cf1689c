"""``dedicated``: the weight stays the parameter it was."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from npas_fx.generators.generator import Moments, Shapes, Tensors
from npas_fx.ir import Mixture, Size


class Dedicated:
    """One weight of its own; in the emitted module a plain parameter and no bank."""

    name = "dedicated"

    def propose(self, shapes: Shapes, *, above: bool) -> Iterator[Size]:
        """Yield the weight's own size, if there is just one weight."""
        if len(shapes) == 1:
            yield Size(num_templates=1, template_size=math.prod(shapes[0]))

    def refuse(self, shapes: Shapes, size: Size) -> str | None:
        """It is exactly one weight."""
        if len(shapes) == 1 and size == Size(num_templates=1, template_size=math.prod(shapes[0])):
            return None
        return "a dedicated bank is exactly one weight, as one template without a partial one"

    def enlarge(self, shapes: Shapes, size: Size, parameters: int) -> Size | None:
        """There is one size only."""
        return None

    def describe(self, shapes: Shapes, size: Size) -> Mixture:
        """Nothing is shared."""
        return Mixture(share=1.0, templates=1, parts=1)

    def flops(self, shapes: Shapes, size: Size) -> int:
        """None."""
        return 0

    def parameters(self, shapes: Shapes, size: Size) -> Mapping[str, tuple[int, ...]]:
        """The weight itself."""
        return {"weight": shapes[0]}

    def buffers(self, shapes: Shapes, size: Size) -> Mapping[str, tuple[int, ...]]:
        """None."""
        return {}

    def birth(
        self, shapes: Shapes, size: Size, moments: Sequence[Moments], random: torch.Generator
    ) -> dict[str, Tensor]:
        """Nothing is drawn: the emitted module copies the model's weight."""
        raise AssertionError("a dedicated weight has no bank")

    def generate(self, tensors: Tensors, shapes: Shapes, size: Size) -> tuple[Tensor, ...]:
        """The weight itself."""
        return (tensors["weight"],)
