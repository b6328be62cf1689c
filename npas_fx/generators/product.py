"""The product of coefficients and templates, cut into weights; on a CPU piece by piece."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from npas_fx.generators.generator import Shapes

# Blocks of up to this many bytes are memory that was freed before (``bank._keep_freed_memory``);
# making the pages of a larger one took three times as long as the product that filled it.
KEPT_BYTES = 2**25 - 2**16
# Where weights start in joint memory. From elsewhere, torch may pick another convolution for one
# than for the same weight when materialized, and the last bits differ.
CACHE_LINE = 64
# Elements that are read by several products in turn, which then find them in the cache.
CACHED = 2**18
MIN_COLUMNS = 4096


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
    parts = torch.split(mixed.reshape(-1), lengths)[::2]
    return tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))


class _Mix(torch.autograd.Function):
    """``_mix`` in pieces whose memory is quick to get, and is freed when they are used.

    One product for all sites holds all weights until the last is used, and its backward joins their
    gradients in one tensor, which took twice as long as the products. One for each site reads all
    templates again, twice so in backward: for whole weights, two to five times as long.
    """

    @staticmethod
    def forward(templates: Tensor, coefficients: Tensor, shapes: Shapes) -> tuple[Tensor, ...]:
        return tuple(_mix_runs(templates, coefficients, shapes))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        templates, coefficients, ctx.shapes = inputs
        ctx.save_for_backward(templates, coefficients)
        ctx.save_for_forward(templates, coefficients)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        known = [gradient for gradient in gradients if gradient is not None]
        if not known:
            return None, None, None
        templates, coefficients = ctx.saved_tensors
        in_place = not torch.is_grad_enabled() and all(
            map(_has_memory, (*ctx.saved_tensors, *known))
        )
        unmix = _unmix_in_place if in_place else _unmix
        with torch.autocast(templates.device.type, enabled=False):  # as in forward, by out=
            return *unmix(templates, coefficients, ctx.shapes, gradients), None

    @staticmethod
    def jvp(ctx: Any, t: Tensor | None, c: Tensor | None, _: None) -> tuple[Tensor, ...]:
        templates, coefficients = ctx.saved_tensors
        t = torch.zeros_like(templates) if t is None else t
        c = torch.zeros_like(coefficients) if c is None else c
        # c T + C t in one product
        both = torch.cat([templates, t]), torch.cat([c, coefficients], dim=1)
        return mix(*both, ctx.shapes)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, templates: Tensor, coefficients: Tensor, shapes: Shapes
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        batched = torch.vmap(partial(_mix, shapes=shapes), in_dims[:2])
        return batched(templates, coefficients), (0,) * len(shapes)


# ``apply`` binds its arguments to this, and would find it out again each time: 20 of 100 us.
_Mix.forward.__signature__ = inspect.signature(_Mix.forward)  # type: ignore[attr-defined]


def _mix_runs(templates: Tensor, coefficients: Tensor, shapes: Shapes) -> Iterator[Tensor]:
    """Yield the weights; those of one length that follow one another are mixed together."""
    row, tile = 0, templates.shape[1]
    for numel, run in groupby(shapes, key=math.prod):
        alike = list(run)
        tiles = math.ceil(numel / tile)
        rows = coefficients[row : row + len(alike) * tiles].reshape(len(alike), tiles, -1)
        row += len(alike) * tiles
        if tiles < len(alike):
            yield from _mix_alike(templates, rows, alike)
        else:  # of many tiles, a weight is by itself a product of many rows
            for shape, each in zip(alike, rows, strict=True):
                yield _mix_tiles(templates, each, math.prod(shape)).view(shape)


def _mix_alike(templates: Tensor, rows: Tensor, shapes: Shapes) -> list[Tensor]:
    """Mix weights of one length: the same columns of all of them at a time.

    Args:
        templates: ``(K, P)``.
        rows: ``(S, tiles, K)``.
        shapes: of the weights.
    """
    (num_templates, tile), numel = templates.shape, math.prod(shapes[0])
    line = max(1, CACHE_LINE // templates.itemsize)
    stride = math.ceil(numel / line) * line
    together = max(1, KEPT_BYTES // (stride * templates.itemsize))
    parts = torch.split(rows, together)
    memory = [templates.new_empty(len(part), stride)[:, :numel] for part in parts]
    # Parts that take turns find the columns of the templates in the cache.
    step = max(MIN_COLUMNS, CACHED // num_templates) if len(parts) > 1 else tile
    for first in range(0, numel, tile):
        width = min(tile, numel - first)
        for start in range(0, width, step):
            columns = templates[:, start : min(start + step, width)]
            for part, mixed in zip(parts, memory, strict=True):
                into = mixed.narrow(1, first + start, columns.shape[1])
                torch.mm(part[:, first // tile], columns, out=into)
    if len(set(shapes)) == 1:  # quicker than one by one
        return [weight for mixed in memory for weight in mixed.view(-1, *shapes[0]).unbind()]
    each = [weight for mixed in memory for weight in mixed.unbind()]
    return [weight.view(shape) for weight, shape in zip(each, shapes, strict=True)]


def _mix_tiles(templates: Tensor, rows: Tensor, numel: int) -> Tensor:
    """Mix one weight: all whole tiles at a time, ``rows`` being ``(tiles, K)``."""
    tile = templates.shape[1]
    whole, rest = divmod(numel, tile)
    weight = templates.new_empty(numel)
    torch.mm(rows[:whole], templates, out=weight[: whole * tile].view(whole, tile))
    if rest:
        torch.mm(rows[whole:], templates[:, :rest], out=weight[None, whole * tile :])
    return weight


def _has_memory(tensor: Tensor) -> bool:
    """Tell it from those that vmap and grad put in its place, to which nothing adds in place."""
    try:
        tensor.untyped_storage()
    except NotImplementedError:
        return False
    return True


def _unmix(
    templates: Tensor, coefficients: Tensor, shapes: Shapes, gradients: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Find the gradients of templates and coefficients from those of the weights."""
    tile = templates.shape[1]
    tiles = []
    for gradient, shape in zip(gradients, shapes, strict=True):
        known = templates.new_zeros(shape) if gradient is None else gradient
        tiles.append(
            functional.pad(known.reshape(-1), (0, -math.prod(shape) % tile)).view(-1, tile)
        )
    joined = torch.cat(tiles)
    return coefficients.T @ joined, joined @ templates.T


class _Block(NamedTuple):
    """The whole tiles of a weight, or its last one."""

    row: int  # of the first tile
    coefficients: Tensor  # (tiles, K)
    gradient: Tensor  # (tiles, elements of one)


def _unmix_in_place(
    templates: Tensor, coefficients: Tensor, shapes: Shapes, gradients: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """``_unmix`` without joining the gradients of all weights."""
    of_templates, of_coefficients = torch.empty_like(templates), torch.zeros_like(coefficients)
    num_templates, tile = templates.shape
    blocks = _blocks(coefficients, shapes, gradients, tile)
    groups = [[block] for block in blocks]
    # Of whole weights, each would go through all templates by itself, twice.
    is_whole = max(map(math.prod, shapes)) <= tile
    if is_whole and num_templates > 2 and templates.numel() > CACHED:
        groups = list(_groups(blocks, min_rows=4 * num_templates))
    beta = 0  # what is first is not added to the memory as it was
    for group in groups:
        given, found, width = templates, of_templates, group[0].gradient.shape[1]
        if width < tile:
            given, found = templates[:, :width], of_templates[:, :width]
            if beta == 0:
                of_templates[:, width:] = 0
        if len(group) == 1:
            row, rows, gradient = group[0]
            found.addmm_(rows.T, gradient, beta=beta)
            torch.mm(gradient, given.T, out=of_coefficients[row : row + len(rows)])
        else:
            sums = _unmix_group(given, found, group, beta)
            lengths = [len(block.coefficients) for block in group]
            for block, of_rows in zip(group, torch.split(sums, lengths), strict=True):
                of_coefficients[block.row :][: len(of_rows)] = of_rows
        beta = 1
    return of_templates, of_coefficients


def _unmix_group(given: Tensor, found: Tensor, group: Sequence[_Block], beta: int) -> Tensor:
    """Add to the gradient of the templates, some columns at a time; return that of all rows."""
    rows = torch.cat([block.coefficients for block in group])
    parts = []
    step = max(MIN_COLUMNS, CACHED // len(rows))
    for start in range(0, given.shape[1], step):
        columns = slice(start, start + step)
        joined = torch.cat([block.gradient[:, columns] for block in group])
        found[:, columns].addmm_(rows.T, joined, beta=beta)
        parts.append(joined @ given[:, columns].T)
    return torch.stack(parts).sum(0)


def _blocks(
    coefficients: Tensor, shapes: Shapes, gradients: Sequence[Tensor | None], tile: int
) -> list[_Block]:
    """List all blocks that have a gradient."""
    blocks, row = [], 0
    for gradient, shape in zip(gradients, shapes, strict=True):
        whole, rest = divmod(math.prod(shape), tile)
        end = row + whole
        if gradient is not None:
            flat = gradient.reshape(-1)
            if whole:
                tiles = flat[: whole * tile].view(whole, tile)
                blocks.append(_Block(row, coefficients[row:end], tiles))
            if rest:
                last = flat[whole * tile :][None]
                blocks.append(_Block(end, coefficients[end : end + 1], last))
        row = end + (rest > 0)
    return blocks


def _groups(blocks: Sequence[_Block], min_rows: int) -> Iterator[list[_Block]]:
    """Put blocks of one width together, until there are so many rows."""

    def width(block: _Block) -> int:
        return block.gradient.shape[1]

    for _, alike in groupby(sorted(blocks, key=width), key=width):
        group: list[_Block] = []
        for block in alike:
            group.append(block)
            if sum(len(each.coefficients) for each in group) >= min_rows:
                yield group
                group = []
        if group:
            yield group
