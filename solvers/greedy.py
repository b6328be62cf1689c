"""A plan by steps that each look best: quick, and where the exact search starts."""

from __future__ import annotations

import time
from collections.abc import Iterable
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from npas_fx.solvers.cheapest import find_floor
from npas_fx.solvers.dominance import undominated
from npas_fx.solvers.problem import (
    PlanningProblem,
    Selection,
    certify,
    certify_infeasible,
    restrict,
    total_price,
)

# A step must lower the price by this much of the largest price, or sums of floats might circle.
MIN_DECREASE = 1e-12


def select(problem: PlanningProblem) -> Selection:
    """Solve the planning problem approximately; whether it can be solved is decided exactly."""
    start = time.perf_counter()
    kept = undominated(problem)
    reduced = restrict(problem, kept)
    floor = find_floor(reduced)
    if floor.cover is None:
        return certify_infeasible(
            problem, smallest=floor.smallest, seconds=time.perf_counter() - start
        )
    chosen = tuple(kept[k] for k in plan(reduced, floor.cover))
    return certify(
        problem,
        chosen,
        _price_per_site(reduced),
        is_proven=False,
        smallest=floor.smallest,
        cheapest_price=floor.cheapest_price,
        seconds=time.perf_counter() - start,
    )


def plan(problem: PlanningProblem, cover: tuple[int, ...]) -> tuple[int, ...]:
    """Shrink the best-priced singles until they fit, then spend what is left; or grow a cover.

    A step puts one candidate in place of all banks that it touches; sites of those that it does
    not cover itself return to their best-priced single. Shrinking takes the step with the least
    price increase for what it saves, growing the one with the largest price decrease for what it
    costs.

    Args:
        problem: Best without dominated candidates.
        cover: A cover within the budgets.

    Returns:
        The best of both walks and ``cover``.
    """
    if not problem.num_sites:
        return ()
    steps = _Steps(problem)
    plans = [cover, steps.grow(cover)]
    shrunk = steps.shrink()
    if shrunk is not None:
        plans.append(steps.grow(shrunk))
    return min(plans, key=lambda chosen: (total_price(problem, chosen), chosen))


def _price_per_site(problem: PlanningProblem) -> float:
    """Bound the price: ``sum_i min_{c covers i} price_c / |c|``, exactly, rounded once.

    A price is the sum of its sites' shares, and no site has a lower share than its least. Both
    this and a total price are rounded once, which keeps their order.
    """
    share: list[Fraction | None] = [None] * problem.num_sites
    for sites, price in zip(problem.members, problem.price, strict=True):
        candidate_share = Fraction(price) / len(sites)
        for i in sites:
            least = share[i]
            if least is None or candidate_share < least:
                share[i] = candidate_share
    return float(sum((least for least in share if least is not None), Fraction(0)))


class _Steps:
    """Candidates as arrays, and the walk over covers.

    Putting candidate ``c`` in place of the banks that it touches changes what is taken by ::

        cost_c - sum_{i in c} single_i + touched_c
        where touched_c = sum_{banks b that share a site with c} (sum_{i in b} single_i - cost_b)

    so ``touched``, kept up to date, gives the change of every possible step at once; the same
    holds for the price.

    A site without a single gets a stand-in that takes one of a further resource, of which there
    is none: a plan that fits has no stand-in left.
    """

    def __init__(self, problem: PlanningProblem) -> None:
        bare = sorted(
            set(range(problem.num_sites)).difference(*(s for s in problem.members if len(s) == 1))
        )
        self.members = problem.members + tuple((i,) for i in bare)
        self.price = np.array(problem.price + (0.0,) * len(bare))
        # (R, C), (R,): what candidates take of each resource, and what there is. A stand-in takes
        # the largest share in a candidate that could replace it, so replacing it saves.
        rows = [cost + _largest_shares(problem, cost, bare) for cost in problem.cost.values()]
        rows.append((0,) * len(problem.members) + (1,) * len(bare))
        self.cost = np.array(rows, dtype=np.int64)
        self.budget = np.array(
            [min(problem.budget[r], sum(problem.cost[r])) for r in problem.cost] + [0],
            dtype=np.int64,
        )
        # Resources compare by their share of the budget.
        self.unit = np.maximum(self.budget, 1).astype(np.float64)[:, None]
        self.tolerance = MIN_DECREASE * float(np.abs(self.price).max(initial=0.0))

        lengths = [len(sites) for sites in self.members]
        flat = np.array([i for sites in self.members for i in sites], dtype=np.int64)
        by_site = np.repeat(np.arange(len(lengths)), lengths)[np.argsort(flat, kind="stable")]
        ends = np.cumsum(np.bincount(flat, minlength=problem.num_sites))
        self.candidates_of: list[NDArray[np.int64]] = np.split(by_site, ends[:-1])

        single_of: dict[int, int] = {}
        for c, sites in enumerate(self.members):
            if len(sites) == 1:
                d = single_of.setdefault(sites[0], c)
                if self._rank(c) < self._rank(d):
                    single_of[sites[0]] = c
        self.singles = tuple(single_of[i] for i in range(problem.num_sites))
        singles = np.array(self.singles, dtype=np.int64)
        first = np.cumsum([0, *lengths[:-1]])
        # (C,), (R, C): what singles in place of each candidate change.
        self.split_price = np.add.reduceat(self.price[singles][flat], first) - self.price
        self.split_cost = np.add.reduceat(self.cost[:, singles][:, flat], first, axis=1) - self.cost

    def _rank(self, c: int) -> tuple[float, tuple[int, ...]]:
        return float(self.price[c]), tuple(self.cost[:, c].tolist())

    def shrink(self) -> tuple[int, ...] | None:
        """Walk from the best-priced singles into the budgets; None when stuck on the way."""
        walk = _Walk(self, self.singles)
        while (overuse := np.maximum(walk.used - self.budget, 0)[:, None]).any():
            price, cost = walk.changes()
            after = np.maximum(overuse + np.where(overuse > 0, cost, 0), 0)
            room = (self.budget - walk.used)[:, None]
            no_worse = np.where(overuse > 0, cost <= 0, cost <= room).all(axis=0)
            saved = ((overuse - after) / self.unit).sum(axis=0)
            open_ = np.flatnonzero(no_worse & (after < overuse).any(axis=0) & (saved > 0))
            if not len(open_):
                return None
            walk.put(int(open_[np.argmin(price[open_] / saved[open_])]))
        return walk.chosen()

    def grow(self, cover: Iterable[int]) -> tuple[int, ...]:
        """Walk from a cover within the budgets to lower prices, until no step fits."""
        walk = _Walk(self, cover)
        while True:
            price, cost = walk.changes()
            room = (self.budget - walk.used)[:, None]
            open_ = np.flatnonzero((cost <= room).all(axis=0) & (price < -self.tolerance))
            if not len(open_):
                return walk.chosen()
            spent = (np.maximum(cost[:, open_], 0) / self.unit).sum(axis=0)
            walk.put(int(open_[np.argmin(price[open_] / np.maximum(spent, MIN_DECREASE))]))


class _Walk:
    """A cover on its way, with ``touched`` kept up to date."""

    def __init__(self, steps: _Steps, cover: Iterable[int]) -> None:
        self.steps = steps
        self.bank_of = [-1] * len(steps.candidates_of)
        self.used = np.zeros(len(steps.cost), dtype=np.int64)
        self.touched_price = np.zeros_like(steps.price)
        self.touched_cost = np.zeros_like(steps.cost)
        for bank in cover:
            self._add(bank)

    def chosen(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.bank_of)))

    def changes(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return what putting each candidate in would change: price ``(C,)``, cost ``(R, C)``."""
        return (
            self.touched_price - self.steps.split_price,
            self.touched_cost - self.steps.split_cost,
        )

    def put(self, candidate: int) -> None:
        """Replace the banks that the candidate touches by it, and by singles beside it."""
        sites = self.steps.members[candidate]
        banks = sorted({self.bank_of[i] for i in sites})
        beside = sorted({i for bank in banks for i in self.steps.members[bank]}.difference(sites))
        for bank in banks:
            self._count(bank, -1)
        self._add(candidate)
        for i in beside:
            self._add(self.steps.singles[i])

    def _add(self, bank: int) -> None:
        for i in self.steps.members[bank]:
            self.bank_of[i] = bank
        self._count(bank, 1)

    def _count(self, bank: int, sign: int) -> None:
        steps = self.steps
        touches = np.zeros(len(steps.members), dtype=bool)
        for i in steps.members[bank]:
            touches[steps.candidates_of[i]] = True
        self.touched_price[touches] += sign * steps.split_price[bank]
        self.touched_cost[:, touches] += sign * steps.split_cost[:, bank][:, None]
        self.used += sign * steps.cost[:, bank]


def _largest_shares(
    problem: PlanningProblem, cost: tuple[int, ...], sites: Iterable[int]
) -> tuple[int, ...]:
    """Return, for each of these sites, the most that it takes of ``cost`` in a candidate."""
    sites = tuple(sites)
    if not sites:
        return ()
    share = [0] * problem.num_sites
    for members, cost_c in zip(problem.members, cost, strict=True):
        for i in members:
            share[i] = max(share[i], -(-cost_c // len(members)))
    return tuple(share[i] for i in sites)
