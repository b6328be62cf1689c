"""The same problem under many budgets, by any solver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from npas_fx.solvers import cp_sat
from npas_fx.solvers.floor import cheapest_plan
from npas_fx.solvers.problem import PlanningProblem, fits, total_price
from npas_fx.solvers.reduce import reduce
from npas_fx.solvers.selection import Selection, relative_gap

if TYPE_CHECKING:
    from npas_fx.solvers import Solver


def select_each(
    problem: PlanningProblem,
    budgets: Sequence[int],
    select: Solver,
    known: Sequence[tuple[int, ...]] = (),
) -> list[Selection]:
    """Solve the same problem under many budgets; more budget is never worse.

    Args:
        problem: What is asked, but for the budget of its first resource.
        budgets: Of that.
        select: Any solver; that of ``cp_sat`` solves them together.
        known: Plans that keep the rules, under whatever budgets. No plan is worse than one of
            these that fits.

    Returns:
        One selection for each budget, in their order.
    """
    resource = next(iter(problem.budget))
    asked = [replace(problem, budget={**problem.budget, resource: budget}) for budget in budgets]
    if select is cp_sat.select:
        selections = cp_sat.select_frontier(problem, budgets)
    else:
        selections = [select(each) for each in asked]
    plans = [plan for plan in known if plan]
    for k in sorted(range(len(asked)), key=lambda k: budgets[k]):
        selections[k] = _best(asked[k], selections[k], plans)
        plans.append(selections[k].chosen)
    return selections


def _best(
    problem: PlanningProblem, selection: Selection, plans: Sequence[tuple[int, ...]]
) -> Selection:
    """Take a better plan in place of that of a selection, where one fits."""
    if selection.objective is None or selection.bound is None:
        return selection
    fitting = [plan for plan in plans if plan and fits(problem, plan)]
    best = min(fitting, key=lambda plan: total_price(problem, plan), default=selection.chosen)
    objective = total_price(problem, best)
    if objective >= selection.objective:
        return selection
    bound = min(objective, selection.bound)
    gap = relative_gap(problem, objective, bound, lambda: cheapest_plan(reduce(problem), problem))
    return replace(selection, chosen=best, objective=objective, bound=bound, gap=gap)
