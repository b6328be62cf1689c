"""Mix templates into weights; what ``tied`` and ``wavg`` have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from npas_fx.generators.generator import Moments, Shapes, Tensors
from npas_fx.ir import Size

# A generated weight may miss the mean of the one it replaces by this many standard deviations
# before an offset mends it: an offset costs one more pass over the bank's weights at each forward,
# and the mean of a large random weight is off by less anyway.
MEAN_TOLERANCE = 0.02


def mix(templates: Tensor, coefficients: Tensor, gain: Tensor, offset: Tensor | None) -> Tensor:
    """Generate all tiles of a bank: ``W_i = offset_i + gain_i * sum_k a_ik T_k``.

    Args:
        templates: ``(K, P)``, one template a row.
        coefficients: ``(R, K)``, one row for each tile.
        gain: ``(R,)``, of the site that each tile belongs to.
        offset: ``(R,)``, likewise, or None where all are zero.

    Returns:
        ``(R, P)`` in the templates' dtype.

    Source: Plummer et al., Neural Parameter Allocation Search, section 3.1.1; the gain is ours.
    """
    scaled = gain[:, None] * coefficients
    if offset is None:
        return torch.mm(scaled, templates)
    return torch.addmm(offset[:, None], scaled, templates)


def template_shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """Shapes of the templates and, where there is one, of the partial template."""
    owned: dict[str, tuple[int, ...]] = {"templates": (size.num_templates, size.template_size)}
    if size.num_partial:
        owned["partial"] = (1, size.num_partial)
    return owned


def constant_shapes(shapes: Shapes, size: Size) -> dict[str, tuple[int, ...]]:
    """Shapes of the offsets and of the coefficients of the partial template."""
    owned: dict[str, tuple[int, ...]] = {"offset": (len(shapes),)}
    if size.num_partial:
        owned["partial_coefficients"] = (num_rows(shapes, size), size.partial_rows)
    return owned


def num_rows(shapes: Shapes, size: Size) -> int:
    """Count the tiles of all sites."""
    return size.rows([math.prod(shape) for shape in shapes])


def mix_sites(tensors: Tensors, shapes: Shapes, size: Size) -> tuple[Tensor, ...]:
    """Generate the weights of all sites: mix the tiles in one product, cut and reshape them.

    Args:
        tensors: ``templates``, ``gain`` and what else the bank has; without ``coefficients`` all of
            them are 1, without ``offset`` all are 0.
        shapes: of the weights.
        size: of the bank.
    """
    numels = [math.prod(shape) for shape in shapes]
    tiles = [size.tiles(numel) for numel in numels]
    templates, gain, offset = tensors["templates"], tensors["gain"], tensors.get("offset")
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
        offset = None if offset is None else _for_tiles(offset, tiles)
    mixed = mix(templates, coefficients, gain, offset)
    # One split for all sites: its backward joins their gradients in one copy, where one index for
    # each site would make a zero-padded gradient of the whole bank each time.
    parts = torch.split(mixed, tiles)
    return tuple(
        (part if part.numel() == numel else part.reshape(-1)[:numel]).view(shape)
        for part, numel, shape in zip(parts, numels, shapes, strict=True)
    )


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
        "templates": torch.randn(size.num_templates, size.template_size, generator=random) * std,
        "gain": torch.ones(len(shapes)),
        "offset": torch.zeros(len(shapes)),
    }
    if has_coefficients:
        tensors["coefficients"] = _draw_rows(sum(tiles), size.num_templates, random)
    if size.num_partial:
        tensors["partial"] = torch.zeros(1, size.num_partial)
        constants = torch.randn(sum(tiles), size.partial_rows, generator=random)
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


def _draw_rows(rows: int, columns: int, random: torch.Generator) -> Tensor:
    drawn = torch.randn(rows, columns, generator=random)
    if columns == 1:
        return drawn if rows > 1 else torch.ones(1, 1)  # of norm 1, tiles would be copies
    if rows <= columns:
        orthonormal: Tensor = torch.linalg.qr(drawn.T)[0].T.contiguous()
        return orthonormal
    return functional.normalize(drawn, dim=1)
