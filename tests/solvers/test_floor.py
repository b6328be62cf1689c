from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings

from npas_fx.solvers import PlanningProblem, floor
from npas_fx.solvers.floor import cheapest_cover, find_cover, find_obstacle
from npas_fx.solvers.reduce import reduce
from npas_fx.solvers.rounds import Clock
from planning_problems import (
    every_plan,
    exact_price,
    planning_problems,
    smallest_budgets,
    with_budget,
)

examples = settings(max_examples=60, deadline=None)


@examples
@given(planning_problems(max_sites=6, num_resources=1))
def test_no_cover_is_cheaper_and_no_equally_cheap_one_better(problem: PlanningProblem) -> None:
    reduced = reduce(problem)
    cover = cheapest_cover(reduced, "parameters")
    cost = problem.cost["parameters"]
    plans = every_plan(with_budget(problem, "parameters", sum(cost)))
    if not plans:
        assert cover is None
        return
    assert cover is not None
    chosen = tuple(sorted(reduced.given[k] for k in cover))
    assert chosen in plans
    assert (sum(cost[c] for c in chosen), exact_price(problem, chosen)) == min(
        (sum(cost[c] for c in plan), exact_price(problem, plan)) for plan in plans
    )


@examples
@given(planning_problems(max_sites=6, rules=True))
def test_a_cover_is_found_exactly_where_there_is_one(problem: PlanningProblem) -> None:
    reduced = reduce(problem)
    cover = find_cover(reduced)
    plans = every_plan(problem)
    assert (cover is None) == (not plans)
    assert cover is None or tuple(sorted(reduced.given[k] for k in cover)) in plans


@examples
@given(planning_problems(max_sites=5, rules=True))
def test_obstacles_are_what_enumeration_finds(problem: PlanningProblem) -> None:
    assume(not every_plan(problem))
    obstacle = find_obstacle(problem)
    assert obstacle.smallest == smallest_budgets(problem)
    without = {
        "private": replace(problem, private=frozenset()),
        "max_banks": replace(problem, max_banks=None),
    }
    for rule in ("same_bank", "different_bank", "pin"):
        groups = getattr(problem, rule)
        for k in range(len(groups)):
            easier = replace(problem, **{rule: groups[:k] + groups[k + 1 :]})
            without[f"{rule}[{k}]"] = easier
    for rule, easier in without.items():
        saved = {
            r: obstacle.smallest[r] - least
            for r, least in smallest_budgets(easier).items()
            if r in obstacle.smallest and least < obstacle.smallest[r]
        }
        assert obstacle.savings.get(rule, {}) == saved
    boundless = replace(problem, cost={}, budget={})
    assert bool(obstacle.blocking) <= (not every_plan(boundless))
    for rule in obstacle.blocking:
        if rule.startswith("site"):
            assert int(rule.removeprefix("site ")) in reduce(problem).bare
        else:
            assert rule in without


def test_the_rule_that_leaves_no_plan_is_named() -> None:
    problem = PlanningProblem(
        num_sites=3,
        members=((0,), (1,), (2,), (0, 1)),
        price=(0.0,) * 4,
        cost={"parameters": (4, 4, 4, 5)},
        budget={"parameters": 100},
        same_bank=((0, 1),),
        different_bank=((0, 1),),
    )
    obstacle = find_obstacle(problem)
    assert obstacle.smallest == {}
    assert set(obstacle.blocking) == {"same_bank[0]", "different_bank[0]", "site 0", "site 1"}


def test_what_each_rule_costs_is_told() -> None:
    problem = PlanningProblem(
        num_sites=3,
        members=((0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)),
        price=(0.0,) * 6,
        cost={"parameters": (10, 10, 10, 6, 6, 3)},
        budget={"parameters": 2},
        private=frozenset({0}),
        max_banks=1,
    )
    obstacle = find_obstacle(problem)
    assert obstacle.smallest == {"parameters": 16}
    assert obstacle.savings == {"private": {"parameters": 13}}
    assert obstacle.blocking == ()


def test_costs_beyond_the_floats_are_told_apart() -> None:
    huge = 2**59
    problem = PlanningProblem(
        num_sites=2,
        members=((0,), (1,), (0, 1)),
        price=(0.0, 0.0, 0.0),
        cost={"parameters": (huge, huge, 2 * huge + 1)},
        budget={"parameters": 0},
    )
    assert cheapest_cover(reduce(problem), "parameters") == (0, 1)
    assert float(2 * huge + 1) == float(2 * huge)


def test_an_emergency_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    # The relaxation takes half of each pair, which is no cover.
    problem = PlanningProblem(
        num_sites=3,
        members=((0,), (1,), (2,), (0, 1), (1, 2), (0, 2)),
        price=(0.0,) * 6,
        cost={"parameters": (10, 10, 10, 1, 1, 1)},
        budget={"parameters": 11},
    )
    assert find_obstacle(problem).smallest == {"parameters": 11}
    monkeypatch.setattr(floor, "Clock", lambda: Clock(0.0))
    with pytest.raises(TimeoutError, match="was not decided in 600 s"):
        find_cover(reduce(problem))
