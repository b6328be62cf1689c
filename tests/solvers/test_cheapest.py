from __future__ import annotations

import pytest
from hypothesis import given, settings

from npas_fx.solvers import PlanningProblem, PlanningProblemError
from npas_fx.solvers.cheapest import cheapest_cover
from planning_problems import every_cover, exact_price, planning_problems


@settings(max_examples=60, deadline=None)
@given(planning_problems(max_sites=6, num_resources=1))
def test_no_cover_is_cheaper_and_no_equally_cheap_one_better(problem: PlanningProblem) -> None:
    cost = problem.cost["parameters"]
    covers = list(every_cover(problem))
    if not covers:
        with pytest.raises(PlanningProblemError, match="whatever the budget"):
            cheapest_cover(problem, "parameters")
        return
    cover = cheapest_cover(problem, "parameters")
    assert cover in covers
    assert (sum(cost[c] for c in cover), exact_price(problem, cover)) == min(
        (sum(cost[c] for c in other), exact_price(problem, other)) for other in covers
    )


def test_costs_beyond_the_floats_are_told_apart() -> None:
    huge = 2**59
    problem = PlanningProblem(
        num_sites=2,
        members=((0,), (1,), (0, 1)),
        price=(0.0, 0.0, 0.0),
        cost={"parameters": (huge, huge, 2 * huge + 1)},
        budget={"parameters": 0},
    )
    assert cheapest_cover(problem, "parameters") == (0, 1)
    assert float(2 * huge + 1) == float(2 * huge)
