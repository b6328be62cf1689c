"""``basis``: weights are coefficients of their own times a low-rank basis that they share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from npas_fx.generators import mixing
from npas_fx.generators.generator import Shapes, Tensors, num_parameters
from npas_fx.generators.wavg import WeightedAverage
from npas_fx.ir import Mixture, Size
from npas_fx.ir.matrix import as_matrix

# Ranks that are proposed differ by this factor.
_SPACING = 1.3


class Basis(WeightedAverage):
    """``W_i = offset_i + gain_i * C_i B``, or ``(C_i B)^T``, for matrices that share a dimension.

    That is ``wavg`` with tiles that are rows, or columns. A weight is a matrix with a row for each
    output; if all have as many columns, each row is a mix of the ``r`` rows of ``B``,
    ``(r, columns)``; if all have as many rows, each column is one, of ``B``, ``(r, rows)``. So no
    weight has a rank above ``r``. The coefficients ``C_i`` are all that a weight owns, and of one
    weight by itself this is a product of two factors. In a size, ``num_templates`` is ``r`` and
    ``template_size`` the dimension that is shared.

    Source: Wang et al., Basis Sharing; there an SVD of trained weights finds basis and
    coefficients. Drawing them, to be trained from scratch, is ours.
    """

    name = "basis"

    def propose(self, shapes: Shapes, *, above: bool) -> Iterator[Size]:
        """Yield ranks from 1 to what costs as much as the weights; more could not be of use."""
        if any(1 in as_matrix(shape) for shape in shapes):
            return
        dimensions = _shared_dimensions(shapes)
        if len(shapes) == 1:  # both ways are one: C B = (B^T C^T)^T
            dimensions = dimensions[:1]
        for dimension in dimensions:
            for rank in spread(_most_rank(shapes, dimension), _SPACING):
                yield Size(num_templates=rank, template_size=dimension)

    def refuse(self, shapes: Shapes, size: Size) -> str | None:
        """Templates are as long as a dimension that the weights share, and no more than that."""
        dimensions = _shared_dimensions(shapes)
        if not dimensions:
            matrices = ", ".join(f"{rows} x {columns}" for rows, columns in map(as_matrix, shapes))
            return f"as matrices, its weights agree in rows or in columns; {matrices} do not"
        if size.template_size not in dimensions:
            allowed = " or ".join(map(str, dimensions))
            return f"template_size is {allowed}, the rows or columns that all weights have"
        if not 1 <= size.num_templates <= size.template_size:
            return f"it takes 1 to {size.template_size} templates, a rank that the weights can have"
        return "its rank is num_templates, so rank is 0" if size.rank else None

    def enlarge(self, shapes: Shapes, size: Size, parameters: int) -> Size | None:
        """Raise the rank by a twentieth or what is affordable, up to what costs all weights."""
        affordable = parameters // (size.template_size + mixing.num_rows(shapes, size))
        room = _most_rank(shapes, size.template_size) - size.num_templates
        more = min(max(1, size.num_templates // 20), affordable, room)
        return replace(size, num_templates=size.num_templates + more) if more > 0 else None

    def describe(self, shapes: Shapes, size: Size) -> Mixture:
        """Whole weights of the rank of the basis; coefficients count, for they are many."""
        return Mixture(
            share=num_parameters(self, shapes, size) / sum(map(math.prod, shapes)),
            templates=size.num_templates,
            parts=1,
            rank=size.num_templates + size.partial_rows,
        )

    def generate(self, tensors: Tensors, shapes: Shapes, size: Size) -> tuple[Tensor, ...]:
        """Mix all rows, or all columns, in one product."""
        if all(as_matrix(shape)[1] == size.template_size for shape in shapes):
            return mixing.mix_sites(tensors, shapes, size)
        transposed = mixing.mix_sites(tensors, [as_matrix(shape)[::-1] for shape in shapes], size)
        return tuple(
            matrix.t().contiguous().view(shape)
            for matrix, shape in zip(transposed, shapes, strict=True)
        )


def spread(most: int, factor: float) -> Iterator[int]:
    """Yield numbers from 1 up to ``most`` at most that differ by this factor, or by 1."""
    number = 1
    while number <= most:
        yield number
        number = max(number + 1, round(factor * number))


def _shared_dimensions(shapes: Shapes) -> tuple[int, ...]:
    """The columns and the rows that all weights have; once, if they are as many."""
    rows, columns = map(set, zip(*map(as_matrix, shapes), strict=True))
    return tuple(dict.fromkeys(min(each) for each in (columns, rows) if len(each) == 1))


def _most_rank(shapes: Shapes, dimension: int) -> int:
    """Up to which rank the bank has no more parameters than the weights; it is below the full."""
    total = sum(map(math.prod, shapes))
    return total // (total // dimension + dimension)
