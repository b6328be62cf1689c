"""The certificate properties, over all of SOLVERS where they hold for any solver."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from npas_fx.solvers import SOLVERS, PlanningProblem, Selection, cp_sat, greedy, rounds
from npas_fx.solvers.exact_cover import CoverProgram
from npas_fx.solvers.integer_prices import to_integers
from npas_fx.solvers.problem import Incidence, restrict
from npas_fx.solvers.reduce import reduce
from npas_fx.solvers.relaxation import Multipliers, bound_by, relax
from npas_fx.solvers.rounds import Limits, Round
from planning_problems import (
    ANY_PRICES,
    every_plan,
    exact_price,
    ladder,
    planning_problems,
    smallest_budgets,
    with_budget,
)

every_solver = pytest.mark.parametrize("name", SOLVERS)
examples = settings(max_examples=60, deadline=None)


@examples
@given(planning_problems(max_sites=6, rules=True))
def test_selection_is_the_true_optimum(problem: PlanningProblem) -> None:
    plans = every_plan(problem)
    assume(plans)
    selection = cp_sat.select(problem)
    assert selection.objective == min(exact_price(problem, plan) for plan in plans)
    assert selection.status == "optimal"
    assert selection.bound == selection.objective
    assert selection.gap == 0.0


@examples
@given(planning_problems(max_sites=5, prices=ANY_PRICES))
def test_selection_is_optimal_up_to_the_stated_rounding(problem: PlanningProblem) -> None:
    plans = every_plan(problem)
    assume(plans)
    selection = cp_sat.select(problem)
    best = min(exact_price(problem, plan) for plan in plans)
    largest = max(abs(price) for price in problem.price)
    rounding = problem.num_sites * len(problem.price) * 2.0**-51 * largest
    assert selection.status == "optimal"
    assert selection.bound is not None
    assert selection.objective is not None
    assert selection.bound <= float(best) <= selection.objective
    assert selection.objective - selection.bound <= rounding + math.ulp(selection.objective)


@every_solver
@examples
@given(problem=planning_problems(max_sites=6, rules=True))
def test_chosen_candidates_cover_exactly_within_every_budget(
    name: str, problem: PlanningProblem
) -> None:
    selection = SOLVERS[name](problem)
    plans = every_plan(problem)
    assert (selection.status == "infeasible") == (not plans)
    assert selection.chosen in (plans or [()])
    if plans:
        assert selection.objective == float(exact_price(problem, selection.chosen))
    else:
        assert selection.objective is selection.bound is selection.gap is None


@every_solver
@examples
@given(problem=planning_problems(max_sites=6, prices=ANY_PRICES, rules=True))
def test_bound_is_below_every_plan(name: str, problem: PlanningProblem) -> None:
    selection = SOLVERS[name](problem)
    assume(selection.status != "infeasible")
    assert selection.bound is not None
    assert selection.objective is not None
    best = min(exact_price(problem, plan) for plan in every_plan(problem))
    assert selection.bound <= float(best) <= selection.objective
    assert selection.gap is not None
    assert selection.gap >= 0
    assert (selection.gap == 0) == (selection.bound == selection.objective)


@examples
@given(planning_problems(max_sites=6, prices=ANY_PRICES))
def test_plan_is_never_worse_than_the_greedy_one(problem: PlanningProblem) -> None:
    best, quick = cp_sat.select(problem), greedy.select(problem)
    assert best.status == "infeasible" or best.objective <= quick.objective


@every_solver
@examples
@given(problem=planning_problems(max_sites=6, num_resources=1, rules=True))
def test_smallest_budget_succeeds_and_one_fewer_does_not(
    name: str, problem: PlanningProblem
) -> None:
    select = SOLVERS[name]
    smallest = smallest_budgets(problem)
    assume(smallest)
    least = smallest["parameters"]
    assert select(with_budget(problem, "parameters", least)).status != "infeasible"
    if least > 0:
        below = select(with_budget(problem, "parameters", least - 1))
        assert below.status == "infeasible"
        assert below.obstacle is not None
        assert below.obstacle.smallest == {"parameters": least}


@examples
@given(problem=planning_problems(max_sites=6, num_resources=1), more=st.integers(1, 20))
def test_more_budget_is_never_worse(problem: PlanningProblem, more: int) -> None:
    before = cp_sat.select(problem)
    assume(before.objective is not None)
    after = cp_sat.select(with_budget(problem, "parameters", problem.budget["parameters"] + more))
    assert after.objective <= before.objective


@examples
@given(problem=planning_problems(max_sites=6), data=st.data())
def test_more_candidates_are_never_worse(problem: PlanningProblem, data: st.DataObject) -> None:
    before = cp_sat.select(problem)
    assume(before.objective is not None)
    sites = data.draw(st.sets(st.integers(0, problem.num_sites - 1), min_size=1))
    added = replace(
        problem,
        members=(*problem.members, tuple(sorted(sites))),
        price=(*problem.price, data.draw(st.integers(-64, 64)) / 8),
        cost={r: (*cost, data.draw(st.integers(0, 12))) for r, cost in problem.cost.items()},
    )
    assert cp_sat.select(added).objective <= before.objective


@examples
@given(problem=planning_problems(max_sites=6), data=st.data())
def test_order_of_candidates_changes_only_the_choice_among_equals(
    problem: PlanningProblem, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(problem.members))))
    shuffled = restrict(problem, order)
    before, after = cp_sat.select(problem), cp_sat.select(shuffled)
    assert (before.objective, before.status, before.obstacle) == (
        after.objective,
        after.status,
        after.obstacle,
    )


@every_solver
def test_two_runs_give_the_same_selection(name: str) -> None:
    problem = ladder(30, 1500)
    first, second = (replace(SOLVERS[name](problem), seconds=0.0) for _ in range(2))
    assert first == second


def test_another_process_gives_the_same_selection(request: pytest.FixtureRequest) -> None:
    """Sets and hashes differ from process to process; the plan must not."""
    problem = ladder(12, 600)
    code = (
        "import json, sys; from dataclasses import asdict, replace\n"
        "from npas_fx.solvers import PlanningProblem, cp_sat\n"
        "given = json.load(sys.stdin); given['members'] = tuple(map(tuple, given['members']))\n"
        "given['private'] = frozenset(given['private'])\n"
        "selection = cp_sat.select(PlanningProblem(**given))\n"
        "print(json.dumps(asdict(replace(selection, seconds=0.0))))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(asdict(problem), default=list),
        capture_output=True,
        text=True,
        check=True,
    )
    here = asdict(replace(cp_sat.select(problem), seconds=0.0))
    assert json.loads(run.stdout) == json.loads(json.dumps(here))


def test_a_ladder_is_solved_to_the_end() -> None:
    selection = cp_sat.select(ladder(30, 1500))
    assert selection.status == "optimal"
    assert selection.gap == 0.0
    assert selection.num_candidates == len(ladder(30, 1500).members)


LADDER = ladder(30, 1483)
BEST = Limits(rounds=(Round(columns=None, limit=None),))


def test_a_search_that_is_cut_short_still_bounds() -> None:
    best = cp_sat.select(LADDER, limits=BEST)
    cut = cp_sat.select(LADDER, limits=Limits(rounds=(Round(columns=None, limit=0.0),)))
    assert best.status == "optimal"
    assert cut.bound <= best.objective <= cut.objective
    assert cut.objective <= greedy.select(LADDER).objective
    assert cut.is_reproducible


def test_a_search_that_wall_time_cuts_short_says_so() -> None:
    best, cut = cp_sat.select(LADDER, limits=BEST), cp_sat.select(LADDER, seconds=0.0)
    assert cut.status == "feasible"
    assert cut.bound <= best.objective <= cut.objective
    assert cut.objective <= greedy.select(LADDER).objective
    assert best.is_reproducible
    assert not cut.is_reproducible


@pytest.mark.parametrize("close_enough", [0.0, 0.03, 0.5])
def test_a_search_that_stops_close_enough_still_bounds(close_enough: float) -> None:
    best = cp_sat.select(LADDER, limits=BEST)
    limits = Limits(rounds=(Round(columns=None, limit=8.0),), close_enough=close_enough)
    close = cp_sat.select(LADDER, limits=limits)
    assert close.bound <= best.objective <= close.objective
    assert close.gap <= close_enough
    assert (close.work["cp_sat"] > 0) == (close_enough == 0.0)  # greedy is close enough otherwise


def test_of_many_sites_a_plan_may_be_further_from_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    greedy_gap = cp_sat.select(LADDER, limits=Limits(rounds=())).gap
    limits = Limits(rounds=(Round(columns=None, limit=8.0),), close_enough=greedy_gap / 2.5)

    def work(sites_of_one_gap: float) -> float:
        monkeypatch.setattr(rounds, "SITES_OF_ONE_GAP", sites_of_one_gap)
        return cp_sat.select(LADDER, limits=limits).work["cp_sat"]

    assert work(31) > 0  # 30 sites are not many
    assert work(15) > 0  # twice as far is not far enough
    assert work(10) == 0  # three times is
    limits = replace(limits, close_enough=greedy_gap / 4.5)
    assert work(1) > 0  # never more than four times


@pytest.mark.parametrize("columns", [0, 1, 10, 50, 200, 1000])
def test_searches_among_few_candidates_claim_no_more_than_they_prove(columns: int) -> None:
    best = cp_sat.select(LADDER, limits=BEST)
    cut = cp_sat.select(LADDER, limits=Limits(rounds=(Round(columns=columns, limit=None),)))
    assert cut.bound <= best.objective <= cut.objective
    assert (cut.status == "optimal") == (cut.gap == 0.0)
    if columns == 0:
        assert cut.status == "feasible"
        assert cut.gap == (cut.objective - cut.bound) / cut.objective
    if columns == 1000:
        assert cut.status == "optimal"


def test_searches_among_few_candidates_first_prove_as_much() -> None:
    rounds = (Round(columns=0, limit=1.0), Round(columns=30, limit=1.0), *BEST.rounds)
    best = cp_sat.select(LADDER, limits=BEST)
    assert best.objective == cp_sat.select(LADDER, limits=Limits(rounds=rounds)).objective


def test_budgets_that_only_fit_together_in_one_plan_are_found() -> None:
    # Each resource has a cheaper cover of its own; only the middle one fits both budgets.
    problem = PlanningProblem(
        num_sites=1,
        members=((0,), (0,), (0,)),
        price=(0.0, 0.0, 9.0),
        cost={"parameters": (1, 9, 5), "bytes": (9, 1, 5)},
        budget={"parameters": 5, "bytes": 5},
    )
    for select in SOLVERS.values():
        assert select(problem).chosen == (2,)
        assert select(with_budget(problem, "bytes", 4)).status == "infeasible"


def test_gap_is_measured_against_the_cheapest_plan_where_the_objective_is_small() -> None:
    problem = PlanningProblem(
        num_sites=1,
        members=((0,), (0,)),
        price=(0.0, 4e6),
        cost={"parameters": (2, 1)},
        budget={"parameters": 2},
    )
    assert greedy.select(problem).gap == 0.0
    two = PlanningProblem(
        num_sites=2,
        members=((0,), (1,), (0, 1), (0, 1)),
        price=(0.0, 0.0, -1.0, 4e6),
        cost={"parameters": (2, 2, 9, 1)},
        budget={"parameters": 4},
    )
    selection = greedy.select(two)
    assert (selection.objective, selection.bound) == (0.0, -1.0)
    assert selection.gap == 1.0 / 4.0


def test_gap_is_infinite_where_there_is_no_scale() -> None:
    problem = PlanningProblem(
        num_sites=1, members=((0,), (0,)), price=(0.0, -1.0), cost={"n": (1, 2)}, budget={"n": 1}
    )
    selection = greedy.select(problem)
    assert selection.bound == -1.0
    assert selection.gap == math.inf
    assert cp_sat.select(problem).gap == 0.0


@examples
@given(st.lists(ANY_PRICES | st.floats(allow_nan=False, allow_infinity=False, width=32)))
def test_prices_are_rounded_down_by_less_than_a_unit(price: list[float]) -> None:
    prices = to_integers(price)
    unit = Fraction(2) ** -prices.shift
    for p, value in zip(price, prices.values, strict=True):
        assert 0 <= Fraction(p) - value * unit < unit
    assert sum(map(abs, prices.values)) <= 2**53
    assert prices.to_price(sum(prices.values)) == float(sum(prices.values) * unit)


@given(st.lists(st.integers(-(2**30), 2**30)), st.integers(-60, 60))
def test_multiples_of_a_power_of_two_are_not_rounded(multiples: list[int], power: int) -> None:
    price = [n * 2.0**power for n in multiples]
    prices = to_integers(price)
    assert [Fraction(v) * Fraction(2) ** -prices.shift for v in prices.values] == price


@examples
@given(planning_problems(max_sites=6))
def test_relaxation_bounds_the_plans_with_each_candidate(problem: PlanningProblem) -> None:
    reduced = reduce(problem)
    relaxation = relax(CoverProgram.of(reduced, [int(8 * price) for price in reduced.price]))
    for plan in every_plan(problem):
        price = 8 * exact_price(problem, plan)
        assert relaxation.bound <= price
        used = [k for k, c in enumerate(reduced.given) if c in plan]
        assert all(relaxation.bound_with[k] <= price for k in used)


@examples
@given(problem=planning_problems(max_sites=6), data=st.data())
def test_any_multipliers_bound_the_plans(problem: PlanningProblem, data: st.DataObject) -> None:
    reduced = reduce(problem)
    program = CoverProgram.of(reduced, [int(8 * price) for price in reduced.price])
    numbers = st.integers(-(2**70), 2**70)
    multipliers = Multipliers(
        site=np.array([data.draw(numbers) for _ in range(problem.num_sites)], object),
        resource={r: abs(data.draw(numbers)) for r in problem.cost},
    )
    bound, bound_with = bound_by(program, multipliers)
    for plan in every_plan(problem):
        price = 8 * exact_price(problem, plan)
        assert bound <= price
        assert all(bound_with[k] <= price for k, c in enumerate(reduced.given) if c in plan)


def test_selections_compare_by_value() -> None:
    selection = cp_sat.select(ladder(3, 200))
    assert isinstance(selection, Selection)
    assert selection == replace(selection)


def test_relaxation_prices_the_budget() -> None:
    # Half of each candidate meets the budget: the relaxation is worth 5, and either costs more.
    program = CoverProgram(
        num_sites=1,
        incidence=Incidence.of([(0,), (0,), (0,)]),
        price=np.array([0, 10, 20]),
        cost={"parameters": np.array([10, 0, 0])},
        budget={"parameters": 5},
    )
    relaxation = relax(program)
    assert relaxation.bound == 5
    assert relaxation.bound_with.tolist() == [5, 5, 15]


def test_selection_prices_the_budget_and_the_sites() -> None:
    problem = PlanningProblem(
        num_sites=2,
        members=((0,), (0,), (1,), (1,)),
        price=(0.0, 10.0, 0.0, 20.0),
        cost={"parameters": (10, 0, 10, 0)},
        budget={"parameters": 15},
    )
    selection = cp_sat.select(problem)
    assert selection.shadow_price == pytest.approx({"parameters": 1.0})
    assert selection.site_value == pytest.approx((10.0, 10.0))
