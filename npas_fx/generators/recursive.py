"""``recursive``: one weight that all sites share, and a residual of low rank for each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from npas_fx.generators import mixing
from npas_fx.generators.basis import spread
from npas_fx.generators.birth import PLAIN, constant, draw_normal, match_moments, typical_std
from npas_fx.generators.generator import Moments, Shapes, Tensors, num_parameters
from npas_fx.ir import Mixture, Size
from npas_fx.ir.matrix import as_matrix

# Ranks that are proposed differ by this factor.
_SPACING = 1.4


class Recursive:
    """``W_i = offset_i + gain_i * (a_i T + L_i R_i)`` for weights of one shape, as matrices.

    All weights read one matrix ``T``, each scaled by a number ``a_i`` of its own, and each adds the
    product of two thin factors of its own. In a size, ``rank`` is that of this residual. Gains are
    constants, as in ``wavg``: ``a_i`` and ``L_i`` scale already.

    Source: Bae et al., Relaxed Recursive Transformers, whose layers are relaxed by layer-wise LoRA;
    there trained weights are averaged, and an SVD finds the residuals. The scales ``a_i``, and
    drawing all of it, to be trained from scratch, are ours.
    """

    name = "recursive"

    def propose(self, shapes: Shapes, *, above: bool) -> Iterator[Size]:
        """Yield ranks from 1 while the bank is smaller than its weights; of one it never is."""
        if len(set(shapes)) == 1:
            for rank in spread(_most_rank(shapes), _SPACING):
                yield Size(num_templates=1, template_size=math.prod(shapes[0]), rank=rank)

    def refuse(self, shapes: Shapes, size: Size) -> str | None:
        """There are several weights of one shape, and residuals of a rank that they can have."""
        if len(shapes) < 2:
            return "it takes two weights at least: one alone would share with none"
        if len(set(shapes)) > 1:
            return f"its weights have one shape, {', '.join(map(str, shapes))} differ"
        numel, full = math.prod(shapes[0]), min(as_matrix(shapes[0]))
        if (size.num_templates, size.template_size) != (1, numel):
            return f"its weights share one template of {numel} elements"
        if not 1 <= size.rank <= full:
            return f"the rank of its residuals is 1 to {full}"
        return None

    def enlarge(self, shapes: Shapes, size: Size, parameters: int) -> Size | None:
        """Raise the rank by a twentieth or what is affordable, as far as sizes are proposed."""
        affordable = parameters // (len(shapes) * sum(as_matrix(shapes[0])))
        more = min(max(1, size.rank // 20), affordable, _most_rank(shapes) - size.rank)
        return replace(size, rank=size.rank + more) if more > 0 else None

    def describe(self, shapes: Shapes, size: Size) -> Mixture:
        """Whole weights, each from what is shared and what is its own, of full rank."""
        total = sum(map(math.prod, shapes))
        return Mixture(share=num_parameters(self, shapes, size) / total, templates=2, parts=1)

    def flops(self, shapes: Shapes, size: Size) -> int:
        """For each element one to scale, two for each rank; and the gains of the left factors."""
        each = 1 + 2 * size.rank + 2 * size.partial_rows
        return len(shapes) * (each * math.prod(shapes[0]) + size.rank * as_matrix(shapes[0])[0])

    def parameters(self, shapes: Shapes, size: Size) -> Mapping[str, tuple[int, ...]]:
        """Of matrices ``(O, I)`` with residuals of rank ``r``, and the partial one if there is one.

        ``templates (O, I)``, ``coefficients (S, 1)``, ``templates_left (S O, r)``,
        ``templates_right (S r, I)``, ``partial (1, n)``.
        """
        rows, columns = as_matrix(shapes[0])
        return {
            "templates": (rows, columns),
            "coefficients": (len(shapes), 1),
            "templates_left": (len(shapes) * rows, size.rank),
            "templates_right": (len(shapes) * size.rank, columns),
            **mixing.partial_shapes(size),
        }

    def buffers(self, shapes: Shapes, size: Size) -> Mapping[str, tuple[int, ...]]:
        """``gain (S,)``, and ``partial_coefficients`` if there is a partial template."""
        return {**mixing.constant_shapes(shapes, size), "gain": (len(shapes),)}

    def birth(
        self, shapes: Shapes, size: Size, moments: Sequence[Moments], random: torch.Generator
    ) -> dict[str, Tensor]:
        """Draw what is shared and residuals, so that weights differ from the start.

        The residual has a share of the variance as large as that of its parameters among all that
        make the weight. Constant weights have a coefficient and a left factor of zero: both have
        gradients at once, and so has the partial template, which only gains scale.
        """
        rows, columns = as_matrix(shapes[0])
        count, rank, std = len(shapes), size.rank, typical_std(moments)
        own = rank * (rows + columns)
        share = own / (own + rows * columns)
        # Factors of equal norms: gradient flow keeps the difference of their squares.
        factor, balance = math.sqrt(std * math.sqrt(share / rank)), (columns / rows) ** 0.25
        tensors = {
            "templates": draw_normal(rows, columns, random) * (std * math.sqrt(1 - share)),
            "coefficients": torch.ones(count, 1, **PLAIN),
            "templates_left": draw_normal(count * rows, rank, random) * (factor * balance),
            "templates_right": draw_normal(count * rank, columns, random) * (factor / balance),
            **mixing.draw_partial(shapes, size, random),
        }
        weights = self.generate({**tensors, "gain": torch.ones(count, **PLAIN)}, shapes, size)
        tensors["gain"], tensors["offset"] = match_moments(weights, moments)
        for k in constant(moments):
            tensors["coefficients"][k] = 0
            tensors["templates_left"][k * rows : (k + 1) * rows] = 0
        return tensors

    def generate(self, tensors: Tensors, shapes: Shapes, size: Size) -> tuple[Tensor, ...]:
        """Add all residuals to what is shared in one product; weights are views of its result."""
        count, (rows, columns) = len(shapes), as_matrix(shapes[0])
        gain = tensors["gain"][:, None, None]
        shared = gain * tensors["coefficients"][:, :, None] * tensors["templates"]
        left = gain * tensors["templates_left"].view(count, rows, size.rank)
        right = tensors["templates_right"].view(count, size.rank, columns)
        weights = torch.baddbmm(shared, left, right).view(count, *shapes[0]).unbind()
        return mixing.add_partial(weights, tensors, shapes, size)


def _most_rank(shapes: Shapes) -> int:
    """The largest rank with which the bank is smaller than its weights; it is below the full."""
    rows, columns = as_matrix(shapes[0])
    left = (len(shapes) - 1) * rows * columns - len(shapes)  # beside template and coefficients
    return (left - 1) // (len(shapes) * (rows + columns))
