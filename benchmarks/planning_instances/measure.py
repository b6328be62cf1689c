"""Measure what solving instances and planning models takes, next to one fixed solve."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any, Generic, TypeVar
from unittest.mock import patch

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csc_array, csr_array

import npas_fx
import npas_fx.planning
from npas_fx.ir import Inventory, Plan
from npas_fx.profiles import PROFILES
from npas_fx.rules import apply_rules
from npas_fx.solvers import PlanningProblem, Selection, Solver, select_frontier
from npas_fx.solvers.problem import Incidence
from planning_instances.seeded import RESOURCE, Instance, make_instance

_T = TypeVar("_T")

# Where a plan of a model takes its time: a function of npas_fx.planning -> the step.
CALLED = {
    "propose": "propose",
    "refine": "refine",
    "add_near": "refine",
    "select_each": "solve",
    "fill": "fill",
}
STEPS = ("profile", "propose", "refine", "solve", "fill", "other")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed(Generic[_T]):
    """What a call gave, and what it took: in seconds, and as a multiple of the fixed solve."""

    result: _T
    seconds: float
    multiple: float


class FixedSolve:
    """The linear relaxation of one problem by HiGHS's dual simplex, with nothing of ours.

    Attributes:
        what: Words for the problem.
        seconds: Of all solves so far.
    """

    def __init__(self, problem: PlanningProblem, *, what: str) -> None:
        self.what = what
        incidence = Incidence.of(problem.members)
        cover = csc_array(
            (np.ones(len(incidence.sites)), incidence.sites, incidence.starts),
            shape=(problem.num_sites, len(problem.members)),
        )
        unit = problem.budget[RESOURCE] / problem.num_sites
        self._solve = partial(
            linprog,
            np.array(problem.price) / max(problem.price),
            A_eq=cover,
            b_eq=np.ones(problem.num_sites),
            A_ub=csr_array(np.array([problem.cost[RESOURCE]]) / unit),
            b_ub=[problem.num_sites],
            method="highs-ds",
        )
        self._time()  # imports HiGHS
        self.seconds = [self._time()]

    def measure(self, function: Callable[..., _T], *args: Any) -> Timed[_T]:
        """Time a call between two fixed solves."""
        gc.collect()  # not in the time of the call
        before = self._time()
        start = time.perf_counter()
        result = function(*args)
        seconds = time.perf_counter() - start
        around = before, self._time()
        self.seconds += around
        return Timed(result=result, seconds=seconds, multiple=seconds / mean(around))

    def _time(self) -> float:
        start = time.perf_counter()
        result = self._solve()
        assert result.status == 0, result.message
        return time.perf_counter() - start


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """All that was measured of one instance.

    Attributes:
        instance: What was solved.
        made: Making it, in each repetition.
        runs: Budget and solver -> a selection in each repetition.
        frontiers: Selections for all budgets at once, in each repetition.
    """

    instance: Instance
    made: list[Timed[None]]
    runs: dict[tuple[float, str], list[Timed[Selection]]]
    frontiers: list[Timed[list[Selection]]]

    def bound(self, budget: float) -> float:
        """The best one known of this budget: no plan has a lower price."""
        known = [
            run.result.bound
            for (asked, _), runs in self.runs.items()
            for run in runs
            if asked == budget and run.result.bound is not None
        ]
        return max(known, default=-np.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """All that was measured of one model.

    Attributes:
        name: Of the model.
        captured: Its inventory.
        runs: Budget -> a plan in each repetition.
        steps: Budget -> in each repetition, step -> seconds.
    """

    name: str
    captured: Timed[Inventory]
    runs: dict[float, list[Timed[Plan]]]
    steps: dict[float, list[dict[str, float]]]


def solve_instance(
    num_sites: int,
    seed: int,
    budgets: Sequence[float],
    select_by: Mapping[str, Solver],
    *,
    repeats: int,
    with_frontier: bool,
    fixed: FixedSolve,
) -> Solved:
    """Solve an instance at all budgets by all solvers, which take turns."""
    made: list[Timed[None]] = []
    frontiers: list[Timed[list[Selection]]] = []
    runs: dict[tuple[float, str], list[Timed[Selection]]] = {
        (budget, name): [] for budget in budgets for name in select_by
    }
    for repeat in range(repeats):
        where = f"{num_sites:,} sites, repetition {repeat + 1} of {repeats}"
        making = fixed.measure(make_instance, num_sites, seed)
        instance = making.result
        # Without the result: one of them is large enough.
        made.append(Timed(result=None, seconds=making.seconds, multiple=making.multiple))
        for budget, name in runs:
            run = fixed.measure(_solve, instance, budget, select_by[name])
            runs[budget, name].append(run)
            _say(f"{where}: {name} at {budget:.0%} took {run.seconds:.1f} s")
        if with_frontier:
            frontiers.append(fixed.measure(_solve_frontier, instance, budgets))
            _say(f"{where}: all budgets at once took {frontiers[-1].seconds:.1f} s")
    return Solved(instance=instance, made=made, runs=runs, frontiers=frontiers)


def _solve(instance: Instance, budget: float, select: Solver) -> Selection:
    return select(instance.problem(budget))


def _solve_frontier(instance: Instance, budgets: Sequence[float]) -> list[Selection]:
    amounts = [instance.amount(budget) for budget in budgets]
    return select_frontier(instance.problem(max(budgets)), amounts)


def plan_model(name: str, budgets: Sequence[float], *, repeats: int, fixed: FixedSolve) -> Planned:
    """Capture a model once, and plan it at all budgets, which take turns."""
    from planning_instances.models import make_model  # not before it is needed: it takes seconds

    model, example = make_model(name)
    captured = fixed.measure(partial(npas_fx.inspect, model, example_kwargs=example))
    _say(f"{name}: capture took {captured.seconds:.1f} s")
    runs: dict[float, list[Timed[Plan]]] = {budget: [] for budget in budgets}
    steps: dict[float, list[dict[str, float]]] = {budget: [] for budget in budgets}
    for repeat in range(repeats):
        for budget in budgets:
            times = dict.fromkeys(STEPS, 0.0)
            run = fixed.measure(_plan, captured.result, budget, times)
            times["other"] = run.seconds - sum(times.values())
            runs[budget].append(run)
            steps[budget].append(times)
            where = f"{name}, repetition {repeat + 1} of {repeats}"
            _say(f"{where}: a plan at {budget:.0%} took {run.seconds:.1f} s")
    return Planned(name=name, captured=captured, runs=runs, steps=steps)


def _plan(inventory: Inventory, budget: float, times: dict[str, float]) -> Plan:
    """Do what ``npas_fx.plan`` does after capture, with timers around what it calls."""
    planning = npas_fx.planning
    profile = _timed(times, "profile", PROFILES["structure"])
    with ExitStack() as stack:
        for name, step in CALLED.items():
            timed = _timed(times, step, getattr(planning, name))
            stack.enter_context(patch.object(planning, name, timed))
        return planning.make_plan(apply_rules(inventory), budget, profile=profile)


def _timed(times: dict[str, float], step: str, function: Callable[..., _T]) -> Callable[..., _T]:
    """Add what each call of the function takes to the time of a step."""

    def call(*args: Any, **kwargs: Any) -> _T:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            times[step] += time.perf_counter() - start

    return call


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
