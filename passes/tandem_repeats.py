"""Stretches of a sequence that are the same again, one after the other."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Tandem:
    """A stretch ``[start, stop)`` in which each item equals that ``period`` places later.

    It holds ``(stop - start) // period`` copies, and may go on with a part of one more.
    """

    start: int
    stop: int
    period: int

    @property
    def count(self) -> int:
        """Number of whole copies."""
        return (self.stop - self.start) // self.period


def find_tandem_repeats(items: Sequence[Hashable]) -> list[Tandem]:
    """Find stretches of two copies or more that do not overlap, those with the most items first.

    Of several periods with as many items in whole copies the shortest is taken. Time grows with
    the square of the number of items.
    """
    number = {item: k for k, item in enumerate(dict.fromkeys(items))}
    labels = np.array([number[item] for item in items])
    found = []
    for period in range(1, len(labels) // 2 + 1):
        is_same = np.concatenate([[False], labels[:-period] == labels[period:], [False]])
        edges = np.flatnonzero(np.diff(is_same))
        for first, last in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            if last - first >= period:
                found.append(Tandem(start=first, stop=last + period, period=period))
    found.sort(key=lambda tandem: (-tandem.count * tandem.period, tandem.period, tandem.start))
    chosen: list[Tandem] = []
    is_free = np.ones(len(labels), dtype=bool)
    for tandem in found:
        if is_free[tandem.start : tandem.stop].all():
            is_free[tandem.start : tandem.stop] = False
            chosen.append(tandem)
    return chosen
