from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npas_fx.solvers import (
    PlanningProblem,
    PlanningProblemError,
    Selection,
    cp_sat,
    select_frontier,
)
from npas_fx.solvers.frontier import select_each
from npas_fx.solvers.rounds import Limits, Round
from planning_problems import every_plan, exact_price, ladder, planning_problems, with_budget

examples = settings(max_examples=60, deadline=None)
CUT_SHORT = Limits(rounds=(Round(columns=None, limit=0.0),))


@examples
@given(
    problem=planning_problems(max_sites=6, num_resources=1, rules=True),
    budgets=st.lists(st.integers(0, 30), max_size=5),
)
def test_each_budget_gets_the_true_optimum(problem: PlanningProblem, budgets: list[int]) -> None:
    for budget, selection in zip(budgets, select_frontier(problem, budgets), strict=True):
        alone = with_budget(problem, "parameters", budget)
        plans = every_plan(alone)
        if plans:
            assert selection.objective == min(exact_price(problem, plan) for plan in plans)
            assert selection.status == "optimal"
            assert selection.chosen in plans
        else:
            assert replace(selection, seconds=0.0) == replace(cp_sat.select(alone), seconds=0.0)


@examples
@given(
    problem=planning_problems(max_sites=6, num_resources=2),
    budgets=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=5),
)
def test_less_of_everything_is_never_better(
    problem: PlanningProblem, budgets: list[tuple[int, int]]
) -> None:
    given_ = [{"parameters": a, "bytes": b} for a, b in budgets]
    selections = select_frontier(problem, given_, limits=CUT_SHORT)
    for less, one in zip(budgets, selections, strict=True):
        for more, other in zip(budgets, selections, strict=True):
            if less[0] <= more[0] and less[1] <= more[1] and one.objective is not None:
                assert other.objective <= one.objective
                assert other.bound <= one.bound


def test_it_is_monotone_also_where_searches_are_cut_short() -> None:
    problem = ladder(30, 1483)
    budgets = list(range(900, 2400, 100))
    selections = select_frontier(problem, budgets, limits=CUT_SHORT)
    objectives = [selection.objective for selection in selections]
    assert objectives == sorted(objectives, reverse=True)
    assert len(set(objectives)) > 5
    for budget, selection in zip(budgets, selections, strict=True):
        best = cp_sat.select(with_budget(problem, "parameters", budget))
        assert selection.bound <= best.objective <= selection.objective


def test_budgets_come_back_in_their_order() -> None:
    problem = ladder(12, 600)
    high, low, middle = select_frontier(problem, [900, 300, 600])
    assert high.objective < middle.objective < low.objective
    assert middle.objective == cp_sat.select(problem).objective


def test_a_budget_of_what_is_not_counted_is_refused() -> None:
    with pytest.raises(PlanningProblemError, match=r"a budget of 'flops'.*counts 'parameters'"):
        select_frontier(ladder(3, 200), [{"flops": 3}])
    with pytest.raises(PlanningProblemError, match=r"budget\['parameters'\]=-1"):
        select_frontier(ladder(3, 200), [-1])


def test_any_solver_gets_the_better_plan_of_less_budget_and_a_bound_below_it() -> None:
    problem = PlanningProblem(
        num_sites=2,
        members=((0,), (1,), (0, 1)),
        price=(2.0, 2.0, 1.0),
        cost={"parameters": (5, 5, 4)},
        budget={"parameters": 14},
    )

    def careless(given: PlanningProblem) -> Selection:
        """Say of the dearest plan within the budget that it is the best."""
        chosen, price = ((2,), 1.0) if given.budget["parameters"] < 10 else ((0, 1), 4.0)
        return replace(cp_sat.select(given), chosen=chosen, objective=price, bound=price)

    selections = select_each(problem, [10, 4, 11], careless)
    assert [selection.chosen for selection in selections] == [(2,)] * 3
    assert [selection.objective for selection in selections] == [1.0] * 3
    assert [selection.bound for selection in selections] == [1.0] * 3
    assert [selection.gap for selection in selections] == [0.0] * 3
