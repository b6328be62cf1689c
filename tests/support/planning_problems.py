"""Random planning problems, and their answers by enumeration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

from hypothesis import strategies as st

from npas_fx.solvers import PlanningProblem

# Prices as our candidates have them: multiples of one coarse power of two.
GRID_PRICES = st.integers(-64, 256).map(lambda eighths: eighths / 8)
ANY_PRICES = st.floats(-1e6, 1e6)


@st.composite
def planning_problems(
    draw: st.DrawFn,
    *,
    max_sites: int = 6,
    max_candidates: int = 14,
    num_resources: int | None = None,
    prices: st.SearchStrategy[float] = GRID_PRICES,
) -> PlanningProblem:
    """Problems with crossing candidates, equal ones, and sites with and without singles.

    Args:
        draw: Given by hypothesis.
        max_sites: At least 1.
        max_candidates: Not counting those added so that each site is in one.
        num_resources: How many have a budget; up to 2 when None.
        prices: Of one candidate.
    """
    num_sites = draw(st.integers(1, max_sites))
    site_sets = st.sets(st.integers(0, num_sites - 1), min_size=1).map(lambda s: tuple(sorted(s)))
    members = draw(st.lists(site_sets, max_size=max_candidates))
    if draw(st.booleans()):
        members += [(i,) for i in range(num_sites)]
    else:
        covered = {i for sites in members for i in sites}
        members += [(i,) for i in range(num_sites) if i not in covered]
    members = draw(st.permutations(members))
    if num_resources is None:
        num_resources = draw(st.integers(0, 2))
    resources = ("parameters", "bytes")[:num_resources]
    entries = st.lists(st.integers(0, 12), min_size=len(members), max_size=len(members))
    return PlanningProblem(
        num_sites=num_sites,
        members=tuple(members),
        price=tuple(draw(prices) for _ in members),
        cost={r: tuple(draw(entries)) for r in resources},
        budget={r: draw(st.integers(0, 5 * num_sites)) for r in resources},
    )


def with_budget(problem: PlanningProblem, resource: str, budget: int) -> PlanningProblem:
    return replace(problem, budget={**problem.budget, resource: budget})


def every_cover(problem: PlanningProblem) -> Iterator[tuple[int, ...]]:
    """All choices that cover each site exactly once, whatever the budgets."""

    def extend(chosen: tuple[int, ...], left: frozenset[int]) -> Iterator[tuple[int, ...]]:
        if not left:
            yield tuple(sorted(chosen))
            return
        site = min(left)
        for c, sites in enumerate(problem.members):
            if site in sites and left.issuperset(sites):
                yield from extend((*chosen, c), left.difference(sites))

    return extend((), frozenset(range(problem.num_sites)))


def every_plan(problem: PlanningProblem) -> list[tuple[int, ...]]:
    """All covers within every budget."""
    return [
        cover
        for cover in every_cover(problem)
        if all(
            sum(problem.cost[r][c] for c in cover) <= budget for r, budget in problem.budget.items()
        )
    ]


def exact_price(problem: PlanningProblem, cover: tuple[int, ...]) -> Fraction:
    return sum((Fraction(problem.price[c]) for c in cover), Fraction(0))
