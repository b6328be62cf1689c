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
    rules: bool = False,
) -> PlanningProblem:
    """Problems with crossing candidates, equal ones, and sites with and without singles.

    Args:
        draw: Given by hypothesis.
        max_sites: At least 1.
        max_candidates: Not counting those added so that each site is in one.
        num_resources: How many have a budget; up to 2 when None.
        prices: Of one candidate.
        rules: Whether there may be some, which may well leave no plan.
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
    problem = PlanningProblem(
        num_sites=num_sites,
        members=tuple(members),
        price=tuple(draw(prices) for _ in members),
        cost={r: tuple(draw(entries)) for r in resources},
        budget={r: draw(st.integers(0, 5 * num_sites)) for r in resources},
    )
    if not rules:
        return problem
    groups = st.lists(site_sets, max_size=2).map(tuple)
    return replace(
        problem,
        private=draw(st.frozensets(st.integers(0, num_sites - 1), max_size=2)),
        same_bank=draw(groups),
        different_bank=draw(groups),
        max_banks=draw(st.none() | st.integers(0, 3)),
        pin=tuple(draw(st.lists(st.integers(0, len(members) - 1), max_size=2, unique=True))),
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


def keeps_rules(problem: PlanningProblem, cover: tuple[int, ...]) -> bool:
    """Whether a cover keeps all rules, read off their definitions."""
    banks = [set(problem.members[c]) for c in cover]
    return (
        all(len(bank) == 1 for bank in banks if bank & problem.private)
        and all(set(g) <= bank for g in problem.same_bank for bank in banks if bank & set(g))
        and all(len(bank & set(g)) <= 1 for g in problem.different_bank for bank in banks)
        and (problem.max_banks is None or sum(len(bank) > 1 for bank in banks) <= problem.max_banks)
        and set(problem.pin) <= set(cover)
    )


def every_plan(problem: PlanningProblem) -> list[tuple[int, ...]]:
    """All covers that keep the rules and stay within every budget."""
    return [
        cover
        for cover in every_cover(problem)
        if keeps_rules(problem, cover)
        and all(
            sum(problem.cost[r][c] for c in cover) <= budget for r, budget in problem.budget.items()
        )
    ]


def exact_price(problem: PlanningProblem, cover: tuple[int, ...]) -> Fraction:
    return sum((Fraction(problem.price[c]) for c in cover), Fraction(0))


def smallest_budgets(problem: PlanningProblem) -> dict[str, int]:
    """Resource -> the least that any cover takes of it which keeps the rules and other budgets."""
    smallest = {}
    for r, cost in problem.cost.items():
        plans = every_plan(with_budget(problem, r, sum(cost)))
        if plans:
            smallest[r] = min(sum(cost[c] for c in plan) for plan in plans)
    return smallest


def ladder(num_sites: int, budget: int) -> PlanningProblem:
    """Singles in four sizes, and runs of neighbours: too many plans to enumerate."""
    members: list[tuple[int, ...]] = []
    price: list[float] = []
    cost: list[int] = []
    for length in (1, 2, 3, 5):
        for start in range(num_sites - length + 1):
            weight = sum(1 + (7 * i) % 5 for i in range(start, start + length))
            for k in range(1, 5):
                members.append(tuple(range(start, start + length)))
                price.append((weight * (4 - k) ** 2 + (length - 1) * 3) / 16)
                cost.append(25 * k * length - 3 * (length - 1) * k)
    return PlanningProblem(
        num_sites=num_sites,
        members=tuple(members),
        price=tuple(price),
        cost={"parameters": tuple(cost)},
        budget={"parameters": budget},
    )
