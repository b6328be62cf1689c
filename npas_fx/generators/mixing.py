"""Mix templates into weights; what ``tied`` and ``wavg`` have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from npas_fx.generators.generator import Moments, Shapes, Tensors
from npas_fx.ir import Size

# A generated weight may miss the mean of the one it replaces by this many standard deviations
# before an offset mends it: adding one costs a pass over the weight at each forward, and the mean
# of a large random weight is off by less anyway.
MEAN_TOLERANCE = 0.02

# The same seed draws the same bank whatever defaults of dtype and device the program has set; of
# half precision there is not even a QR decomposition.
_PLAIN: Any = {"dtype": torch.float32, "device": "cpu"}


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
    tiles = [size.tiles(math.prod(shape)) for shape in shapes]
    templates, gain = tensors["templates"], tensors["gain"]
    coefficients = tensors.get("coefficients")
    if coefficients is None:
        coefficients = templates.new_ones(sum(tiles), size.num_templates)
    if size.num_partial:
        missing = size.partial_rows * size.template_size - size.num_partial
        partial = functional.pad(tensors["partial"], (0, missing))
        templates = torch.cat([templates, partial.view(size.partial_rows, size.template_size)])
        coefficients = torch.cat([coefficients, tensors["partial_coefficients"]], dim=1)
    if len(tiles) < sum(tiles):
        gain = _for_tiles(gain, tiles)
    return mix(templates, gain[:, None] * coefficients, shapes)


def _for_tiles(value: Tensor, tiles: Sequence[int]) -> Tensor:
    """Repeat the number of each site for each of its tiles."""
    return torch.cat([value[k : k + 1].expand(count) for k, count in enumerate(tiles)])


def draw(
    shapes: Shapes,
    size: Size,
    moments: Sequence[Moments],
    random: torch.Generator,
    *,
    has_coefficients: bool,
) -> dict[str, Tensor]:
    """Draw a new bank whose weights have the given moments.

    The templates have the typical standard deviation of the weights and the rows of coefficients
    have norm 1 (they are orthonormal where there are at least as many templates as tiles), so the
    gains are close to 1 and a step of SGD moves a generated weight about as far as a plain one. A
    constant weight has its constant as offset; its coefficients (without these, its gain) are zero.
    The partial template starts at zero.
    """
    std = math.sqrt(sum(m.std**2 for m in moments) / len(moments)) or 1.0
    tiles = [size.tiles(math.prod(shape)) for shape in shapes]
    tensors = {
        "templates": _normal(size.num_templates, size.template_size, random) * std,
        "gain": torch.ones(len(shapes), **_PLAIN),
        "offset": torch.zeros(len(shapes), **_PLAIN),
    }
    if has_coefficients:
        tensors["coefficients"] = _draw_rows(sum(tiles), size.num_templates, random)
    if size.num_partial:
        tensors["partial"] = torch.zeros(1, size.num_partial, **_PLAIN)
        constants = _normal(sum(tiles), size.partial_rows, random)
        tensors["partial_coefficients"] = functional.normalize(constants, dim=1)
    weights = mix_sites(tensors, shapes, size)
    last = 0
    for site, (wanted, weight) in enumerate(zip(moments, weights, strict=True)):
        first, last = last, last + tiles[site]
        if wanted.std == 0:
            tensors["offset"][site] = wanted.mean
            if has_coefficients:
                tensors["coefficients"][first:last] = 0
            else:
                tensors["gain"][site] = 0
            continue
        drawn = Moments.of(weight)
        gain = wanted.std / drawn.std
        tensors["gain"][site] = gain
        missing = wanted.mean - gain * drawn.mean
        if abs(missing) > MEAN_TOLERANCE * wanted.std:
            tensors["offset"][site] = missing
    return tensors


def _normal(rows: int, columns: int, random: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=random, **_PLAIN)


def _draw_rows(rows: int, columns: int, random: torch.Generator) -> Tensor:
    drawn = _normal(rows, columns, random)
    if columns == 1:
        return drawn if rows > 1 else torch.ones_like(drawn)  # of norm 1, tiles would be copies
    if rows <= columns:
        orthonormal: Tensor = torch.linalg.qr(drawn.T)[0].T.contiguous()
        return orthonormal
    return functional.normalize(drawn, dim=1)
