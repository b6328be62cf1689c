"""Fill: use what the selection leaves of the budget, to the last parameter."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from npas_fx.generators import Generator
from npas_fx.generators.generator import num_parameters, shapes_of
from npas_fx.ir import Candidate, Profile, Site, Size
from npas_fx.ir.budget import Resource
from npas_fx.propose import make_candidate
from npas_fx.rules import Rules


def fill(
    chosen: Sequence[Candidate],
    left: int,
    resource: Resource,
    *,
    rules: Rules,
    profile: Profile,
    generators: Mapping[str, Generator],
) -> tuple[Candidate, ...]:
    """Spend what is left of the budget on the chosen banks, but pinned ones; no price rises.

    Banks get longer tiles or further templates while these fit, the best price for its cost first.
    Then one bank gets a partial template of as many elements as are left. Where all weights are
    dedicated, or in pinned banks, one of them becomes a bank of its own first.

    Args:
        chosen: the selection.
        left: what it leaves of the budget, in ``resource``.
        resource: what is budgeted.
        rules: with the inventory.
        profile: that priced the candidates.
        generators: name -> generator.

    Returns:
        The banks in the order of their first sites.
    """
    pinned = {pin.sites for pin in rules.pinned}
    fixed = [bank for bank in chosen if bank.sites in pinned]
    free = [bank for bank in chosen if bank.sites not in pinned]
    sites = rules.inventory.sites
    grown = _Filler(free, left, resource, sites, rules.private, profile, generators).run()
    return tuple(sorted((*fixed, *grown), key=lambda candidate: candidate.sites))


class _Filler:
    def __init__(
        self,
        banks: list[Candidate],
        left: int,
        resource: Resource,
        sites: Sequence[Site],
        private: frozenset[int],
        profile: Profile,
        generators: Mapping[str, Generator],
    ) -> None:
        self.banks = banks
        self.left = left
        self.resource = resource
        self.sites = sites
        self.private = private
        self.profile = profile
        self.generators = generators

    def run(self) -> list[Candidate]:
        """Spend."""
        if self.left > 0 and all(bank.generator == "dedicated" for bank in self.banks):
            self._open_bank()
        self._enlarge()
        self._add_partial()
        return self.banks

    def _unit(self, bank: Candidate) -> int:
        """Cost of one parameter in the budgeted resource."""
        return self.sites[bank.sites[0]].dtype.itemsize if self.resource == "bytes" else 1

    def _shapes(self, bank: Candidate) -> tuple[tuple[int, ...], ...]:
        generator = self.generators[bank.generator]
        return shapes_of([self.sites[k] for k in bank.sites], generator)

    def _resized(self, bank: Candidate, size: Size) -> Candidate:
        generator = self.generators[bank.generator]
        return make_candidate(bank.sites, self.sites, generator, size, self.profile)

    def _open_bank(self) -> None:
        """Turn one dedicated weight into a bank: the smallest that holds what is left."""
        options = [
            (bank.parameters * self._unit(bank) < self.left, bank.parameters, index)
            for index, bank in enumerate(self.banks)
            if bank.sites[0] not in self.private and "wavg" in self.generators
        ]
        if not options:
            return
        too_small, _, index = min(options)
        if too_small:
            *_, index = max(options)
        bank = self.banks[index]
        parts = self.sites[bank.sites[0]].part_shapes
        whole = Size(num_templates=len(parts), template_size=math.prod(parts[0]))
        opened = self._resized(replace(bank, generator="wavg"), whole)
        cost = (opened.parameters - bank.parameters) * self._unit(bank)
        if cost <= self.left:
            self.banks[index] = opened
            self.left -= cost

    def _grow(self, index: int) -> tuple[float, Candidate, int] | None:
        """The next larger size of a bank that fits: its price for its cost, itself, its cost."""
        bank, unit = self.banks[index], self._unit(self.banks[index])
        generator, shapes = self.generators[bank.generator], self._shapes(bank)
        size = generator.enlarge(shapes, bank.size, self.left // unit)
        if size is None:
            return None
        grown = self._resized(bank, size)
        cost = (grown.parameters - bank.parameters) * unit
        # Longer tiles are fewer, and fewer coefficients may even save more than they cost.
        return (grown.price - bank.price) / max(cost, 1e-3), grown, cost

    def _enlarge(self) -> None:
        """Make banks larger while that fits, the best price for its cost first."""
        heap = [(-math.inf, index) for index in range(len(self.banks))]
        while heap:
            _, index = heapq.heappop(heap)
            step = self._grow(index)
            if step is None:
                continue
            worth, grown, cost = step
            if heap and worth > heap[0][0]:
                heapq.heappush(heap, (worth, index))  # others first, by what they are worth now
                continue
            if grown.price > self.banks[index].price:
                continue
            self.banks[index] = grown
            self.left -= cost
            heapq.heappush(heap, (-math.inf, index))

    def _add_partial(self) -> None:
        """Give what is left to the bank in which it costs the least time, then what remains."""
        mixing = [
            (bank.size.num_templates * bank.size.template_size, index)
            for index, bank in enumerate(self.banks)
            if bank.generator != "dedicated"
        ]
        for _, index in sorted(mixing):
            bank = self.banks[index]
            elements = self.left // self._unit(bank)
            if elements < 1:
                continue
            size = replace(bank.size, num_partial=elements)
            generator, shapes = self.generators[bank.generator], self._shapes(bank)
            if generator.refuse(shapes, size):
                continue
            parameters = num_parameters(generator, shapes, size)
            self.left -= (parameters - bank.parameters) * self._unit(bank)
            itemsize = self.sites[bank.sites[0]].dtype.itemsize
            self.banks[index] = replace(
                bank, size=size, parameters=parameters, bytes=parameters * itemsize
            )
