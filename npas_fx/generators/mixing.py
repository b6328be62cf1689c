"""Mix templates into weights: what most generators have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from npas_fx.generators.birth import (
    PLAIN,
    constant,
    draw_normal,
    match_moments,
    typical_std,
)
from npas_fx.generators.generator import Moments, Shapes, Tensors
from npas_fx.generators.product import mix
from npas_fx.ir import Mixture, Size


def template_shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """Shapes of the templates and, where there is one, of the partial template."""
    return {"templates": (size.num_templates, size.template_size), **partial_shapes(size)}


def partial_shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """Shape of the partial template, where there is one."""
    return {"partial": (1, size.num_partial)} if size.num_partial else {}


def constant_shapes(shapes: Shapes, size: Size) -> dict[str, tuple[int, ...]]:
    """Shape of the coefficients of the partial template, where there is one."""
    if not size.num_partial:
        return {}
    return {"partial_coefficients": (num_rows(shapes, size), size.partial_rows)}


def describe(shapes: Shapes, size: Size) -> Mixture:
    """Describe a bank that mixes templates tile by tile."""
    total = sum(map(math.prod, shapes))
    return Mixture(
        share=size.num_templates * size.template_size / total,
        templates=size.num_templates,
        parts=num_rows(shapes, size) / len(shapes),
    )


def count_flops(shapes: Shapes, size: Size) -> int:
    """Multiplications and additions of mixing all weights once."""
    return 2 * sum(map(math.prod, shapes)) * (size.num_templates + size.partial_rows)


def refuse(shapes: Shapes, size: Size) -> str | None:
    """Say what is wrong with a bank that mixes templates tile by tile; None if nothing is."""
    largest = max(map(math.prod, shapes))
    if size.num_templates < 1 or not 1 <= size.template_size <= largest:
        return f"it takes at least one template of 1 to {largest} elements"
    return "it has no rank of its own" if size.rank else None


def num_rows(shapes: Shapes, size: Size) -> int:
    """Count the tiles of all sites."""
    return size.rows([math.prod(shape) for shape in shapes])


def mix_sites(tensors: Tensors, shapes: Shapes, size: Size) -> tuple[Tensor, ...]:
    """Generate the weights of all sites: mix the tiles in one product, cut and reshape them.

    Args:
        tensors: ``templates``, ``gain`` and what else the bank has; without ``coefficients`` all of
            them are 1.
        shapes: of the weights.
        size: of the bank.
    """
    tiles = tiles_of(shapes, size)
    templates, gain = tensors["templates"], tensors["gain"]
    coefficients = tensors.get("coefficients")
    if coefficients is None:
        coefficients = templates.new_ones(sum(tiles), size.num_templates)
    if size.num_partial:
        templates = torch.cat([templates, _partial_templates(tensors, size)])
        coefficients = torch.cat([coefficients, tensors["partial_coefficients"]], dim=1)
    if len(tiles) < sum(tiles):
        gain = _for_tiles(gain, tiles)
    return mix(templates, gain[:, None] * coefficients, shapes)


def add_partial(
    weights: Sequence[Tensor], tensors: Tensors, shapes: Shapes, size: Size
) -> tuple[Tensor, ...]:
    """Add the partial template, where there is one, to weights that are made in another way.

    Args:
        weights: of the sites.
        tensors: with ``gain``, and what ``draw_partial`` draws.
        shapes: of the weights.
        size: of the bank; its templates are as long as the longest tile of the partial one.
    """
    if not size.num_partial:
        return tuple(weights)
    gain = _for_tiles(tensors["gain"], tiles_of(shapes, size))
    constants = gain[:, None] * tensors["partial_coefficients"]
    more = mix(_partial_templates(tensors, size), constants, shapes)
    return tuple(weight + addend for weight, addend in zip(weights, more, strict=True))


def _partial_templates(tensors: Tensors, size: Size) -> Tensor:
    missing = size.partial_rows * size.template_size - size.num_partial
    partial = functional.pad(tensors["partial"], (0, missing))
    return partial.view(size.partial_rows, size.template_size)


def tiles_of(shapes: Shapes, size: Size) -> list[int]:
    """Number of tiles of each weight."""
    return [size.tiles(math.prod(shape)) for shape in shapes]


def _for_tiles(value: Tensor, tiles: Sequence[int]) -> Tensor:
    """Repeat the number of each site for each of its tiles."""
    return torch.cat([value[k : k + 1].expand(count) for k, count in enumerate(tiles)])


def draw(
    shapes: Shapes,
    size: Size,
    moments: Sequence[Moments],
    random: torch.Generator,
    draw_coefficients: Callable[[], Tensor] | None,
) -> dict[str, Tensor]:
    """Draw a new bank whose weights have the given moments.

    The templates have the typical standard deviation of the weights, so where the rows of
    coefficients have norm 1, gains are close to 1 and a step of SGD moves a generated weight about
    as far as a plain one. The partial template starts at zero.

    Args:
        shapes: of the weights.
        size: of the bank.
        moments: that the weights shall have.
        random: draws.
        draw_coefficients: ``(R, K)``, to be trained; those of constant weights are then set to
            zero. Without, all are 1, gains are trained and constant weights have one of zero.
    """
    tensors = {"templates": draw_normal(size.num_templates, size.template_size, random)}
    tensors["templates"] *= typical_std(moments)
    if draw_coefficients is not None:
        tensors["coefficients"] = draw_coefficients()
    tensors |= draw_partial(shapes, size, random)
    weights = mix_sites({**tensors, "gain": torch.ones(len(shapes), **PLAIN)}, shapes, size)
    tensors["gain"], tensors["offset"] = match_moments(weights, moments)
    tiles = tiles_of(shapes, size)
    first = [0, *accumulate(tiles)]
    for k in constant(moments):
        if draw_coefficients is None:
            tensors["gain"][k] = 0
        else:
            tensors["coefficients"][first[k] : first[k + 1]] = 0
    return tensors


def draw_partial(shapes: Shapes, size: Size, random: torch.Generator) -> dict[str, Tensor]:
    """Draw the partial template, where there is one: zeros, and coefficients of norm 1."""
    if not size.num_partial:
        return {}
    constants = draw_normal(num_rows(shapes, size), size.partial_rows, random)
    return {
        "partial": torch.zeros(1, size.num_partial, **PLAIN),
        "partial_coefficients": functional.normalize(constants, dim=1),
    }
