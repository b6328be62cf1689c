"""``structure``: prices from shapes, roles and depth alone, for want of better evidence."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from npas_fx.ir import Inventory, Mixture
from npas_fx.ir.matrix import as_matrix

_Array = npt.NDArray[np.float64]

# How much a weight of each role matters, next to one of any other. Where each factor comes from and
# what would change it: docs/decisions/0007-factors-of-roles.md.
ROLE_FACTORS = {
    "stem": 4.0,
    "head": 4.0,
    "embedding": 4.0,
    "residual_writer": 1.25,
    "residual_reader": 1.0,
    "parallel_projection": 1.0,
    "shortcut": 1.0,
    "depthwise": 1.0,
    "other": 1.0,
}
# How unlike the ideal weights of two sites at one depth are taken to be: a sum over what tells them
# apart. Where these numbers and those of Assumptions come from, and how little that is:
# docs/decisions/0004-prices-from-structure.md.
UNLIKE = {"place": 0.5, "role": 0.3, "kind": 0.2}
# What doubling a bank beyond the size of its weights is worth; so little that no weights are
# shared to make room for it.
EXCESS = 5e-4
# Prices are multiples of this, so that their sums are exact in floating point.
RESOLUTION = 2.0**-32


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What prices from structure rest on; each can be another to see what it is worth.

    Attributes:
        role_factors: role -> how much a weight of it matters.
        unlike: what may tell two sites apart -> how unlike it makes them.
        growth: a weight matters as the power of its size with this exponent.
        reuse: price of using each parameter ``e`` times.
        rank: price of a weight whose rank is 1 where its shape allows any number.
        flat: added where the generator itself limits the rank, to hardly any of what the shape
            allows.
        depth: price of a bank for weights at the input and at the output.
        mixed: price of unlike weights in one bank.
        parts: price of weights that are cut into many parts.
        alone: added to the prices of distance in depth and of unlike weights where these differ by
            a factor only.
    """

    role_factors: Mapping[str, float] = field(default_factory=lambda: ROLE_FACTORS)
    unlike: Mapping[str, float] = field(default_factory=lambda: UNLIKE)
    growth: float = 0.5
    reuse: float = 0.01
    rank: float = 0.7
    flat: float = 0.12
    depth: float = 0.04
    mixed: float = 0.06
    parts: float = 0.04
    alone: float = 0.2


class _Bank(NamedTuple):
    """What all sizes of a bank for some sites have in common."""

    importance: float
    far: float
    unlike: float
    numel: int
    # Less the elements of each site, the largest first. Then, summed over the first so many sites:
    # importance over the root of the full rank, and that times the root of the elements.
    less_elements: Sequence[float]
    lost: Sequence[float]
    lost_roots: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class StructureProfile:
    """Prices by what sharing takes from a weight: parameters, likeness to those beside it, rank.

    A bank that owns ``share`` of the parameters of its sites, ``P`` in number, costs::

        sum_i e_i * (reuse * ln(1 / share)
                     + rank * (1 / sqrt(r_i) - 1 / sqrt(R_i)) + flat * (1 - r_i / R_i)
                     + (1 - share) * (depth * d_i + mixed * u_i + parts * (1 - 1 / q)
                                      + alone / (q * k)**2 * (d_i + u_i)))

    with the importance ``e`` of the sites (in all summing to 1); the ranks that the weight can
    have, ``R_i`` by its shape, and ``r_i``, as many times less as ``P`` is smaller than it, or as
    the generator allows it (``flat`` is 0 unless it sets such a limit); how far ``i`` is from the
    sites of the bank in depth, ``d_i``, and how unlike them, ``u_i``, means weighted by their
    importance; and ``q`` parts of a weight that are mixed from ``k`` templates.

    Attributes:
        importance: ``(S,)``.
        depth: ``(S,)``, 0 at the input, 1 at the output.
        classes: what may tell two sites apart -> ``(S,)``, equal numbers where it does not.
        numel: ``(S,)``, elements.
        full_rank: ``(S,)``, of matrices with a row for each output.
    """

    importance: _Array
    depth: _Array
    classes: Mapping[str, npt.NDArray[np.int64]]
    numel: npt.NDArray[np.int64]
    full_rank: npt.NDArray[np.int64]
    assumptions: Assumptions = field(default_factory=Assumptions)

    @property
    def name(self) -> str:
        """With what is known of it: docs/decisions/0004-prices-from-structure.md."""
        return "structure (a guess: it told good plans from bad for one of two networks)"

    @cached_property
    def distance(self) -> _Array:
        """``(S, S)``, in depth and in all else."""
        distance: _Array = np.abs(self.depth[:, None] - self.depth)
        for what, classes in self.classes.items():
            distance += self.assumptions.unlike[what] * (classes[:, None] != classes)
        return distance

    @cached_property
    def _total(self) -> int:
        return int(self.numel.sum())

    @cached_property
    def _banks(self) -> dict[tuple[int, ...], _Bank]:
        return {}

    def price(self, sites: Sequence[int], mixture: Mixture) -> float:
        """Price of a bank; see ``Profile.price``."""
        bank, assumed = self._describe(tuple(sites)), self.assumptions
        share, templates, parts, rank = mixture
        if share > 1:
            # Generating a weight costs time whatever the excess: rather two templates for half of
            # the weights than a few more for all, and rather small banks than large ones. An
            # element is worth the same in all of them.
            part = bank.numel / self._total
            worth = math.log2(share) if share > 2 else (share - 1) ** 2
            return _round(-EXCESS * part * worth * (1 - 1e-3 * min(len(sites), 100)))
        owned = share * bank.numel
        larger = bisect_left(bank.less_elements, -owned)  # this many sites are
        lost = bank.lost_roots[larger] / math.sqrt(owned) - bank.lost[larger]
        flat = 0.0
        if rank is not None:
            importance, full = self.importance[np.array(sites)], self.full_rank[np.array(sites)]
            allowed = np.minimum(rank, full)
            lost = max(lost, float(importance @ (allowed**-0.5 - full**-0.5)))
            flat = float(importance @ (1 - allowed / full))
        alone = assumed.alone / (templates * parts) ** 2
        apart = (
            (assumed.depth + alone) * bank.far
            + (assumed.mixed + alone) * bank.unlike
            + assumed.parts * (1 - 1 / parts) * bank.importance
        )
        reuse = assumed.reuse * -math.log(share) * bank.importance
        return _round(reuse + assumed.rank * lost + assumed.flat * flat + (1 - share) * apart)

    def _describe(self, sites: tuple[int, ...]) -> _Bank:
        if sites not in self._banks:
            chosen = np.array(sites)
            importance = self.importance[chosen]
            total = float(importance.sum())
            order = np.argsort(-self.numel[chosen], kind="stable")
            elements = self.numel[chosen][order].astype(np.float64)
            lost = (importance / np.sqrt(self.full_rank[chosen]))[order]
            self._banks[sites] = _Bank(
                importance=total,
                far=_mean_distance(self.depth[chosen], importance),
                unlike=sum(
                    self.assumptions.unlike[what] * _mean_difference(classes[chosen], importance)
                    for what, classes in self.classes.items()
                ),
                numel=int(self.numel[chosen].sum()),
                less_elements=(-elements).tolist(),
                lost=[0.0, *np.cumsum(lost).tolist()],
                lost_roots=[0.0, *np.cumsum(lost * np.sqrt(elements)).tolist()],
            )
        return self._banks[sites]


def profile_structure(
    inventory: Inventory, assumptions: Assumptions | None = None
) -> StructureProfile:
    """Profile an inventory from the shapes, roles and depth of its sites."""
    assumptions = Assumptions() if assumptions is None else assumptions
    sites, factors = inventory.sites, assumptions.role_factors
    matters = np.array([factors[s.role] * s.numel**assumptions.growth for s in sites], float)
    places = inventory.places()
    apart: Mapping[str, Sequence[Hashable]] = {
        "place": [places.get(site.name, site.name) for site in sites],
        "role": [site.role for site in sites],
        "kind": [site.kind for site in sites],
    }
    classes = {}
    for what, values in apart.items():
        number = {value: index for index, value in enumerate(dict.fromkeys(values))}
        classes[what] = np.array([number[value] for value in values], np.int64)
    return StructureProfile(
        importance=matters / max(matters.sum(), 1e-300),
        depth=np.array([site.depth for site in sites], float),
        classes=classes,
        numel=np.array([site.numel for site in sites], np.int64),
        full_rank=np.array([min(as_matrix(site.shape)) for site in sites], np.int64),
        assumptions=assumptions,
    )


def _mean_distance(depth: _Array, importance: _Array) -> float:
    """``sum_ij e_i e_j |depth_i - depth_j| / sum_i e_i``, without all pairs."""
    order = np.argsort(depth)
    depth, importance = depth[order], importance[order]
    before = np.cumsum(importance) - importance
    passed = np.cumsum(importance * depth) - importance * depth
    return float(2 * importance @ (depth * before - passed) / importance.sum())


def _mean_difference(classes: npt.NDArray[np.int64], importance: _Array) -> float:
    """``sum_ij e_i e_j [class_i != class_j] / sum_i e_i``, without all pairs."""
    total = importance.sum()
    same = np.bincount(classes, weights=importance)
    return float(same @ (total - same) / total)


def _round(price: float) -> float:
    steps = round(price / RESOLUTION) or (1 if price > 0 else -1)  # never as good as dedicated
    return steps * RESOLUTION
