"""The cover that takes the least of one resource, and whether any cover fits the budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from npas_fx.solvers.exact_cover import CoverProgram, minimise
from npas_fx.solvers.integer_prices import to_integers
from npas_fx.solvers.problem import (
    PlanningProblem,
    PlanningProblemError,
    fits,
    total_cost,
    total_price,
)

# The lower price among equally cheap covers is a courtesy, so its search is cut short.
TIE_BREAK_LIMIT = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """What the budgets are up against.

    Attributes:
        smallest: Resource -> the least that any cover takes of it; empty when there is no cover.
        cover: A cover within all budgets; None when it is proven that there is none.
        cheapest_price: Price of the cheapest cover in the first resource; of ``cover`` when no
            resource has a budget.
    """

    smallest: Mapping[str, int]
    cover: tuple[int, ...] | None
    cheapest_price: float


def cheapest_cover(problem: PlanningProblem, resource: str) -> tuple[int, ...]:
    """Find the cover that takes the least of one resource, whatever the budgets.

    That no cover takes less is proven: there is no limit on this search. Among equally cheap
    covers it is the one with the lowest price, where that is found within ``TIE_BREAK_LIMIT``.

    Args:
        problem: Its budgets are ignored.
        resource: A key of ``problem.cost``.

    Returns:
        The chosen candidates, increasing.

    Raises:
        PlanningProblemError: No choice of candidates covers each site exactly once.
    """
    cover = _cheapest_cover(problem, resource)
    if cover is None:
        raise PlanningProblemError(
            "no choice of candidates covers each site exactly once, whatever the budget: they "
            "overlap or leave sites out. Add the candidate (site,) for each site."
        )
    return cover


def find_floor(problem: PlanningProblem) -> Floor:
    """Find the smallest budgets, and a cover within the given ones where there is one."""
    covers = {resource: _cheapest_cover(problem, resource) for resource in problem.budget}
    if not covers:
        cover = _any_cover(problem)
        price = total_price(problem, cover) if cover is not None else 0.0
        return Floor(smallest={}, cover=cover, cheapest_price=price)
    found = {resource: cover for resource, cover in covers.items() if cover is not None}
    if len(found) < len(covers):
        return Floor(smallest={}, cover=None, cheapest_price=0.0)
    smallest = {resource: total_cost(problem, cover, resource) for resource, cover in found.items()}
    fitting = None
    if all(smallest[resource] <= budget for resource, budget in problem.budget.items()):
        # Each budget can be met alone; several together only if some one cover meets them all.
        fitting = next((cover for cover in found.values() if fits(problem, cover)), None)
        fitting = fitting if fitting is not None else _any_cover(problem)
    cheapest_price = total_price(problem, next(iter(found.values())))
    return Floor(smallest=smallest, cover=fitting, cheapest_price=cheapest_price)


def _cheapest_cover(problem: PlanningProblem, resource: str) -> tuple[int, ...] | None:
    cost = problem.cost[resource]
    # In a cheapest cover each candidate is the cheapest for its sites, so one for each set of
    # sites is enough; it is the one with the lowest price.
    best: dict[tuple[int, ...], int] = {}
    for c, sites in enumerate(problem.members):
        d = best.get(sites)
        if d is None or (cost[c], problem.price[c]) < (cost[d], problem.price[d]):
            best[sites] = c
    columns = tuple(best.values())
    column_cost = tuple(cost[c] for c in columns)
    program = CoverProgram(
        num_sites=problem.num_sites,
        members=tuple(best),
        price=column_cost,
        cost={},
        budget={},
    )
    cheapest = minimise(program)
    if cheapest.chosen is None:
        return None
    least = sum(column_cost[k] for k in cheapest.chosen)
    program = CoverProgram(
        num_sites=problem.num_sites,
        members=tuple(best),
        price=to_integers([problem.price[c] for c in columns]).values,
        cost={resource: column_cost},
        budget={resource: least},
    )
    best_priced = minimise(program, hint=cheapest.chosen, limit=TIE_BREAK_LIMIT)
    chosen = best_priced.chosen if best_priced.chosen is not None else cheapest.chosen
    return tuple(sorted(columns[k] for k in chosen))


def _any_cover(problem: PlanningProblem) -> tuple[int, ...] | None:
    program = CoverProgram(
        num_sites=problem.num_sites,
        members=problem.members,
        price=(0,) * len(problem.members),
        cost=problem.cost,
        budget=problem.budget,
    )
    return minimise(program).chosen
