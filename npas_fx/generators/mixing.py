"""Mix templates into weights: what most generators have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

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
from npas_fx.generators.generator import Mixture, Moments, Shapes, Tensors
from npas_fx.ir import Size


def mix(templates: Tensor, coefficients: Tensor, shapes: Shapes) -> tuple[Tensor, ...]:
    """Generate the weights of all sites: ``W_i = sum_k c_ik T_k``, tile by tile.

    Args:
        templates: ``(K, P)``, one template a row.
        coefficients: ``(R, K)``, one row for each tile, with the gain of its site multiplied in.
        shapes: of the weights; one of ``n`` elements is made of ``ceil(n / P)`` tiles.

    Returns:
        The weights, in the templates' dtype.

    Source: Plummer et al., Neural Parameter Allocation Search, section 3.1.1; tiles are ours.
    """
    # The compiler plans memory itself, and on a GPU memory is quick but each launch costs.
    if torch.compiler.is_compiling() or not templates.is_cpu:
        return _mix(templates, coefficients, shapes)
    weights: tuple[Tensor, ...] = _Mix.apply(  # type: ignore[no-untyped-call]
        templates, coefficients, shapes
    )
    return weights


def _mix(templates: Tensor, coefficients: Tensor, shapes: Shapes) -> tuple[Tensor, ...]:
    mixed = torch.mm(coefficients, templates)
    numels = [math.prod(shape) for shape in shapes]
    tile = templates.shape[1]
    # What the last tile of a site has too much is cut off by the same split.
    lengths = [part for numel in numels for part in (numel, -numel % tile)]
    parts = torch.split(mixed.view(-1), lengths)[::2]
    return tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))


class _Mix(torch.autograd.Function):
    """``_mix`` site by site: each weight has memory of its own, and so has its gradient.

    One product for all sites holds all weights until the last is used, and its backward first joins
    their gradients in one tensor; on a CPU, making that costs more than the products themselves
    (10 of 14 ms for a WRN-16-4 at 10 %).
    """

    @staticmethod
    def forward(templates: Tensor, coefficients: Tensor, shapes: Shapes) -> tuple[Tensor, ...]:
        tile, row = templates.shape[1], 0
        weights = []
        for shape in shapes:
            whole, rest = divmod(math.prod(shape), tile)
            weight = templates.new_empty(math.prod(shape))
            if whole:
                tiles = weight[: whole * tile].view(whole, tile)
                torch.mm(coefficients[row : row + whole], templates, out=tiles)
            if rest:
                last = coefficients[row + whole : row + whole + 1]
                torch.mm(last, templates[:, :rest], out=weight[whole * tile :][None])
            row += whole + (rest > 0)
            weights.append(weight.view(shape))
        return tuple(weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        templates, coefficients, ctx.shapes = inputs
        ctx.save_for_backward(templates, coefficients)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        templates, coefficients = ctx.saved_tensors
        with torch.autocast(templates.device.type, enabled=False):  # as in forward, by out=
            return *_backward(templates, coefficients, ctx.shapes, gradients), None


def _backward(
    templates: Tensor, coefficients: Tensor, shapes: Shapes, gradients: Sequence[Tensor | None]
) -> tuple[Tensor | None, Tensor]:
    tile = templates.shape[1]
    of_templates: Tensor | None = None
    of_coefficients = []
    row = 0
    for gradient, shape in zip(gradients, shapes, strict=True):
        whole, rest = divmod(math.prod(shape), tile)
        rows = coefficients[row : row + whole + (rest > 0)]
        row += len(rows)
        if gradient is None:
            of_coefficients.append(torch.zeros_like(rows))
            continue
        flat = gradient.reshape(-1)
        tiles = flat[: whole * tile].view(whole, tile)
        if whole:
            if of_templates is None:  # a first product is quicker than zeros to add it to
                of_templates = rows[:whole].T @ tiles
            else:
                of_templates.addmm_(rows[:whole].T, tiles)
            of_coefficients.append(tiles @ templates.T)
        if rest:
            end = flat[whole * tile :][None]
            if of_templates is None:
                of_templates = torch.zeros_like(templates)
            of_templates[:, :rest].addmm_(rows[whole:].T, end)
            of_coefficients.append(end @ templates[:, :rest].T)
    return of_templates, torch.cat(of_coefficients)


def template_shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """Shapes of the templates and, where there is one, of the partial template."""
    owned: dict[str, tuple[int, ...]] = {"templates": (size.num_templates, size.template_size)}
    if size.num_partial:
        owned["partial"] = (1, size.num_partial)
    return owned


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
    rows = torch.arange(len(shapes)).repeat_interleave(torch.tensor(tiles_of(shapes, size)))
    for k in constant(moments):
        if draw_coefficients is None:
            tensors["gain"][k] = 0
        else:
            tensors["coefficients"][rows == k] = 0
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
