"""``wavg_bilinear`` and others: each site is one small vector, stretched; kept for comparison."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

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
from npas_fx.generators.stretching import Rule
from npas_fx.generators.wavg import ALIGNMENT
from npas_fx.ir import Mixture, Size

# Numbers of templates that are proposed, and elements of the shortest.
TEMPLATE_COUNTS = (1, 2, 4)
SHORTEST = 16


class Resized:
    """``W_i = offset_i + gain_i * stretch_i(sum_k a_ik T_k)``, for weights larger than templates.

    Each weight is mixed from the templates into one vector as long as they are, and a rule makes
    the weight from it. A weight no longer than a template is the beginning of its vector. Gains are
    constants, as in ``wavg``. How weights are stretched limits their rank; these generators are for
    comparison with tiles.

    Args:
        rule: how vectors are stretched.

    Source: Plummer et al., Neural Parameter Allocation Search, section 3.1; details of the rules
    that differ from its code are in docs/generators/resized.md.
    """

    name: str

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.name = f"wavg_{rule.name}"

    def propose(self, shapes: Shapes, *, above: bool) -> Iterator[Size]:
        """Yield templates of about half the largest weight, a quarter, and so on; never above."""
        total = sum(map(math.prod, shapes))
        largest = max(shapes, key=math.prod)
        longest = math.prod(largest) // 2
        sizes, length = set(), longest
        while length >= max(2, min(SHORTEST, longest)):
            chosen = self._choose_length(largest, length)
            for count in TEMPLATE_COUNTS:
                if count == 1 or count < len(shapes):
                    sizes.add(Size(num_templates=count, template_size=chosen))
            length //= 2
        for size in sorted(sizes, key=lambda s: (s.num_templates, s.template_size)):
            if not self.refuse(shapes, size) and num_parameters(self, shapes, size) < total:
                yield size

    def refuse(self, shapes: Shapes, size: Size) -> str | None:
        """Templates are shorter than the largest weight, and some weight reads all of them."""
        largest, length = max(map(math.prod, shapes)), size.template_size
        if size.num_templates < 1 or not 2 <= length < largest:
            return f"it takes at least one template of 2 to {largest - 1} elements"
        by_size = sorted(set(shapes), key=math.prod, reverse=True)
        if not any(self._num_read(shape, length) == length for shape in by_size):
            fitting = max(self._fit(shape, length) for shape in by_size)
            return f"no weight reads all of template_size={length}; use {fitting}"
        return mixing.refuse(shapes, size)

    def enlarge(self, shapes: Shapes, size: Size, parameters: int) -> Size | None:
        """Make templates longer by a twentieth or what is affordable."""
        most = num_parameters(self, shapes, size) + parameters
        room = max(map(math.prod, shapes)) - 1 - size.template_size
        step = max(ALIGNMENT, size.template_size // 20)
        for more in range(min(room, step, parameters // size.num_templates), 0, -1):
            longer = replace(size, template_size=size.template_size + more)
            if num_parameters(self, shapes, longer) <= most and not self.refuse(shapes, longer):
                return longer
        return None

    def describe(self, shapes: Shapes, size: Size) -> Mixture:
        """Each weight is one part; the rank is that of the largest."""
        largest = max(shapes, key=math.prod)
        return Mixture(
            share=size.num_templates * size.template_size / sum(map(math.prod, shapes)),
            templates=size.num_templates,
            parts=1,
            rank=self.rule.rank(largest, size.template_size),
        )

    def flops(self, shapes: Shapes, size: Size) -> int:
        """Those of mixing vectors, of stretching them, and of the partial template."""
        numels = [math.prod(shape) for shape in shapes]
        mixed = 2 * len(shapes) * size.num_templates * size.template_size
        stretched = sum(numel for numel in numels if numel > size.template_size)
        return mixed + self.rule.flops * stretched + 2 * sum(numels) * size.partial_rows

    def parameters(self, shapes: Shapes, size: Size) -> Mapping[str, tuple[int, ...]]:
        """``templates (K, P)``, ``coefficients (S, K)``, what the rule learns, ``partial (1, r)``.

        What it learns is a matrix with the rows of all weights, one after the other.
        """
        owned = mixing.template_shapes(size)
        owned["coefficients"] = (len(shapes), size.num_templates)
        if rows := sum(self._learned_rows(shapes, size)):
            owned[self.rule.learned] = (rows, self._learned_columns(shapes, size))
        return owned

    def buffers(self, shapes: Shapes, size: Size) -> Mapping[str, tuple[int, ...]]:
        """``gain (S,)``, and ``partial_coefficients`` if there is a partial template."""
        return {**mixing.constant_shapes(shapes, size), "gain": (len(shapes),)}

    def birth(
        self, shapes: Shapes, size: Size, moments: Sequence[Moments], random: torch.Generator
    ) -> dict[str, Tensor]:
        """Draw templates, rows of norm 1, and what the rule learns.

        Coefficients of constant weights are zero. Those of one template start at 1: however they
        start, its vectors differ by a factor.
        """
        count, sites = size.num_templates, len(shapes)
        tensors = {
            "templates": draw_normal(count, size.template_size, random) * typical_std(moments),
            "coefficients": torch.ones(sites, 1, **PLAIN)
            if count == 1
            else draw_rows(sites, count, random),
        }
        if rows := sum(self._learned_rows(shapes, size)):
            columns = self._learned_columns(shapes, size)
            tensors[self.rule.learned] = self.rule.draw(rows, columns, random)
        tensors |= mixing.draw_partial(shapes, size, random)
        weights = self.generate({**tensors, "gain": torch.ones(sites, **PLAIN)}, shapes, size)
        tensors["gain"], tensors["offset"] = match_moments(weights, moments)
        tensors["coefficients"][constant(moments)] = 0
        return tensors

    def generate(self, tensors: Tensors, shapes: Shapes, size: Size) -> tuple[Tensor, ...]:
        """Mix the vectors of all sites in one product, then stretch each."""
        scaled = tensors["gain"][:, None] * tensors["coefficients"]
        vectors = torch.mm(scaled, tensors["templates"]).unbind()
        learned = tensors.get(self.rule.learned, scaled.new_empty(0, 0))
        parts = torch.split(learned, self._learned_rows(shapes, size))
        weights = []
        for vector, shape, part in zip(vectors, shapes, parts, strict=True):
            numel = math.prod(shape)
            if numel > size.template_size:
                weights.append(self.rule.stretch(vector, shape, part))
            else:
                weights.append(vector[:numel].view(shape))
        return mixing.add_partial(weights, tensors, shapes, size)

    def _learned_rows(self, shapes: Shapes, size: Size) -> list[int]:
        """Rows of each weight in what the rule learns."""
        numels = [math.prod(shape) for shape in shapes]
        length = size.template_size
        return [self.rule.learned_shape(n, length)[0] if n > length else 0 for n in numels]

    def _learned_columns(self, shapes: Shapes, size: Size) -> int:
        return self.rule.learned_shape(max(map(math.prod, shapes)), size.template_size)[1]

    def _num_read(self, shape: tuple[int, ...], length: int) -> int:
        numel = math.prod(shape)
        return numel if numel <= length else self.rule.num_read(shape, length)

    def _choose_length(self, shape: tuple[int, ...], longest: int) -> int:
        """Find a long length, all of which a weight reads, that gives it the highest rank."""
        lengths = range(max(2, longest - ALIGNMENT + 1), longest + 1)
        return max(
            (length for length in lengths if self._num_read(shape, length) == length),
            key=lambda length: (self.rule.rank(shape, length), length),
            default=self._fit(shape, longest),
        )

    def _fit(self, shape: tuple[int, ...], length: int) -> int:
        """The next shorter length that a weight reads all of."""
        while (read := self._num_read(shape, length)) < length:
            length = read
        return length
