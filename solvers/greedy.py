"""A plan by steps that each look best: quick, and where the exact search starts."""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from npas_fx.solvers.certify import certify, certify_infeasible
from npas_fx.solvers.exact_cover import CoverProgram
from npas_fx.solvers.floor import find_cover
from npas_fx.solvers.integer_prices import to_integers
from npas_fx.solvers.problem import PlanningProblem
from npas_fx.solvers.reduce import Reduced, reduce
from npas_fx.solvers.relaxation import MULTIPLIER_BITS, Multipliers, bound_by
from npas_fx.solvers.selection import Selection

# A step must lower the price by this much of the largest price, or sums of floats might circle.
MIN_DECREASE = 1e-12
# One step is taken at a time for so many sites: the best ones that have no bank in common. Then all
# are compared anew.
SITES_A_STEP = 64


def select(problem: PlanningProblem) -> Selection:
    """Solve the planning problem approximately; whether it can be solved is decided exactly."""
    start = time.perf_counter()
    reduced = reduce(problem)
    chosen = plan(reduced)
    if chosen is None:
        return certify_infeasible(problem, seconds=time.perf_counter() - start)
    bound = _bound_by_site(reduced)
    return certify(problem, reduced, [chosen], bound, seconds=time.perf_counter() - start)


def plan(reduced: Reduced, cover: tuple[int, ...] | None = None) -> tuple[int, ...] | None:
    """Shrink the best-priced singles until they fit, then spend what is left.

    A step puts one candidate in place of all banks that it touches; sites of those that it does
    not cover itself return to their best-priced single. Shrinking takes the step with the least
    price increase for what it saves, growing the one with the largest price decrease for what it
    costs.

    Args:
        reduced: What is asked.
        cover: A cover, perhaps beyond the budgets, to start from as well.

    Returns:
        The best plan found: the walk ends in none where it gets stuck, and then a cover within the
        budgets is searched for exactly and grown. None is proof that there is none.
    """
    if reduced.bare:
        return None
    if not reduced.num_sites:
        return ()
    steps = _Steps(reduced)
    plans = []
    for start in (steps.singles, *([] if cover is None else [cover])):
        shrunk = steps.shrink(start)
        if shrunk is not None:
            plans.append(steps.grow(shrunk))
    if not plans:
        found = find_cover(reduced)
        if found is None:
            return None
        plans.append(steps.grow(found))
    return min(plans, key=lambda chosen: (reduced.total_price(chosen), chosen))


def _bound_by_site(reduced: Reduced) -> float:
    """Bound the price: ``sum_i min_{c covers i} price_c / |c|``.

    A price is the sum of its sites' shares, and no site has a lower share than its least.
    """
    prices = to_integers(reduced.price)
    program = CoverProgram.of(reduced, prices.values)
    incidence = program.incidence
    share = (program.price.astype(object) << MULTIPLIER_BITS) // incidence.lengths
    least = np.array([0] * reduced.num_sites, object)
    if len(share):
        order = np.argsort(incidence.sites, kind="stable")
        starts = np.cumsum(np.bincount(incidence.sites, minlength=reduced.num_sites))
        least = np.minimum.reduceat(
            share[incidence.candidates()][order], np.concatenate([[0], starts[:-1]])
        )
    multipliers = Multipliers(site=least, resource={})
    return prices.to_price(bound_by(program, multipliers)[0])


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

    def __init__(self, reduced: Reduced) -> None:
        num_sites = reduced.num_sites
        lengths = reduced.incidence.lengths
        has_single = np.zeros(num_sites, bool)
        has_single[reduced.incidence.sites[reduced.incidence.starts[:-1][lengths == 1]]] = True
        bare = np.flatnonzero(~has_single).tolist()
        self.num_given = len(reduced.members)
        self.members = [
            *np.split(reduced.incidence.sites, reduced.incidence.starts[1:-1]),
            *(np.array([i]) for i in bare),
        ]
        self.price = np.array(reduced.price + (0.0,) * len(bare))
        # (R, C), (R,): what candidates take of each resource, and what there is. A stand-in takes
        # the largest share in a candidate that could replace it, so replacing it saves.
        rows = [
            np.concatenate([cost, _largest_shares(reduced, cost)[bare]])
            for cost in reduced.cost.values()
        ]
        rows.append(np.array([0] * self.num_given + [1] * len(bare), np.int64))
        self.cost = np.array(rows, dtype=np.int64)
        self.budget = np.array(
            [min(reduced.budget[r], int(cost.sum())) for r, cost in reduced.cost.items()] + [0],
            dtype=np.int64,
        )
        # Resources compare by their share of the budget.
        self.unit = np.maximum(self.budget, 1).astype(np.float64)[:, None]
        self.tolerance = MIN_DECREASE * float(np.abs(self.price).max(initial=0.0))
        self.most = max(1, num_sites // SITES_A_STEP)

        flat = np.concatenate(self.members)
        lengths = np.fromiter(map(len, self.members), np.int64, len(self.members))
        by_site = np.repeat(np.arange(len(lengths)), lengths)[np.argsort(flat, kind="stable")]
        ends = np.cumsum(np.bincount(flat, minlength=num_sites))
        self.candidates_of: list[npt.NDArray[np.int64]] = np.split(by_site, ends[:-1])

        alone = np.flatnonzero(lengths == 1)
        site = np.concatenate([self.members[c] for c in alone.tolist()])
        order = np.lexsort((alone, *self.cost[::-1, alone], self.price[alone], site))
        first = np.diff(site[order], prepend=-1) != 0
        singles = alone[order][first]  # of each site, the one with the best price
        self.singles: tuple[int, ...] = tuple(singles.tolist())
        starts = np.cumsum([0, *lengths[:-1]])
        # (C,), (R, C): what singles in place of each candidate change.
        self.split_price = np.add.reduceat(self.price[singles][flat], starts) - self.price
        self.split_cost = np.add.reduceat(self.cost[:, singles][:, flat], starts, axis=1)
        self.split_cost -= self.cost

    def shrink(self, cover: Iterable[int]) -> tuple[int, ...] | None:
        """Walk from a cover into the budgets; None when stuck on the way."""
        walk = _Walk(self, cover)
        while (overuse := np.maximum(walk.used - self.budget, 0)[:, None]).any():
            price, cost = walk.changes()
            after = np.maximum(overuse + np.where(overuse > 0, cost, 0), 0)
            room = (self.budget - walk.used)[:, None]
            no_worse = np.where(overuse > 0, cost <= 0, cost <= room).all(axis=0)
            saved = ((overuse - after) / self.unit).sum(axis=0)
            open_ = np.flatnonzero(no_worse & (after < overuse).any(axis=0) & (saved > 0))
            if not len(open_):
                return None
            walk.put_best(open_, price[open_] / saved[open_], price, cost)
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
            walk.put_best(open_, price[open_] / np.maximum(spent, MIN_DECREASE), price, cost)


class _Walk:
    """A cover on its way, with ``touched`` kept up to date."""

    def __init__(self, steps: _Steps, cover: Iterable[int]) -> None:
        self.steps = steps
        self.bank_of = np.full(len(steps.candidates_of), -1)
        self.used = np.zeros(len(steps.cost), dtype=np.int64)
        self.touched_price = np.zeros_like(steps.price)
        self.touched_cost = np.zeros_like(steps.cost)
        for bank in cover:
            self._add(bank)

    def chosen(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.bank_of.tolist())))

    def changes(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Return what putting each candidate in would change: price ``(C,)``, cost ``(R, C)``."""
        return (
            self.touched_price - self.steps.split_price,
            self.touched_cost - self.steps.split_cost,
        )

    def put_best(
        self,
        candidates: npt.NDArray[np.int64],
        score: npt.NDArray[np.float64],
        price: npt.NDArray[np.float64],
        cost: npt.NDArray[np.int64],
    ) -> None:
        """Put in those with the lowest scores that do not get in each other's way.

        Args:
            candidates: Steps that are possible now.
            score: Of each of them.
            price: ``(C,)``, what each step changes now.
            cost: ``(R, C)``, likewise.
        """
        steps = self.steps
        if steps.most == 1:
            few = np.array([score.argmin()])
        else:
            num_few = min(4 * steps.most, len(candidates))
            few = np.argpartition(score, num_few - 1)[:num_few]
        is_moved = np.zeros(len(self.bank_of), bool)
        num_put = 0
        for c in candidates[few[np.lexsort((candidates[few], score[few]))]].tolist():
            banks = np.unique(self.bank_of[steps.members[c]])
            sites = np.unique(np.concatenate([steps.members[bank] for bank in banks.tolist()]))
            over = np.maximum(self.used - steps.budget, 0)
            if num_put and (
                is_moved[sites].any()
                or (np.maximum(self.used + cost[:, c] - steps.budget, 0) > over).any()
                or (price[c] > 0 and not over.any())
            ):
                continue
            is_moved[sites] = True
            self._put(c, banks, sites)
            num_put += 1
            if num_put == steps.most:
                return

    def _put(
        self, candidate: int, banks: npt.NDArray[np.int64], sites: npt.NDArray[np.int64]
    ) -> None:
        """Replace the banks that the candidate touches by it, and by singles beside it."""
        for bank in banks.tolist():
            self._count(bank, -1)
        self._add(candidate)
        for i in np.setdiff1d(sites, self.steps.members[candidate]).tolist():
            self._add(self.steps.singles[i])

    def _add(self, bank: int) -> None:
        self.bank_of[self.steps.members[bank]] = bank
        self._count(bank, 1)

    def _count(self, bank: int, sign: int) -> None:
        steps = self.steps
        sites = steps.members[bank]
        touches = steps.candidates_of[int(sites[0])]
        if len(sites) > 1:
            touches = np.unique(np.concatenate([steps.candidates_of[i] for i in sites.tolist()]))
        self.touched_price[touches] += sign * steps.split_price[bank]
        self.touched_cost[:, touches] += sign * steps.split_cost[:, bank][:, None]
        self.used += sign * steps.cost[:, bank]


def _largest_shares(reduced: Reduced, cost: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """``(S,)``, the most that each site takes of ``cost`` in a candidate."""
    share = -(-cost // np.maximum(reduced.incidence.lengths, 1))
    largest = np.zeros(reduced.num_sites, np.int64)
    np.maximum.at(largest, reduced.incidence.sites, share[reduced.incidence.candidates()])
    return largest
