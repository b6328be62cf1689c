"""``wavg``: each tile of each site is a weighted average of the bank's templates."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from npas_fx.generators import mixing
from npas_fx.generators.birth import draw_rows
from npas_fx.generators.generator import Moments, Shapes, Tensors
from npas_fx.ir import Mixture, Size

# Mixing K templates costs K multiplications for each generated element; the reference stops at 8.
MAX_TEMPLATES = 16
# Templates that a weight is mixed from when the bank is smaller than two such weights.
TILE_TEMPLATES = 4
# Coefficients of tiles may cost this share of the templates before fewer templates are taken.
MAX_OVERHEAD = 0.1
# Elements of float32 in a cache line. Where a weight starts elsewhere, torch may pick another
# convolution for it than for the same weight when materialized, and the last bits differ.
ALIGNMENT = 16

_SHARES_ABOVE = (1.25, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 8, 10, 12)
_SHARES_BELOW = (1, 2 / 3)  # of each power of two


class WeightedAverage:
    """``W_i = offset_i + gain_i * sum_k a_ik T_k`` tile by tile, for weights of any shapes.

    A weight is flattened and cut into tiles of the templates' size. Templates as large as the
    weights mix whole weights; a bank smaller than one weight mixes parts of it, each with
    coefficients of its own, so that no part is a copy of another. Gains are constants: the
    coefficients already scale what they mix.

    Source: Plummer et al., Neural Parameter Allocation Search, section 3.1.1 (WAvg); tiles in place
    of its bilinear resizing are ours.
    """

    name = "wavg"

    def propose(self, shapes: Shapes, *, above: bool) -> Iterator[Size]:
        """Yield whole-weight sizes from two templates up, and tiles down to the smallest bank."""
        numels = [math.prod(shape) for shape in shapes]
        total, largest, count = sum(numels), max(numels), len(numels)
        distinct = set(shapes)
        smallest = choose_tile(max(1, round(math.sqrt(total))), 0, 1, distinct)
        assert smallest is not None
        sizes = {Size(num_templates=1, template_size=smallest)}
        if len(set(numels)) == 1:
            sizes |= {_whole(largest, k) for k in range(2, min(count - 1, MAX_TEMPLATES) + 1)}
            if len(set(shapes)) > 1:
                sizes.add(_whole(largest, 1))
            if above:
                many = {round(share * count) for share in _SHARES_ABOVE}
                sizes |= {_whole(largest, k) for k in many if count < k <= MAX_TEMPLATES}
        power = 0
        while (wanted := total / 2**power) >= math.sqrt(total):
            for share in _SHARES_BELOW:
                sizes |= set(_tiles(wanted * share, total, distinct))
            power += 1
        for size in sorted(sizes, key=lambda s: (s.num_templates, s.template_size)):
            if size.template_size <= largest:
                yield size

    def refuse(self, shapes: Shapes, size: Size) -> str | None:
        """Templates are no longer than the largest weight."""
        return mixing.refuse(shapes, size)

    def enlarge(self, shapes: Shapes, size: Size, parameters: int) -> Size | None:
        """Make tiles longer by a twentieth or what is affordable; at their longest, add templates.

        One template more costs its elements and a coefficient for each tile.
        """
        numels = [math.prod(shape) for shape in shapes]
        room = max(numels) - size.template_size
        if room:
            step = max(ALIGNMENT, size.template_size // 20)
            longest = size.template_size + min(room, parameters // size.num_templates, step)
            longer = choose_tile(longest, size.template_size, size.num_templates, set(shapes))
            return None if longer is None else replace(size, template_size=longer)
        affordable = parameters // (size.template_size + size.rows(numels))
        more = min(affordable, max(1, size.num_templates // 20))
        return replace(size, num_templates=size.num_templates + more) if more else None

    def describe(self, shapes: Shapes, size: Size) -> Mixture:
        """Each tile is mixed from all templates."""
        return mixing.describe(shapes, size)

    def flops(self, shapes: Shapes, size: Size) -> int:
        """Two for each template and element."""
        return mixing.count_flops(shapes, size)

    def parameters(self, shapes: Shapes, size: Size) -> Mapping[str, tuple[int, ...]]:
        """``templates (K, P)``, ``coefficients (R, K)``, and ``partial (1, r)`` if there is one."""
        coefficients = (mixing.num_rows(shapes, size), size.num_templates)
        return {**mixing.template_shapes(size), "coefficients": coefficients}

    def buffers(self, shapes: Shapes, size: Size) -> Mapping[str, tuple[int, ...]]:
        """``gain (S,)``, and ``partial_coefficients`` if there is a partial template."""
        return {**mixing.constant_shapes(shapes, size), "gain": (len(shapes),)}

    def birth(
        self, shapes: Shapes, size: Size, moments: Sequence[Moments], random: torch.Generator
    ) -> dict[str, Tensor]:
        """Draw templates and coefficients; see ``mixing.draw``."""
        return mixing.draw(
            shapes,
            size,
            moments,
            random,
            lambda: draw_rows(mixing.num_rows(shapes, size), size.num_templates, random),
        )

    def generate(self, tensors: Tensors, shapes: Shapes, size: Size) -> tuple[Tensor, ...]:
        """Mix all tiles of all sites in one product."""
        return mixing.mix_sites(tensors, shapes, size)


def _whole(numel: int, num_templates: int) -> Size:
    return Size(num_templates=num_templates, template_size=numel)


def choose_tile(
    longest: int, least: int, num_templates: int, shapes: Collection[tuple[int, ...]]
) -> int | None:
    """Find a long tile that is out of step with the rows of the weights; None if there is none.

    A row that starts where another one starts in its tile is mixed from the same parts of the
    templates. Tiles as long as some rows make all start in few places, others in many, so that a
    weight has a higher rank from as many parameters. Long tiles start at full cache lines, as plain
    weights do, unless rows of one template would be multiples of each other by that.

    Args:
        longest: that it may be.
        least: that it must exceed.
        num_templates: that are mixed.
        shapes: of the weights.
    """
    if longest >= max(map(math.prod, shapes)):
        return longest
    most_rows = max(shape[0] for shape in shapes)
    is_long = longest >= ALIGNMENT * (16 if num_templates > 1 else most_rows)
    step = ALIGNMENT if is_long else 1
    longest = longest // step * step
    columns = {math.prod(shape[1:]) for shape in shapes}
    in_step = max(math.gcd(step, row) for row in columns)  # all tiles are multiples of the step
    best, divisor = None, math.inf
    for tile in range(longest, max(least, longest - 16 * step, longest // 2), -step):
        shared = max(math.gcd(tile, row) for row in columns)
        if shared < divisor:
            best, divisor = tile, shared
        if shared == in_step:
            break
    return best


def _tiles(wanted: float, total: int, shapes: Collection[tuple[int, ...]]) -> Iterator[Size]:
    """Sizes whose templates have about ``wanted`` elements for ``total`` generated ones."""
    largest = max(map(math.prod, shapes))
    if wanted >= 2 * largest:
        num_templates = round(wanted / largest)
        if num_templates <= MAX_TEMPLATES and num_templates * largest < total:
            yield _whole(largest, num_templates)
        return
    # R = total / P tiles of K coefficients: their share of the templates is total * (K / wanted)^2.
    affordable = int(wanted * math.sqrt(MAX_OVERHEAD / total))
    num_templates = max(1, min(TILE_TEMPLATES, affordable))
    if wanted < total:
        longest = max(1, round(wanted / num_templates))
        template_size = choose_tile(longest, 0, num_templates, shapes)
        assert template_size is not None
        yield Size(num_templates=num_templates, template_size=template_size)
