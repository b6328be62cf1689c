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
    gradients in one tensor, which took twice as long as the products. Site by site, each reads all
    templates again, three times in a step: two to five times as long.
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
        if all(gradient is None for gradient in gradients):
            return None, None, None
        templates, coefficients = ctx.saved_tensors
        with torch.autocast(templates.device.type, enabled=False):  # as in forward, by out=
            return *_unmix(templates, coefficients, ctx.shapes, gradients), None

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
        if tiles <= len(alike):
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


class _Block(NamedTuple):
    """The whole tiles of a weight, or its last one."""

    row: int  # of the first tile
    coefficients: Tensor  # (tiles, K)
    gradient: Tensor  # (tiles, elements of one)


def _unmix(
    templates: Tensor, coefficients: Tensor, shapes: Shapes, gradients: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Find the gradients of templates and coefficients, some columns of all tiles at a time."""
    num_templates, tile = templates.shape
    found: dict[int, Tensor] = {}  # first row of a block -> gradient of its coefficients
    blocks: list[_Block] = []
    row = 0
    for gradient, shape in zip(gradients, shapes, strict=True):
        rows = coefficients[row : row + math.ceil(math.prod(shape) / tile)]
        if gradient is None:
            found[row] = torch.zeros_like(rows)
        else:
            blocks += _blocks(row, rows, gradient.reshape(-1), tile)
        row += len(rows)
    # Adding to the gradient of the templates is a pass over it, which many rows pay for.
    groups = list(_groups(blocks, min_rows=4 * num_templates))
    joined_rows = [torch.cat([block.coefficients for block in group]) for group in groups]
    parts: list[list[Tensor]] = [[] for _ in groups]
    of_templates: Tensor | None = None
    step = max(MIN_COLUMNS, CACHED // max(map(len, joined_rows)))
    for start in range(0, tile, step):
        columns = templates[:, start : start + step]
        total: Tensor | None = None
        for group, rows, part in zip(groups, joined_rows, parts, strict=True):
            joined = _join(group, start, columns.shape[1])
            if joined is not None:
                part.append(joined @ columns.T)
                total = rows.T @ joined if total is None else torch.addmm(total, rows.T, joined)
        if total is None:
            total = torch.zeros_like(columns)
        if of_templates is None:  # made like its first part: vmap may have batched gradients only
            of_templates = total.new_empty(templates.shape)
        of_templates.narrow(1, start, columns.shape[1]).copy_(total)
    for group, part in zip(groups, parts, strict=True):
        sums = part[0] if len(part) == 1 else torch.stack(part).sum(0)
        lengths = [len(block.coefficients) for block in group]
        for block, of_rows in zip(group, torch.split(sums, lengths), strict=True):
            found[block.row] = of_rows
    assert of_templates is not None
    return of_templates, torch.cat([found[row] for row in sorted(found)])


def _blocks(row: int, rows: Tensor, gradient: Tensor, tile: int) -> Iterator[_Block]:
    whole, rest = divmod(gradient.numel(), tile)
    if whole:
        tiles = gradient.narrow(0, 0, whole * tile).view(whole, tile)
        yield _Block(row, rows[:whole], tiles)
    if rest:
        yield _Block(row + whole, rows[whole:], gradient.narrow(0, whole * tile, rest)[None])


def _width(block: _Block) -> int:
    return block.gradient.shape[1]


def _groups(blocks: Sequence[_Block], min_rows: int) -> Iterator[list[_Block]]:
    """Put blocks of one width together, until there are so many rows."""
    group: list[_Block] = []
    for block in sorted(blocks, key=_width):
        num_rows = sum(len(other.coefficients) for other in group)
        if group and (num_rows >= min_rows or _width(block) != _width(group[0])):
            yield group
            group = []
        group.append(block)
    yield group


def _join(group: Sequence[_Block], start: int, number: int) -> Tensor | None:
    """The same columns of all tiles of a group, zeros where they are too short; None if all are."""
    length = min(number, _width(group[0]) - start)
    if length <= 0:
        return None
    pieces = [block.gradient.narrow(1, start, length) for block in group]
    joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return functional.pad(joined, (0, number - length)) if length < number else joined
