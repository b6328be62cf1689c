"""What a solver is asked and what it answers, in plain numbers: no torch, no names of sites."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

# CP-SAT counts in int64 and wants room for differences.
MAX_TOTAL_COST = 2**62


class PlanningProblemError(ValueError):
    """A planning problem that contradicts itself; the message names the candidate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanningProblem:
    """Choose candidates that cover each site exactly once, at the least price, within budgets.

    Attributes:
        num_sites: The sites are ``0 .. num_sites - 1``.
        members: ``members[c]`` are the sites of candidate ``c``, strictly increasing.
        price: ``price[c]`` is the expected loss of candidate ``c``; it may be negative.
        cost: Resource -> what each candidate takes of it. The first resource is the one whose
            cheapest plan sets the scale of the gap.
        budget: Resource -> what may be taken of it; the same resources as in ``cost``.

    Raises:
        PlanningProblemError: The numbers contradict each other.
    """

    num_sites: int
    members: tuple[tuple[int, ...], ...]
    price: tuple[float, ...]
    cost: Mapping[str, tuple[int, ...]]
    budget: Mapping[str, int]

    def __post_init__(self) -> None:
        """Refuse what no solver could answer."""
        _check_lengths(self)
        _check_members(self)
        _check_prices(self)
        _check_costs(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The chosen candidates, and how good they are proven to be.

    Attributes:
        chosen: The chosen candidates, increasing; empty when infeasible.
        objective: Their total price; None when infeasible.
        bound: No plan has a lower price than this; ``bound <= objective``; None when infeasible.
        gap: ``(objective - bound) / max(|objective|, eps)``, where ``eps`` is 1e-6 of the absolute
            price of the cheapest plan (in the first resource); 0 when both are equal, infinite
            when both terms of the maximum are 0; None when infeasible.
        status: ``optimal``: no plan has a lower price, up to the rounding that
            ``npas_fx.solvers.integer_prices`` states and that ``gap`` shows. ``feasible``: a plan,
            perhaps not the best. ``infeasible``: proven that there is none.
        smallest: Resource -> the least that any cover takes of it, whatever the other budgets;
            empty where no choice of candidates covers each site exactly once.
        num_candidates: How many candidates the proof is over.
        seconds: Wall-clock time.
    """

    chosen: tuple[int, ...]
    objective: float | None
    bound: float | None
    gap: float | None
    status: Literal["optimal", "feasible", "infeasible"]
    smallest: Mapping[str, int]
    num_candidates: int
    seconds: float


def total_price(problem: PlanningProblem, chosen: Iterable[int]) -> float:
    """Add up prices, rounded once, so that the order does not matter."""
    return math.fsum(problem.price[c] for c in chosen)


def total_cost(problem: PlanningProblem, chosen: Iterable[int], resource: str) -> int:
    """Add up what the chosen candidates take of one resource."""
    cost = problem.cost[resource]
    return sum(cost[c] for c in chosen)


def fits(problem: PlanningProblem, chosen: tuple[int, ...]) -> bool:
    """Whether the chosen candidates stay within every budget."""
    return all(
        total_cost(problem, chosen, resource) <= budget
        for resource, budget in problem.budget.items()
    )


def restrict(problem: PlanningProblem, candidates: Sequence[int]) -> PlanningProblem:
    """Keep these candidates only; candidate ``k`` of the result is ``candidates[k]``."""
    return replace(
        problem,
        members=tuple(problem.members[c] for c in candidates),
        price=tuple(problem.price[c] for c in candidates),
        cost={r: tuple(cost[c] for c in candidates) for r, cost in problem.cost.items()},
    )


def certify(
    problem: PlanningProblem,
    chosen: tuple[int, ...],
    bound: float,
    *,
    is_proven: bool,
    smallest: Mapping[str, int],
    cheapest_price: float,
    seconds: float,
) -> Selection:
    """Write the certificate of a plan.

    Args:
        problem: What was asked.
        chosen: A cover within the budgets.
        bound: Proven lower bound.
        is_proven: Whether the plan is proven optimal, though rounding kept the bound below it.
        smallest: See ``Selection``.
        cheapest_price: Price of the cheapest plan in the first resource.
        seconds: See ``Selection``.
    """
    objective = total_price(problem, chosen)
    assert bound <= objective, f"the bound {bound} is above the plan's {objective}"
    return Selection(
        chosen=chosen,
        objective=objective,
        bound=bound,
        gap=_relative_gap(objective, bound, cheapest_price),
        status="optimal" if is_proven or bound == objective else "feasible",
        smallest=smallest,
        num_candidates=len(problem.members),
        seconds=seconds,
    )


def certify_infeasible(
    problem: PlanningProblem, *, smallest: Mapping[str, int], seconds: float
) -> Selection:
    """Write the certificate that there is no plan."""
    return Selection(
        chosen=(),
        objective=None,
        bound=None,
        gap=None,
        status="infeasible",
        smallest=smallest,
        num_candidates=len(problem.members),
        seconds=seconds,
    )


def _relative_gap(objective: float, bound: float, cheapest_price: float) -> float:
    if objective == bound:
        return 0.0
    scale = max(abs(objective), 1e-6 * abs(cheapest_price))
    return (objective - bound) / scale if scale > 0 else math.inf


def _check_lengths(problem: PlanningProblem) -> None:
    num_candidates = len(problem.members)
    if problem.num_sites < 0:
        raise PlanningProblemError(
            f"num_sites={problem.num_sites} is negative. Give the number of sites, 0 or more."
        )
    if len(problem.price) != num_candidates:
        raise PlanningProblemError(
            f"price has {len(problem.price)} entries for {num_candidates} candidates. "
            "Give one price for each candidate in members."
        )
    if problem.cost.keys() != problem.budget.keys():
        raise PlanningProblemError(
            f"cost has the resources {sorted(problem.cost)}, budget has {sorted(problem.budget)}. "
            "Give both for the same resources; leave out what has no budget."
        )
    for resource, cost in problem.cost.items():
        if len(cost) != num_candidates:
            raise PlanningProblemError(
                f"cost[{resource!r}] has {len(cost)} entries for {num_candidates} candidates. "
                "Give one cost for each candidate in members."
            )


def _check_members(problem: PlanningProblem) -> None:
    covered: set[int] = set()
    for c, sites in enumerate(problem.members):
        if not sites:
            raise PlanningProblemError(f"candidate {c} has no sites. Leave it out.")
        for left, right in itertools.pairwise(sites):
            if left >= right:
                raise PlanningProblemError(
                    f"candidate {c}: site {right} follows site {left}. "
                    "Give the sites of a candidate sorted, each once."
                )
        if sites[0] < 0 or sites[-1] >= problem.num_sites:
            raise PlanningProblemError(
                f"candidate {c} has the sites {sites[0]} to {sites[-1]}, out of range for "
                f"num_sites={problem.num_sites}. Number the sites 0 to num_sites - 1."
            )
        covered.update(sites)
    for site in range(problem.num_sites):
        if site not in covered:
            raise PlanningProblemError(
                f"site {site} is in no candidate, so no plan can cover it. "
                f"Add a candidate with members ({site},)."
            )


def _check_prices(problem: PlanningProblem) -> None:
    for c, price in enumerate(problem.price):
        if not math.isfinite(price):
            raise PlanningProblemError(
                f"candidate {c} has price={price}. Prices are finite: leave out a candidate that "
                "must never be chosen."
            )
    try:
        math.fsum(abs(price) for price in problem.price)
    except OverflowError as err:
        largest = max(range(len(problem.price)), key=lambda c: abs(problem.price[c]))
        raise PlanningProblemError(
            f"the prices add up to more than a float holds; candidate {largest} has the largest, "
            f"{problem.price[largest]}. Give prices in a larger unit."
        ) from err


def _check_costs(problem: PlanningProblem) -> None:
    for resource, cost in problem.cost.items():
        for c, entry in enumerate(cost):
            if not isinstance(entry, int):
                raise PlanningProblemError(
                    f"candidate {c} has cost[{resource!r}]={entry!r}, a {type(entry).__name__}. "
                    "Costs are counted exactly: give an int."
                )
            if entry < 0:
                raise PlanningProblemError(
                    f"candidate {c} has cost[{resource!r}]={entry}. Give 0 or more."
                )
        if sum(cost) >= MAX_TOTAL_COST:
            largest = max(range(len(cost)), key=cost.__getitem__)
            raise PlanningProblemError(
                f"cost[{resource!r}] adds up to {sum(cost)} over all candidates, 2**62 or more; "
                f"candidate {largest} has the largest, {cost[largest]}. Count in a larger unit."
            )
    for resource, budget in problem.budget.items():
        if not isinstance(budget, int):
            raise PlanningProblemError(
                f"budget[{resource!r}]={budget!r} is a {type(budget).__name__}. "
                "Budgets are counted exactly: give an int."
            )
        if budget < 0:
            raise PlanningProblemError(f"budget[{resource!r}]={budget}. Give 0 or more.")
