"""The paper's ways to make a weight from a vector that is smaller; kept for comparison."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from npas_fx.generators.birth import draw_normal, draw_rows
from npas_fx.ir.matrix import as_matrix

# Elements after which a mask begins again; 9 in the reference: the taps of a 3 x 3 kernel.
MASK_LENGTH = 9
# Images of as many elements as a vector are looked for among so many numbers of rows on either side
# of the best proportions, or a quarter of these.
_ROWS_NEARBY = 8


class Rule(Protocol):
    """How a vector of ``P`` elements becomes a weight of ``n > P``; linear in the vector.

    Attributes:
        name: of the rule.
        learned: name of what the bank owns for it, a matrix with rows for each weight; "" if none.
        flops: multiplications and additions for each element.
    """

    name: str
    learned: str
    flops: int

    def learned_shape(self, numel: int, length: int) -> tuple[int, int]:
        """Shape of what a weight of ``numel`` elements learns beside ``length`` of a vector."""

    def draw(self, rows: int, columns: int, random: torch.Generator) -> Tensor:
        """Draw what is learned, so that an element of a weight varies as one of the vector."""

    def stretch(self, small: Tensor, shape: tuple[int, ...], learned: Tensor) -> Tensor:
        """Make a weight from ``small``, ``(P,)``."""

    def num_read(self, shape: tuple[int, ...], length: int) -> int:
        """Count the elements of the vector that a weight reads: the first ones."""

    def rank(self, shape: tuple[int, ...], length: int) -> int:
        """Find the highest rank that a weight can have, as a matrix; see ``as_matrix``."""


class _ReadsAll:
    """What rules have in common that read all of the vector and learn nothing."""

    learned = ""
    flops = 0

    def learned_shape(self, numel: int, length: int) -> tuple[int, int]:
        return 0, 0

    def draw(self, rows: int, columns: int, random: torch.Generator) -> Tensor:
        return draw_normal(rows, columns, random)

    def num_read(self, shape: tuple[int, ...], length: int) -> int:
        return length


class _Bilinear(_ReadsAll):
    """The vector is a small image of about the weight's proportions, and is interpolated.

    The rank is at most the smaller side of the image. Elements beyond the image are not read.
    """

    name = "bilinear"
    flops = 7

    def stretch(self, small: Tensor, shape: tuple[int, ...], learned: Tensor) -> Tensor:
        rows, columns = small_image(shape, len(small))
        image = small[: rows * columns].view(1, 1, rows, columns)
        large = functional.interpolate(
            image, as_matrix(shape), mode="bilinear", align_corners=False
        )
        return large.reshape(shape)

    def num_read(self, shape: tuple[int, ...], length: int) -> int:
        return math.prod(small_image(shape, length))

    def rank(self, shape: tuple[int, ...], length: int) -> int:
        return min(small_image(shape, length))


class _Repeat(_ReadsAll):
    """The vector is repeated; the last copy is cut off.

    Rows that start at the same place of the vector are copies: ``P / gcd(c, P)`` rows of ``c``
    elements differ.
    """

    name = "repeat"

    def stretch(self, small: Tensor, shape: tuple[int, ...], learned: Tensor) -> Tensor:
        return _repeat(small, shape)

    def rank(self, shape: tuple[int, ...], length: int) -> int:
        rows, columns = as_matrix(shape)
        return min(rows, columns, length // math.gcd(columns, length))


class _Slide(_ReadsAll):
    """Windows as long as the vector slide over it, from its end to its start again.

    The stride is an eighth of the vector, or a little more so that it has no divisor in common with
    its length: so no two of the first ``P`` windows are the same.
    """

    name = "slide"

    def stretch(self, small: Tensor, shape: tuple[int, ...], learned: Tensor) -> Tensor:
        numel, length = math.prod(shape), len(small)
        stride, windows = self.stride(length), _ceil(numel, length)
        covered = (windows - 1) * stride + length
        circle = small.repeat(_ceil(covered, length))[:covered]
        return circle.unfold(0, length, stride).reshape(-1)[:numel].view(shape)

    def rank(self, shape: tuple[int, ...], length: int) -> int:
        rows, columns = as_matrix(shape)
        if columns % length:
            return min(rows, columns)
        # Rows of whole windows are copies of one another where they start with the same window.
        return min(rows, length // math.gcd(columns // length, length))

    @staticmethod
    def stride(length: int) -> int:
        """From one window to the next."""
        stride = max(1, length // 8)
        while math.gcd(stride, length) > 1:
            stride += 1
        return stride


class _Mask(_ReadsAll):
    """The vector is repeated, and each copy but the first multiplied by a mask of its own.

    A mask is ``b`` numbers, used over and over. A last copy that is shorter than a mask uses that
    of the copy before, since else some of its numbers would do nothing.
    """

    name = "mask"
    learned = "masks"
    flops = 1

    def learned_shape(self, numel: int, length: int) -> tuple[int, int]:
        block = min(MASK_LENGTH, length)
        return (numel - block) // length, block

    def stretch(self, small: Tensor, shape: tuple[int, ...], learned: Tensor) -> Tensor:
        if not len(learned):
            return _repeat(small, shape)
        length, (masks, block) = len(small), learned.shape
        blocks = functional.pad(small, (0, -length % block)).view(-1, block)
        copies = (learned[:, None] * blocks).flatten(1)[:, :length]
        missing = max(0, math.prod(shape) - (1 + masks) * length)
        flat = torch.cat([small, copies.flatten(), copies[-1, :missing]])
        return flat[: math.prod(shape)].view(shape)

    def rank(self, shape: tuple[int, ...], length: int) -> int:
        return _rank_of_chunks(shape, length, min(MASK_LENGTH, length))


class _Upsample(_ReadsAll):
    """The weight is cut into chunks of half the vector, each of them a mix of its two halves.

    The halves of a vector of odd length have its middle element in common.
    """

    name = "upsample"
    learned = "mixtures"
    flops = 3

    def learned_shape(self, numel: int, length: int) -> tuple[int, int]:
        return _ceil(numel, _ceil(length, 2)), 2

    def draw(self, rows: int, columns: int, random: torch.Generator) -> Tensor:
        return draw_rows(rows, columns, random)

    def stretch(self, small: Tensor, shape: tuple[int, ...], learned: Tensor) -> Tensor:
        half = _ceil(len(small), 2)
        halves = torch.stack([small[:half], small[-half:]])
        return torch.mm(learned, halves).view(-1)[: math.prod(shape)].view(shape)

    def rank(self, shape: tuple[int, ...], length: int) -> int:
        return _rank_of_chunks(shape, _ceil(length, 2), 2)


RULES: tuple[Rule, ...] = (_Bilinear(), _Repeat(), _Mask(), _Slide(), _Upsample())


def small_image(shape: tuple[int, ...], length: int) -> tuple[int, int]:
    """Rows and columns of an image of at most ``length`` elements, for a weight that has more.

    It has about the proportions of the weight, and of the images near to these the most elements.
    """
    rows, columns = as_matrix(shape)
    wanted = math.sqrt(length * rows / columns)
    centre = min(max(1, round(wanted)), length)
    nearby = min(max(1, centre // 4), _ROWS_NEARBY)
    options = range(max(1, centre - nearby), min(rows, length, centre + nearby) + 1)
    most, best = (0, 0.0), (1, 1)
    for option in options:
        image = option, min(columns, length // option)
        worth = math.prod(image), -abs(math.log(option / wanted))
        if worth > most:
            most, best = worth, image
    return best


def _rank_of_chunks(shape: tuple[int, ...], length: int, dimensions: int) -> int:
    """The highest rank of a weight whose chunks of ``length`` lie in so many dimensions each.

    A row of ``c`` elements that starts ``p`` behind the start of a chunk reaches into
    ``ceil((p + c) / length)`` of them; summed over all ``p`` that occur.
    """
    rows, columns = as_matrix(shape)
    common = math.gcd(columns, length)
    return min(rows, columns, dimensions * ((columns + length) // common - 1))


def _repeat(small: Tensor, shape: tuple[int, ...]) -> Tensor:
    numel = math.prod(shape)
    return small.repeat(_ceil(numel, len(small)))[:numel].view(shape)


def _ceil(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
