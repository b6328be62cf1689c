"""Candidates that are no better than another one for the same sites."""

from __future__ import annotations

from npas_fx.solvers.problem import PlanningProblem


def undominated(problem: PlanningProblem) -> tuple[int, ...]:
    """Keep what may be needed: no other candidate has the same sites and is no worse in anything.

    For every cover there is one of these candidates that is no worse, in price and every cost, so
    neither the optimum nor the smallest budgets change. Of equal candidates the first is kept.
    """
    by_sites: dict[tuple[int, ...], list[tuple[float | int, ...]]] = {}
    resources = tuple(problem.cost.values())
    for c, sites in enumerate(problem.members):
        terms = (problem.price[c], *(cost[c] for cost in resources), c)
        by_sites.setdefault(sites, []).append(terms)
    kept: list[int] = []
    for candidates in by_sites.values():
        # Sorted by price, a candidate can be dominated only by an earlier one.
        front: list[tuple[float | int, ...]] = []
        for terms in sorted(candidates):
            if len(resources) == 1:  # the last one kept has the least cost so far
                is_dominated = bool(front) and front[-1][1] <= terms[1]
            else:
                is_dominated = any(
                    all(a <= b for a, b in zip(other[1:-1], terms[1:-1], strict=True))
                    for other in front
                )
            if not is_dominated:
                front.append(terms)
        kept.extend(int(terms[-1]) for terms in front)
    return tuple(sorted(kept))
