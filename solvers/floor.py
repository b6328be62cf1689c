"""The least that plans take, whether one fits the budgets, and what stands in the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from npas_fx.solvers.exact_cover import CoverProgram
from npas_fx.solvers.integer_prices import to_integers
from npas_fx.solvers.problem import PlanningProblem
from npas_fx.solvers.reduce import MAX_BANKS, Reduced, reduce
from npas_fx.solvers.rounds import EMERGENCY, EXACT, Clock, Limits, Round, search
from npas_fx.solvers.selection import Obstacle

# The lower price among equally cheap covers is a courtesy, so its search is cut short.
_TIE_BREAK = Limits(rounds=(Round(columns=None, limit=1.0),))


def find_cover(reduced: Reduced) -> tuple[int, ...] | None:
    """Find a cover within the budgets; None proves that there is none."""
    resource = next(iter(reduced.cost), None)
    good = 0 if resource is None else reduced.budget[resource]
    return _cheapest(reduced, resource, good=good)


def cheapest_cover(reduced: Reduced, resource: str) -> tuple[int, ...] | None:
    """Find the cover that takes the least of one resource, within the budgets of the others.

    That no cover takes less is proven. Among equally cheap covers it is the one with the lowest
    price, where that is found soon enough.

    Returns:
        The chosen candidates, increasing; None proves that there is no cover.
    """
    cover = _cheapest(reduced, resource)
    if cover is None:
        return None
    least = int(reduced.cost[resource][list(cover)].sum())
    program = CoverProgram.of(
        replace(reduced, budget={**reduced.budget, resource: least}),
        to_integers(reduced.price).values,
    )
    best = search(program, [cover], _TIE_BREAK, Clock())
    assert best.chosen is not None  # at least the one that is known
    return best.chosen


def cheapest_plan(reduced: Reduced, problem: PlanningProblem) -> tuple[int, ...]:
    """Find the plan that takes the least of the first resource, whatever the budgets.

    Returns:
        Candidates of the problem; where nothing is budgeted, none.
    """
    resource = next(iter(problem.cost), None)
    if resource is None:
        return ()
    cover = cheapest_cover(_without_budgets(reduced), resource)
    assert cover is not None  # it is asked for where there is a plan
    return tuple(reduced.given[k] for k in cover)


def find_obstacle(problem: PlanningProblem) -> Obstacle:
    """Find the smallest budgets, and what each rule takes of them."""
    smallest = smallest_budgets(problem)
    relaxed = dict(_without_each_rule(problem))
    reduced = reduce(problem)
    blocking: tuple[str, ...] = ()
    if _cheapest(_without_budgets(reduced), None) is None:
        blocking = tuple(
            rule
            for rule, easier in relaxed.items()
            if _cheapest(_without_budgets(reduce(easier)), None) is not None
        )
        blocking = (blocking or tuple(relaxed)) + tuple(f"site {i}" for i in reduced.bare)
    savings: dict[str, Mapping[str, int]] = {}
    for rule, easier in relaxed.items():
        saved = {
            r: smallest[r] - least
            for r, least in smallest_budgets(easier).items()
            if r in smallest and least < smallest[r]
        }
        if saved:
            savings[rule] = saved
    return Obstacle(smallest=smallest, blocking=blocking, savings=savings)


def smallest_budgets(problem: PlanningProblem) -> dict[str, int]:
    """Resource -> the least that any plan takes of it; see ``Obstacle.smallest``."""
    reduced = reduce(problem)
    smallest = {}
    for resource in problem.cost:
        cover = _cheapest(reduced, resource)
        if cover is not None:
            smallest[resource] = int(reduced.cost[resource][list(cover)].sum())
    return smallest


def _without_each_rule(problem: PlanningProblem) -> Iterator[tuple[str, PlanningProblem]]:
    """Rule -> the problem without it."""
    if problem.private:
        yield "private", replace(problem, private=frozenset())
    for k in range(len(problem.same_bank)):
        left = problem.same_bank[:k] + problem.same_bank[k + 1 :]
        yield f"same_bank[{k}]", replace(problem, same_bank=left)
    for k in range(len(problem.different_bank)):
        left = problem.different_bank[:k] + problem.different_bank[k + 1 :]
        yield f"different_bank[{k}]", replace(problem, different_bank=left)
    if problem.max_banks is not None:
        yield "max_banks", replace(problem, max_banks=None)
    for k in range(len(problem.pin)):
        yield f"pin[{k}]", replace(problem, pin=problem.pin[:k] + problem.pin[k + 1 :])


def _without_budgets(reduced: Reduced) -> Reduced:
    """Leave the budgets away, but keep the rules."""
    budget = {
        r: limit if r == MAX_BANKS else int(reduced.cost[r].sum())
        for r, limit in reduced.budget.items()
    }
    return replace(reduced, budget=budget)


def _cheapest(
    reduced: Reduced, resource: str | None, *, good: int | None = None
) -> tuple[int, ...] | None:
    """Find the cover that takes the least of one resource, or any that takes at most ``good``."""
    if reduced.bare:
        return None
    if not reduced.num_sites:
        return ()
    # In a cheapest cover each candidate is the cheapest for its sites, so one for each set of
    # sites is enough, if nothing else is counted; it is the one with the lowest price.
    columns = np.arange(len(reduced.members))
    cost = np.zeros_like(columns) if resource is None else reduced.cost[resource]
    others = {r: c for r, c in reduced.cost.items() if r != resource}
    if others.keys() <= {MAX_BANKS}:
        best: dict[tuple[int, ...], int] = {}
        for c in np.lexsort((columns, np.array(reduced.price), cost)).tolist():
            best.setdefault(reduced.members[c], c)
        columns = np.array(sorted(best.values()), np.int64)
    program = CoverProgram(
        num_sites=reduced.num_sites,
        incidence=reduced.incidence,
        price=cost,
        cost=others,
        budget={r: reduced.budget[r] for r in others},
    )
    found = search(program.restrict(columns), [], EXACT, Clock(), good=good)
    chosen = None
    if found.chosen is not None:
        chosen = tuple(int(columns[k]) for k in found.chosen)
    is_good = chosen is not None and good is not None and program.total(chosen) <= good
    is_too_much = good is not None and found.bound > good
    if not (found.is_proven or is_good or is_too_much):
        raise TimeoutError(
            f"whether there is a plan was not decided in {EMERGENCY:.0f} s. Give a larger budget "
            "or fewer rules."
        )
    return chosen if good is None or is_good else None
