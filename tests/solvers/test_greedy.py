from __future__ import annotations

from hypothesis import given, settings

from npas_fx.solvers import PlanningProblem
from npas_fx.solvers.greedy import select
from planning_problems import every_plan, planning_problems


@settings(max_examples=60, deadline=None)
@given(planning_problems(max_sites=6))
def test_no_single_step_would_improve_the_plan(problem: PlanningProblem) -> None:
    """A plan that is one replacement of equal sites away is not left on the table."""
    selection = select(problem)
    for c in selection.chosen:
        for d, sites in enumerate(problem.members):
            if sites == problem.members[c] and problem.price[d] < problem.price[c]:
                swapped = {*selection.chosen, d} - {c}
                assert tuple(sorted(swapped)) not in every_plan(problem)


def test_it_shrinks_where_that_costs_least() -> None:
    # One site is big and matters little: it alone should pay.
    problem = PlanningProblem(
        num_sites=2,
        members=((0,), (0,), (1,), (1,)),
        price=(0.0, 1.0, 0.0, 8.0),
        cost={"parameters": (100, 50, 100, 50)},
        budget={"parameters": 150},
    )
    assert select(problem).chosen == (1, 2)


def test_it_merges_where_no_site_has_a_single() -> None:
    problem = PlanningProblem(
        num_sites=4,
        members=((0, 1), (2, 3), (0, 1, 2, 3), (0, 1)),
        price=(1.0, 1.0, 5.0, 0.5),
        cost={"parameters": (4, 4, 5, 7)},
        budget={"parameters": 8},
    )
    selection = select(problem)
    assert selection.chosen == (0, 1)
    assert selection.objective == 2.0
