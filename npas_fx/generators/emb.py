"""``emb``: each layer has an embedding, from which maps that all layers share make coefficients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from npas_fx.errors import NPASError
from npas_fx.generators import mixing
from npas_fx.generators.birth import (
    PLAIN,
    constant,
    draw_normal,
    draw_rows,
    match_moments,
    typical_std,
)
from npas_fx.generators.generator import Moments, Shapes, Tensors, num_parameters
from npas_fx.generators.wavg import WeightedAverage
from npas_fx.ir import Mixture, Size

# A size is proposed if a bank of it costs at most this many times as much as one of wavg.
MOST_COST = 1.05

_WAVG = WeightedAverage()


class LayerEmbedding:
    """``W_i = offset_i + gain_i * sum_k a_ijk T_k``, ``a_ij = A_j phi_i + b_j``, for each tile.

    Each weight owns an embedding ``phi_i`` of ``d`` numbers. Tile ``j`` of any weight gets its
    coefficients from it by the affine map of that place. So a weight costs ``d`` numbers however
    many tiles it has, and weights in one bank share how tiles follow from them. Gains are
    constants, as in ``wavg``.

    Args:
        width: of the embeddings; ``d`` is this or the number of templates, if there are fewer.

    Raises:
        NPASError: the width is not a positive number.

    Source: Plummer et al., Neural Parameter Allocation Search, section 3.1.1 (Emb); there, weights
    of as many templates share one map. Tiles, and a map for each place, are ours.
    """

    name = "emb"

    def __init__(self, width: int = 24) -> None:
        if width < 1:
            raise NPASError(f"width={width} is no length of an embedding; use a positive number")
        self.width = width

    def propose(self, shapes: Shapes, *, above: bool) -> Iterator[Size]:
        """Yield wavg's sizes of several templates that are cheaper, or hardly dearer, this way."""
        if len(shapes) < 2:
            return
        for size in _WAVG.propose(shapes, above=above):
            most = MOST_COST * num_parameters(_WAVG, shapes, size)
            if size.num_templates > 1 and num_parameters(self, shapes, size) <= most:
                yield size

    def refuse(self, shapes: Shapes, size: Size) -> str | None:
        """It takes several weights, and templates no longer than the largest."""
        if len(shapes) < 2:
            return "it takes two weights at least: one alone gains nothing from shared maps"
        return mixing.refuse(shapes, size)

    def enlarge(self, shapes: Shapes, size: Size, parameters: int) -> Size | None:
        """Make tiles longer as wavg does; at their longest, add templates."""
        if size.template_size < max(map(math.prod, shapes)):
            return _WAVG.enlarge(shapes, size, parameters)
        most = num_parameters(self, shapes, size) + parameters
        for more in range(max(1, size.num_templates // 20), 0, -1):
            larger = replace(size, num_templates=size.num_templates + more)
            if num_parameters(self, shapes, larger) <= most:
                return larger
        return None

    def describe(self, shapes: Shapes, size: Size) -> Mixture:
        """Each tile is mixed from all templates."""
        return mixing.describe(shapes, size)

    def flops(self, shapes: Shapes, size: Size) -> int:
        """Those of mixing, and of all maps for all embeddings."""
        maps = len(shapes) * _most_tiles(shapes, size) * size.num_templates
        return mixing.count_flops(shapes, size) + 2 * maps * self._width(size)

    def parameters(self, shapes: Shapes, size: Size) -> Mapping[str, tuple[int, ...]]:
        """Of ``J`` tiles at most, what makes coefficients, templates, and the partial one.

        ``embeddings (S, d)``, ``projections (J K, d)``, ``biases (J, K)``.
        """
        places, count, width = _most_tiles(shapes, size), size.num_templates, self._width(size)
        return {
            **mixing.template_shapes(size),
            "embeddings": (len(shapes), width),
            "projections": (places * count, width),
            "biases": (places, count),
        }

    def buffers(self, shapes: Shapes, size: Size) -> Mapping[str, tuple[int, ...]]:
        """``gain (S,)``, and ``partial_coefficients`` if there is a partial template."""
        return {**mixing.constant_shapes(shapes, size), "gain": (len(shapes),)}

    def birth(
        self, shapes: Shapes, size: Size, moments: Sequence[Moments], random: torch.Generator
    ) -> dict[str, Tensor]:
        """Draw templates, embeddings of norm 1, and maps that keep norms in expectation.

        Biases start at zero, and so do the embeddings of constant weights.
        """
        count, width, places = size.num_templates, self._width(size), _most_tiles(shapes, size)
        tensors = {
            "templates": draw_normal(count, size.template_size, random) * typical_std(moments),
            "embeddings": draw_rows(len(shapes), width, random),
            "projections": draw_normal(places * count, width, random) / math.sqrt(count),
            "biases": torch.zeros(places, count, **PLAIN),
            **mixing.draw_partial(shapes, size, random),
        }
        weights = self.generate({**tensors, "gain": torch.ones(len(shapes), **PLAIN)}, shapes, size)
        tensors["gain"], tensors["offset"] = match_moments(weights, moments)
        tensors["embeddings"][constant(moments)] = 0
        return tensors

    def generate(self, tensors: Tensors, shapes: Shapes, size: Size) -> tuple[Tensor, ...]:
        """Make the coefficients of all tiles, then mix these in one product."""
        return mixing.mix_sites(
            {**tensors, "coefficients": _coefficients(tensors, shapes, size)}, shapes, size
        )

    def _width(self, size: Size) -> int:
        return min(self.width, size.num_templates)


def _coefficients(tensors: Tensors, shapes: Shapes, size: Size) -> Tensor:
    """``(R, K)``: of each weight, the first rows of ``(J, K)`` that it has tiles for."""
    biases = tensors["biases"]
    projected = torch.mm(tensors["embeddings"], tensors["projections"].T)
    rows = projected.view(len(shapes), *biases.shape) + biases
    tiles = mixing.tiles_of(shapes, size)
    return torch.cat([rows[place, :count] for place, count in enumerate(tiles)])


def _most_tiles(shapes: Shapes, size: Size) -> int:
    return max(mixing.tiles_of(shapes, size))
