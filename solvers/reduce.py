"""From a problem with rules to one without, and without the candidates that no plan needs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from npas_fx.solvers.problem import Incidence, PlanningProblem

_Mask = npt.NDArray[np.bool_]

# A rule as a resource: each bank of two or more sites takes one of it.
MAX_BANKS = "max_banks"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduced:
    """A problem of the cover and the budgets alone, with the same plans where it matters.

    Attributes:
        num_sites: As in the problem.
        members: Candidate -> its sites.
        incidence: The same as arrays.
        price: Candidate -> its price.
        cost: Resource -> ``(C,)``; ``max_banks`` is one where the problem has that rule.
        budget: Resource -> what may be taken of it.
        given: Candidate -> which of the problem's it is.
        bare: Sites that no candidate is left for: where there are some, there is no plan.
    """

    num_sites: int
    members: tuple[tuple[int, ...], ...]
    incidence: Incidence
    price: tuple[float, ...]
    cost: dict[str, npt.NDArray[np.int64]]
    budget: dict[str, int]
    given: tuple[int, ...]
    bare: tuple[int, ...]

    def total_price(self, cover: Iterable[int]) -> float:
        """Add up the prices of a cover, rounded once."""
        return math.fsum(self.price[c] for c in cover)


def reduce(problem: PlanningProblem) -> Reduced:
    """Turn rules into fewer candidates and a resource; drop what another candidate dominates.

    For every plan of the problem the result has one that is no worse, in price and in what it
    takes; and all its plans are plans of the problem. Candidates that no budget allows are still
    there.
    """
    incidence = Incidence.of(problem.members)
    cost = {r: np.array(entries, np.int64) for r, entries in problem.cost.items()}
    kept = np.flatnonzero(_allowed(problem, incidence))
    kept = kept[_undominated(problem, kept, [entries[kept] for entries in cost.values()])]
    members = tuple(problem.members[c] for c in kept)
    reduced = Incidence.of(members)
    cost = {r: entries[kept] for r, entries in cost.items()}
    budget = dict(problem.budget)
    if problem.max_banks is not None:
        cost[MAX_BANKS] = (reduced.lengths > 1).astype(np.int64)
        budget[MAX_BANKS] = problem.max_banks
    return Reduced(
        num_sites=problem.num_sites,
        members=members,
        incidence=reduced,
        price=tuple(problem.price[c] for c in kept),
        cost=cost,
        budget=budget,
        given=tuple(kept.tolist()),
        bare=_bare(problem.num_sites, members),
    )


def _bare(num_sites: int, members: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    return tuple(sorted(set(range(num_sites)).difference(*members)))


def _allowed(problem: PlanningProblem, incidence: Incidence) -> _Mask:
    """``(C,)``, whether each candidate keeps all rules but ``max_banks``."""
    allowed = np.ones(len(problem.members), bool)

    def count(sites: tuple[int, ...]) -> npt.NDArray[np.int64]:
        is_in = np.zeros(problem.num_sites, np.int64)
        is_in[list(sites)] = 1
        return incidence.total(is_in).astype(np.int64)

    if problem.private:
        allowed &= (count(tuple(problem.private)) == 0) | (incidence.lengths == 1)
    for group in problem.same_bank:
        together = count(group)
        allowed &= (together == 0) | (together == len(set(group)))
    for group in problem.different_bank:
        allowed &= count(group) <= 1
    if problem.pin:
        pins = sorted(set(problem.pin))
        pinned = [i for c in pins for i in problem.members[c]]
        is_pin = np.zeros(len(problem.members), bool)
        # Pins that overlap cannot all be chosen, so then none is allowed.
        is_pin[pins] = len(set(pinned)) == len(pinned)
        allowed &= (count(tuple(pinned)) == 0) | is_pin
    return allowed


def _undominated(
    problem: PlanningProblem,
    candidates: npt.NDArray[np.int64],
    costs: list[npt.NDArray[np.int64]],
) -> _Mask:
    """Find what may be needed: no other has the same sites and is no worse in anything.

    Of equal candidates the first is kept.
    """
    number: dict[tuple[int, ...], int] = {}
    group = np.fromiter(
        (number.setdefault(problem.members[c], len(number)) for c in candidates),
        np.int64,
        len(candidates),
    )
    price = np.array([problem.price[c] for c in candidates], float)
    # By price, then cost: a candidate can be dominated only by one before it in its group.
    order = np.lexsort((candidates, *reversed(costs), price, group))
    kept = np.zeros(len(candidates), bool)
    if len(costs) == 1:
        cost = costs[0][order]
        # Shifted apart, groups need no minimum of their own: each lies below the one before it.
        span = int(cost.max(initial=0)) + 1
        if span * (len(number) + 1) < 2**62:
            shifted = cost - span * group[order]
            least = np.minimum.accumulate(shifted)
            kept[order] = shifted < np.concatenate([[2**62], least[:-1]])
            return kept
    fronts: dict[int, list[int]] = {}
    for k in order.tolist():
        front = fronts.setdefault(int(group[k]), [])
        if not any(all(cost[d] <= cost[k] for cost in costs) for d in front):
            front.append(k)
            kept[k] = True
    return kept
