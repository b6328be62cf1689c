"""``avg``: each tile of each site is the mean of some of the bank's templates, always the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, combinations, cycle

import torch
from torch import Tensor

from npas_fx.generators import mixing
from npas_fx.generators.birth import PLAIN, constant, draw_normal, match_moments, typical_std
from npas_fx.generators.generator import Moments, Shapes, Tensors
from npas_fx.generators.wavg import MAX_TEMPLATES, WeightedAverage, choose_tile
from npas_fx.ir import Mixture, Size

_WAVG = WeightedAverage()


class Average:
    """``W_i = offset_i + gain_i * sqrt(m) * mean_{k in M_j} T_k`` for each tile ``j`` of a weight.

    Which ``m`` templates a tile averages depends on the numbers of tiles and templates only. The
    bank owns its templates and a gain for each weight. The square root makes the rows of constants
    have norm 1, so that gains start near 1 whatever ``m`` is.

    Source: Plummer et al., Neural Parameter Allocation Search, section 3.1 (Avg); there a weight is
    the mean of all templates in its part of the bank. Tiles, subsets and the gain are ours.
    """

    name = "avg"

    def propose(self, shapes: Shapes, *, above: bool) -> Iterator[Size]:
        """Yield wavg's sizes up to the weights' own, with as many templates as tiles differ by.

        Tiles get shorter for it: the bank is as large as before.
        """
        sizes = {_tell_apart(size, shapes) for size in _WAVG.propose(shapes, above=False)}
        for size in sorted(sizes, key=lambda s: (s.num_templates, s.template_size)):
            if not self.refuse(shapes, size):
                yield size

    def refuse(self, shapes: Shapes, size: Size) -> str | None:
        """Each element of each template is in some weight, and tiles are no single elements."""
        if wrong := mixing.refuse(shapes, size):
            return wrong
        numels = [math.prod(shape) for shape in shapes]
        if size.template_size == 1 < max(numels):
            return "templates of one element make weights of equal elements"
        if not _all_read(numels, size):
            return f"its tiles do not read all of {size.num_templates} templates to the end"
        return None

    def enlarge(self, shapes: Shapes, size: Size, parameters: int) -> Size | None:
        """Make tiles longer, or add a template while there are fewer than tiles."""
        larger = _WAVG.enlarge(shapes, size, parameters)
        if larger is None or self.refuse(shapes, larger):
            return None
        is_longer = larger.template_size > size.template_size
        is_useful = larger.num_templates < mixing.num_rows(shapes, larger)
        return larger if is_longer or is_useful else None

    def describe(self, shapes: Shapes, size: Size) -> Mixture:
        """Each tile is mixed from ``m`` templates."""
        averaged = num_averaged(mixing.num_rows(shapes, size), size.num_templates)
        return mixing.describe(shapes, size)._replace(templates=averaged)

    def flops(self, shapes: Shapes, size: Size) -> int:
        """Two for each template and element: those that are not averaged are multiplied by 0."""
        return mixing.count_flops(shapes, size)

    def parameters(self, shapes: Shapes, size: Size) -> Mapping[str, tuple[int, ...]]:
        """``templates (K, P)``, ``gain (S,)``, and ``partial (1, r)`` where there is one."""
        return {**mixing.template_shapes(size), "gain": (len(shapes),)}

    def buffers(self, shapes: Shapes, size: Size) -> Mapping[str, tuple[int, ...]]:
        """``averaged (R, K)``, and ``partial_coefficients`` if there is a partial template."""
        averaged = (mixing.num_rows(shapes, size), size.num_templates)
        return {**mixing.constant_shapes(shapes, size), "averaged": averaged}

    def birth(
        self, shapes: Shapes, size: Size, moments: Sequence[Moments], random: torch.Generator
    ) -> dict[str, Tensor]:
        """Draw the templates; constant weights have a gain of zero."""
        tensors = {"templates": draw_normal(size.num_templates, size.template_size, random)}
        tensors["templates"] *= typical_std(moments)
        tensors["averaged"] = draw_averaged(mixing.num_rows(shapes, size), size.num_templates)
        tensors |= mixing.draw_partial(shapes, size, random)
        weights = self.generate({**tensors, "gain": torch.ones(len(shapes), **PLAIN)}, shapes, size)
        tensors["gain"], tensors["offset"] = match_moments(weights, moments)
        tensors["gain"][constant(moments)] = 0
        return tensors

    def generate(self, tensors: Tensors, shapes: Shapes, size: Size) -> tuple[Tensor, ...]:
        """Average for all tiles of all sites in one product."""
        return mixing.mix_sites({**tensors, "coefficients": tensors["averaged"]}, shapes, size)


def num_averaged(num_rows: int, num_templates: int) -> int:
    """Number of templates that each of so many tiles averages, ``m``.

    It is the least from two up to half of the templates with as many subsets as there are tiles,
    and with which all templates are used. Where none has so many, it is the one that has most.
    """
    most = (num_templates + 1) // 2
    numbers = range(min(2, most), most + 1)
    for number in numbers:
        is_enough = math.comb(num_templates, number) >= num_rows
        if is_enough and number * num_rows >= num_templates:
            return number
    return max(numbers, key=lambda number: math.comb(num_templates, number))


def draw_averaged(num_rows: int, num_templates: int) -> Tensor:
    """``(R, K)``: in each row ``1 / sqrt(m)`` for the templates that it averages, 0 for others."""
    averaged = torch.zeros(num_rows, num_templates, **PLAIN)
    number = num_averaged(num_rows, num_templates)
    for row, subset in zip(averaged, cycle_subsets(num_templates, number), strict=False):
        row[list(subset)] = number**-0.5
    return averaged


def cycle_subsets(num_templates: int, number: int) -> Iterator[tuple[int, ...]]:
    """Yield subsets of so many templates: each once, then all over again.

    A subset is followed by its rotations, each template in as many of them as any other; the first
    is rotated by its own length, so that each template is used once before any is used twice.
    """
    return cycle(_subsets(num_templates, number))


def _subsets(num_templates: int, number: int) -> Iterator[tuple[int, ...]]:
    cosets = math.gcd(num_templates, number)
    turns = [
        (start + step * number) % num_templates
        for start in range(cosets)
        for step in range(num_templates // cosets)
    ]
    seen = set()
    for rest in combinations(range(1, num_templates), number - 1):
        for turn in turns:
            subset = tuple(sorted((k + turn) % num_templates for k in (0, *rest)))
            if subset not in seen:
                seen.add(subset)
                yield subset


def _all_read(numels: Sequence[int], size: Size) -> bool:
    """Whether each template is in a tile that is as long as itself."""
    number = num_averaged(size.rows(numels), size.num_templates)
    subsets = cycle_subsets(size.num_templates, number)
    unread = set(range(size.num_templates))
    for subset, is_whole in zip(subsets, _whole_tiles(numels, size), strict=False):
        if is_whole:
            unread.difference_update(subset)
        if not unread:
            return True
    return False


def _whole_tiles(numels: Sequence[int], size: Size) -> Iterator[bool]:
    """For each tile, whether it is as long as a template."""
    for numel in numels:
        whole, rest = divmod(numel, size.template_size)
        yield from chain([True] * whole, [False] * (rest > 0))


def _tell_apart(size: Size, shapes: Shapes) -> Size:
    """Divide the elements of a bank among so many templates that no two tiles need be copies."""
    numels = [math.prod(shape) for shape in shapes]
    largest = max(numels)
    if size.template_size == largest == min(numels) and size.num_templates > 1:
        return size
    owned = size.num_templates * size.template_size
    for count in range(max(2, math.ceil(owned / largest)), MAX_TEMPLATES + 1):
        length = choose_tile(max(1, owned // count), 0, count, set(shapes))
        assert length is not None  # as long as 1 will do
        size = Size(num_templates=count, template_size=length)
        rows = size.rows(numels)
        if math.comb(count, num_averaged(rows, count)) >= rows and _all_read(numels, size):
            break
    return size
