"""The size of a bank: how many templates, how long, and how far the last one reaches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The size of a bank.

    The flattened weight of a site is cut into tiles of ``template_size`` elements (the last may be
    shorter); a bank has one row for each tile of each of its sites.

    Attributes:
        num_templates: templates that are mixed with trainable coefficients.
        template_size: elements of one template, and of one tile.
        num_partial: elements of the partial template, whose coefficients are constants; more than
            ``template_size`` of them go on in a further row.
        rank: of the matrix that each weight owns beside the templates, where the generator has one.
    """

    num_templates: int
    template_size: int
    num_partial: int = 0
    rank: int = 0

    def tiles(self, numel: int) -> int:
        """Number of tiles that a weight of ``numel`` elements is cut into."""
        return math.ceil(numel / self.template_size)

    def rows(self, numels: Sequence[int]) -> int:
        """Number of tiles of all sites together."""
        return sum(self.tiles(numel) for numel in numels)

    @property
    def partial_rows(self) -> int:
        """Rows that the partial template takes up."""
        return math.ceil(self.num_partial / self.template_size)
