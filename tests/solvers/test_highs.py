from __future__ import annotations

import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from npas_fx.errors import SolverWarning
from npas_fx.solvers import PlanningProblem, cp_sat, greedy
from npas_fx.solvers.exact_cover import CoverProgram
from npas_fx.solvers.highs import minimise, select
from npas_fx.solvers.problem import Incidence
from npas_fx.solvers.reduce import reduce
from planning_problems import ANY_PRICES, every_plan, exact_price, planning_problems

examples = settings(max_examples=60, deadline=None)


def without_ortools(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*sys.modules, "ortools"]:
        if name.split(".")[0] == "ortools":
            monkeypatch.setitem(sys.modules, name, None)


def runs(num_sites: int, budget: int) -> PlanningProblem:
    """Singles and runs of neighbours in three sizes: too many plans to enumerate."""
    members: list[tuple[int, ...]] = []
    price: list[float] = []
    cost: list[int] = []
    for length in (1, 2, 3):
        for start in range(num_sites - length + 1):
            for k in (1, 2, 3):
                members.append(tuple(range(start, start + length)))
                price.append(float(length * (4 - k) ** 2 + (5 * start) % 7))
                cost.append(20 * k * length - 3 * (length - 1) * k + (3 * start) % 5)
    return PlanningProblem(
        num_sites=num_sites,
        members=tuple(members),
        price=tuple(price),
        cost={"parameters": tuple(cost)},
        budget={"parameters": budget},
    )


def of_huge_costs(problem: PlanningProblem, power: int, noise: list[int]) -> PlanningProblem:
    """Each cost some units above a multiple of a power of two: floats of HiGHS hardly see those."""
    cost = {
        r: tuple((entry << power) + noise[c % len(noise)] for c, entry in enumerate(entries))
        for r, entries in problem.cost.items()
    }
    budget = {r: (entry << power) + noise[0] for r, entry in problem.budget.items()}
    return replace(problem, cost=cost, budget=budget)


@examples
@given(planning_problems(max_sites=6, rules=True))
def test_selection_is_the_true_optimum(problem: PlanningProblem) -> None:
    plans = every_plan(problem)
    reduced = reduce(problem)
    program = CoverProgram.of(reduced, [int(8 * price) for price in reduced.price])
    assert minimise(program).status == ("optimal" if plans else "infeasible")
    selection = select(problem)
    assert (selection.status == "infeasible") == (not plans)
    assume(plans)
    assert selection.chosen in plans
    assert selection.objective == min(exact_price(problem, plan) for plan in plans)
    assert (selection.status, selection.bound, selection.gap) == (
        "optimal",
        selection.objective,
        0.0,
    )


@examples
@given(planning_problems(max_sites=12, max_candidates=60))
def test_it_agrees_with_cp_sat(problem: PlanningProblem) -> None:
    one, other = select(problem), cp_sat.select(problem)
    assert (one.status, one.objective) == (other.status, other.objective)


@pytest.mark.parametrize("budget", [705, 780, 840])
def test_it_agrees_with_cp_sat_on_more_sites(budget: int) -> None:
    one, other = select(runs(25, budget)), cp_sat.select(runs(25, budget))
    assert one.status == other.status == "optimal"
    assert one.objective == other.objective


@examples
@given(planning_problems(max_sites=6, prices=ANY_PRICES, rules=True))
def test_plan_is_never_worse_than_the_greedy_one(problem: PlanningProblem) -> None:
    best, quick = select(problem), greedy.select(problem)
    assert best.status == quick.status == "infeasible" or best.objective <= quick.objective


@examples
@given(planning_problems(max_sites=6), st.sampled_from([0.01, 0.3, 1.0]))
def test_a_gap_that_is_allowed_is_not_exceeded(problem: PlanningProblem, gap: float) -> None:
    plans = every_plan(problem)
    assume(plans)
    best = min(exact_price(problem, plan) for plan in plans)
    selection = select(problem, gap=gap)
    assert selection.bound <= best <= selection.objective
    assert selection.objective - selection.bound <= gap * abs(selection.objective) + 0.125


@examples
@given(
    problem=planning_problems(max_sites=5, rules=True),
    power=st.sampled_from([30, 40, 50]),
    noise=st.lists(st.integers(0, 3), min_size=1, max_size=5),
)
def test_budgets_that_tolerances_would_overrun_are_kept(
    problem: PlanningProblem, power: int, noise: list[int]
) -> None:
    problem = of_huge_costs(problem, power, noise)
    plans = every_plan(problem)
    selection = select(problem)
    assert selection.chosen in (plans or [()])
    assert (selection.status == "infeasible") == (not plans)
    reduced = reduce(problem)
    program = CoverProgram.of(reduced, [int(8 * price) for price in reduced.price])
    cover = minimise(program)
    assert cover.chosen is None or program.fits(cover.chosen)
    if plans:
        best = min(8 * exact_price(problem, plan) for plan in plans)
        assert cover.bound is not None
        assert cover.bound <= best
        assert cover.status != "optimal" or program.total(cover.chosen or ()) == best
    else:
        assert cover.status in ("infeasible", "unknown")


def test_a_budget_that_is_overrun_by_one_is_tightened() -> None:
    half = 2**43
    program = CoverProgram(
        num_sites=2,
        incidence=Incidence.of([(0,), (0,), (1,), (1,)]),
        price=np.array([0, 5, 0, 7]),
        cost={"parameters": np.array([half + 1, half // 2, half, half // 2])},
        budget={"parameters": 2 * half},
    )
    cover = minimise(program)
    assert (cover.chosen, cover.bound, cover.status) == ((1, 2), 0, "feasible")


def test_a_cover_that_tolerances_cannot_tell_from_too_dear_ones_is_left_to_others() -> None:
    half = 2**43
    problem = PlanningProblem(
        num_sites=2,
        members=((0,), (0,), (1,)),
        price=(0.0, 5.0, 0.0),
        cost={"parameters": (half + 1, half, half)},
        budget={"parameters": 2 * half},
    )
    selection = select(problem)
    assert (selection.chosen, selection.status) == ((1, 2), "feasible")
    assert selection.bound == 0.0


def test_a_search_without_time_still_has_the_greedy_plan() -> None:
    problem = runs(25, 840)
    cut, quick, best = select(problem, seconds=0.0), greedy.select(problem), select(problem)
    assert cut.status == "feasible"
    assert cut.bound <= best.objective <= cut.objective <= quick.objective
    assert not cut.is_reproducible
    assert best.is_reproducible


def test_without_ortools_a_warning_says_that_highs_solves(monkeypatch: pytest.MonkeyPatch) -> None:
    best = cp_sat.select(runs(25, 840))
    without_ortools(monkeypatch)
    with pytest.warns(SolverWarning, match="pip install ortools"):
        selection = cp_sat.select(runs(25, 840))
    assert (selection.objective, selection.status) == (best.objective, "optimal")


@examples
@given(planning_problems(max_sites=6, rules=True))
def test_without_ortools_the_optimum_is_found(problem: PlanningProblem) -> None:
    plans = every_plan(problem)
    expected = cp_sat.select(problem)
    with pytest.MonkeyPatch.context() as monkeypatch, warnings.catch_warnings():
        without_ortools(monkeypatch)
        warnings.simplefilter("ignore", SolverWarning)
        selection = cp_sat.select(problem)
    assert (selection.status, selection.obstacle) == (expected.status, expected.obstacle)
    assert selection.objective == min((exact_price(problem, p) for p in plans), default=None)


def test_it_does_not_need_ortools_itself() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_ortools(monkeypatch)
        assert select(runs(25, 840)).status == "optimal"
