"""``superweight``: weights of any shapes are composed of the parts that they have in common."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate, groupby
from operator import itemgetter
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from npas_fx.generators import mixing
from npas_fx.generators.birth import constant, draw_normal, draw_rows, match_moments, typical_std
from npas_fx.generators.generator import Moments, Shapes, Tensors
from npas_fx.generators.wavg import MAX_TEMPLATES
from npas_fx.ir import Mixture, Size

# Extents along (O, I, T): the first axis, the second, all others as one.
_Box: TypeAlias = tuple[int, int, int]
# A box of a SuperWeight: its place among the SuperWeights, and that of the box in it.
_Block: TypeAlias = tuple[int, int]
# The blocks of a weight: bands along O, in each of them columns along I, in each of them along T.
_Layout: TypeAlias = tuple[tuple[tuple[_Block, ...], ...], ...]
_Content = TypeVar("_Content", bound=Hashable)

# Sizes that are proposed differ by this factor.
_SPACING = 1.3


class Piece(NamedTuple):
    """One SuperWeight.

    Attributes:
        users: places of the weights that it is a part of, increasing.
        boxes: what its flat elements are cut into, one box after the other.
        numel: elements of one template.
        filled: the share of a weight that it is, summed over its users.
    """

    users: tuple[int, ...]
    boxes: tuple[_Box, ...]
    numel: int
    filled: float


class Cut(NamedTuple):
    """How weights are cut into SuperWeights.

    Attributes:
        pieces: the SuperWeights.
        layouts: how each weight is made of their boxes.
        turns: places of SuperWeights, in the order in which they get templates; as many as there
            may be at most.
        num_useful: templates up to which no SuperWeight has more of them than weights.
    """

    pieces: tuple[Piece, ...]
    layouts: tuple[_Layout, ...]
    turns: tuple[int, ...]
    num_useful: int


class SuperWeight:
    """``W_i = offset_i + gain_i * compose_p(sum_t a_pit T_pt)`` for weights of any shapes.

    A weight is a box: its first axis, its second, and all others as one. The boxes lie in one
    corner, and the elements that lie in exactly the same boxes are one SuperWeight: it owns
    templates, and each weight that it is a part of mixes them with coefficients of its own. Nothing
    is resized, and weights of one shape are made of the same SuperWeights. Gains are constants, as
    in ``wavg``.

    With shared coefficients, ``a_pt``, weights of one shape are copies but for their gains, which
    are trained. That is for searching what to share: their gradients tell which of them disagree.

    Args:
        shares_coefficients: whether all weights mix a SuperWeight in the same way.

    Source: Teterwak et al., Learning to Compose SuperWeights for Neural Parameter Allocation
    Search; cells in place of its chain of shapes are ours.
    """

    name: str

    def __init__(self, *, shares_coefficients: bool = False) -> None:
        self.shares_coefficients = shares_coefficients
        self.name = "superweight_shared" if shares_coefficients else "superweight"

    def propose(self, shapes: Shapes, *, above: bool) -> Iterator[Size]:
        """Yield numbers of templates from one for each SuperWeight up, for several weights.

        With shared coefficients that is the only one: more could not generate anything else.
        """
        if len(shapes) < 2:
            return
        pieces, _, turns, _ = cut_of(shapes)
        numels = list(map(math.prod, shapes))
        total, least = sum(numels), 0.0
        fixed = len(shapes) if self.shares_coefficients else 0
        turns = turns[: self._most(shapes)]
        added = (pieces[turn].numel + self._num_rows(pieces[turn]) for turn in turns)
        for number, parameters in enumerate(accumulate(added, initial=fixed)):
            if parameters > total and not above:
                return
            if number >= len(pieces) and parameters >= least:
                least = _SPACING * parameters
                yield Size(num_templates=number, template_size=max(numels))

    def refuse(self, shapes: Shapes, size: Size) -> str | None:
        """Each SuperWeight has one template at least, and not too many."""
        cut, largest = cut_of(shapes), max(map(math.prod, shapes))
        least, most = len(cut.pieces), len(cut.turns)
        if not least <= size.num_templates <= most:
            return (
                f"the weights are made of {least} SuperWeights of 1 to {MAX_TEMPLATES} templates, "
                f"so it takes {least} to {most} templates in all"
            )
        if size.template_size != largest:
            return f"template_size is {largest}, the elements of the largest weight"
        return "it has no rank of its own" if size.rank else None

    def enlarge(self, shapes: Shapes, size: Size, parameters: int) -> Size | None:
        """Add one template to the SuperWeight whose turn it is."""
        pieces, _, turns, _ = cut_of(shapes)
        if size.num_templates >= self._most(shapes):
            return None
        piece = pieces[turns[size.num_templates]]
        if piece.numel + self._num_rows(piece) > parameters:
            return None
        return replace(size, num_templates=size.num_templates + 1)

    def describe(self, shapes: Shapes, size: Size) -> Mixture:
        """Average over the elements of each weight; mixed in one way, templates count as one."""
        pieces, counts = cut_of(shapes).pieces, deal(shapes, size)
        if self.shares_coefficients:
            counts = (1,) * len(counts)
        of_each = list(zip(pieces, counts, strict=True))
        owned = sum(count * piece.numel for piece, count in of_each)
        return Mixture(
            share=owned / sum(map(math.prod, shapes)),
            templates=sum(count * piece.filled for piece, count in of_each) / len(shapes),
            parts=sum(len(piece.users) for piece in pieces) / len(shapes),
        )

    def flops(self, shapes: Shapes, size: Size) -> int:
        """Two for each template and element that is mixed; shared ones are then scaled."""
        total = sum(map(math.prod, shapes))
        flops = 2 * total * size.partial_rows + total * self.shares_coefficients
        for piece, count in zip(cut_of(shapes).pieces, deal(shapes, size), strict=True):
            flops += 2 * self._num_rows(piece) * count * piece.numel
        return flops

    def parameters(self, shapes: Shapes, size: Size) -> Mapping[str, tuple[int, ...]]:
        """``templates_p (n_p, m_p)`` and ``coefficients_p (users, n_p)`` of each SuperWeight ``p``.

        Shared coefficients are one row, and ``gain (S,)`` is trained. There is ``partial (1, r)``
        if there is a partial template.
        """
        owned: dict[str, tuple[int, ...]] = {}
        for p, (piece, n) in enumerate(zip(cut_of(shapes).pieces, deal(shapes, size), strict=True)):
            owned[f"templates_{p}"] = (n, piece.numel)
            owned[f"coefficients_{p}"] = (self._num_rows(piece), n)
        if self.shares_coefficients:
            owned["gain"] = (len(shapes),)
        return owned | mixing.partial_shapes(size)

    def buffers(self, shapes: Shapes, size: Size) -> Mapping[str, tuple[int, ...]]:
        """``gain (S,)`` if it is not trained, ``partial_coefficients`` where there is a partial."""
        constants = mixing.constant_shapes(shapes, size)
        return constants if self.shares_coefficients else {**constants, "gain": (len(shapes),)}

    def birth(
        self, shapes: Shapes, size: Size, moments: Sequence[Moments], random: torch.Generator
    ) -> dict[str, Tensor]:
        """Draw templates of the typical standard deviation, and rows that are orthonormal if few.

        Constant weights have coefficients of zero, or shared ones a gain of zero.
        """
        pieces, counts = cut_of(shapes).pieces, deal(shapes, size)
        tensors: dict[str, Tensor] = {}
        for p, (piece, count) in enumerate(zip(pieces, counts, strict=True)):
            tensors[f"templates_{p}"] = draw_normal(count, piece.numel, random)
            tensors[f"templates_{p}"] *= typical_std(moments)
            drawn = draw_rows(self._num_rows(piece), count, random)
            # All parts of a weight start with one standard deviation, also those of one template.
            tensors[f"coefficients_{p}"] = drawn.sign() if count == 1 else drawn
        tensors |= mixing.draw_partial(shapes, size, random)
        if self.shares_coefficients and size.num_partial:
            # Rows of their own would tell weights of one shape apart.
            tensors["partial_coefficients"][:] = tensors["partial_coefficients"][0].clone()
        tensors["gain"] = torch.ones(len(shapes), dtype=torch.float32, device="cpu")
        weights = self.generate(tensors, shapes, size)
        tensors["gain"], tensors["offset"] = match_moments(weights, moments)
        constants = set(constant(moments))
        if self.shares_coefficients:
            tensors["gain"][list(constants)] = 0
            return tensors
        for p, piece in enumerate(pieces):
            rows = [row for row, k in enumerate(piece.users) if k in constants]
            tensors[f"coefficients_{p}"][rows] = 0
        return tensors

    def generate(self, tensors: Tensors, shapes: Shapes, size: Size) -> tuple[Tensor, ...]:
        """Mix each SuperWeight for all its weights in one product, and join the results."""
        pieces, layouts, *_ = cut_of(shapes)
        shared, gains = self.shares_coefficients, tensors["gain"].unbind()
        blocks: list[dict[_Block, Tensor]] = [{} for _ in shapes]
        for p, piece in enumerate(pieces):
            coefficients = tensors[f"coefficients_{p}"]
            if not shared:
                gain = torch.stack([gains[k] for k in piece.users])
                coefficients = gain[:, None] * coefficients
            # Not product.mix: rows that are joined anyway need no memory of their own.
            mixed = torch.mm(coefficients, tensors[f"templates_{p}"])
            users = (0,) if shared else piece.users
            for place, rows in enumerate(_split(mixed, piece.boxes)):
                for k, row in zip(users, rows, strict=True):
                    blocks[k][p, place] = row
        if shared:
            composed = {layout: _compose(blocks[0], layout) for layout in set(layouts)}
            each = [gain * composed[layout] for gain, layout in zip(gains, layouts, strict=True)]
        else:
            each = list(map(_compose, blocks, layouts))
        weights = [weight.reshape(shape) for weight, shape in zip(each, shapes, strict=True)]
        return mixing.add_partial(weights, tensors, shapes, size)

    def _num_rows(self, piece: Piece) -> int:
        """Rows of coefficients that a SuperWeight has."""
        return 1 if self.shares_coefficients else len(piece.users)

    def _most(self, shapes: Shapes) -> int:
        """Templates beyond which further ones would be of no use.

        While one SuperWeight has fewer of them than weights, none needs more of them than weights;
        if it has more than ``MAX_TEMPLATES`` weights, that is always.
        """
        pieces, _, turns, num_useful = cut_of(shapes)
        if self.shares_coefficients:
            return len(pieces)
        is_full = all(len(piece.users) <= MAX_TEMPLATES for piece in pieces)
        return len(turns) if is_full else num_useful


def cut_of(shapes: Shapes) -> Cut:
    """Cut weights into SuperWeights."""
    return _cut(tuple(shapes))


# The compiler cannot trace a cache, and warns of it.
torch.compiler.assume_constant_result(cut_of)  # type: ignore[no-untyped-call]


def deal(shapes: Shapes, size: Size) -> tuple[int, ...]:
    """Templates of each SuperWeight.

    Each has one. Then they go round: at first, in round ``t``, to those with more than ``t``
    weights, so that none has more than weights; when all have as many, to all. The most weights
    come first, of equal ones the fewest elements.
    """
    cut = cut_of(shapes)
    counts = Counter(cut.turns[: size.num_templates])
    return tuple(counts[p] for p in range(len(cut.pieces)))


# A model has some dozens of banks, and a plan asks several times for one group of weights.
@lru_cache(maxsize=256)
def _cut(shapes: tuple[tuple[int, ...], ...]) -> Cut:
    """Cut the axes wherever a weight ends; cells that are in the same weights are one SuperWeight.

    Neighbouring cells stay one box where bands and columns remain whole. Weights of equal boxes are
    of one kind, and sets of kinds are bits.
    """
    boxes = [_box(shape) for shape in shapes]
    bit_of = {box: 1 << k for k, box in enumerate(sorted(set(boxes)))}
    along_o, along_i, along_t = (list(_intervals(ends)) for ends in zip(*bit_of, strict=True))
    bands = _merge(
        (o, _merge((i, _merge((t, x & y & z) for t, z in along_t)) for i, y in along_i))
        for o, x in along_o
    )
    found: dict[int, tuple[int, list[_Box]]] = {}  # kinds -> place of the SuperWeight, its boxes
    cells: list[_Cell] = []
    for band, (o, columns) in enumerate(bands):
        for column, (i, cells_along_t) in enumerate(columns):
            for t, kinds in cells_along_t:
                p, parts = found.setdefault(kinds, (len(found), []))
                cells.append(_Cell(kinds, band, column, (p, len(parts))))
                parts.append((o, i, t))
    weights = [(k, box, bit_of[box]) for k, box in enumerate(boxes)]
    pieces = []
    for kinds, (_, parts) in found.items():
        users = [(k, box) for k, box, bit in weights if bit & kinds]
        numel = sum(map(math.prod, parts))
        filled = sum(numel / math.prod(box) for _, box in users)
        pieces.append(Piece(tuple(k for k, _ in users), tuple(parts), numel, filled))
    layout_of = {box: _layout(cells, bit) for box, bit in bit_of.items()}
    turns, num_useful = _turns(pieces)
    return Cut(tuple(pieces), tuple(layout_of[box] for box in boxes), turns, num_useful)


class _Cell(NamedTuple):
    kinds: int
    band: int
    column: int
    block: _Block


def _box(shape: Sequence[int]) -> _Box:
    o, i = (*shape, 1, 1)[:2]
    return o, i, math.prod(shape[2:])


def _intervals(ends: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Lengths between the distinct ends, and as bits which of the ends are not before them."""
    start = 0
    for end in sorted(set(ends)):
        yield end - start, sum(1 << k for k, reached in enumerate(ends) if reached >= end)
        start = end


def _merge(cells: Iterable[tuple[int, _Content]]) -> tuple[tuple[int, _Content], ...]:
    """Join neighbours of equal content along an axis, and leave out what has none."""
    return tuple(
        (sum(length for length, _ in alike), content)
        for content, alike in groupby(cells, key=itemgetter(1))
        if content
    )


def _layout(cells: Sequence[_Cell], kind: int) -> _Layout:
    mine = (cell for cell in cells if cell.kinds & kind)
    return tuple(
        tuple(
            tuple(cell.block for cell in column)
            for _, column in groupby(band, key=lambda cell: cell.column)
        )
        for _, band in groupby(mine, key=lambda cell: cell.band)
    )


def _turns(pieces: Sequence[Piece]) -> tuple[tuple[int, ...], int]:
    """In which order SuperWeights get templates, and how many of these are useful; see ``deal``."""
    users = [min(len(piece.users), MAX_TEMPLATES) for piece in pieces]
    order = sorted(range(len(pieces)), key=lambda p: (-len(pieces[p].users), pieces[p].numel, p))
    rounds = range(1, MAX_TEMPLATES)
    useful = [p for t in rounds for p in order if users[p] > t]
    beyond = [p for t in rounds for p in order if users[p] + t <= MAX_TEMPLATES]
    return (*order, *useful, *beyond), len(order) + len(useful)


def _split(mixed: Tensor, boxes: Sequence[_Box]) -> Iterator[tuple[Tensor, ...]]:
    """Cut rows into boxes, and yield each box of all rows."""
    parts = torch.split(mixed, list(map(math.prod, boxes)), dim=1) if len(boxes) > 1 else (mixed,)
    for part, box in zip(parts, boxes, strict=True):
        yield part.reshape(-1, *box).unbind()


def _compose(blocks: Mapping[_Block, Tensor], layout: _Layout) -> Tensor:
    """Join the blocks of one weight."""
    bands = [
        _join([_join([blocks[block] for block in column], 2) for column in band], 1)
        for band in layout
    ]
    return _join(bands, 0)


def _join(parts: Sequence[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), axis)
