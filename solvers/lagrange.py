"""The dynamic program over a clustering tree, with Lagrange multipliers for the budgets."""

from __future__ import annotations

import time

from npas_fx.solvers import greedy
from npas_fx.solvers.certify import certify, certify_infeasible
from npas_fx.solvers.exact_cover import CoverProgram
from npas_fx.solvers.integer_prices import to_integers
from npas_fx.solvers.problem import PlanningProblem
from npas_fx.solvers.reduce import reduce
from npas_fx.solvers.selection import Selection
from npas_fx.solvers.trees import search


def select(problem: PlanningProblem) -> Selection:
    """Solve the planning problem on trees, where it comes apart, and bound it on all candidates.

    Of the plans on trees that stay within the budgets (``npas_fx.solvers.trees``) the best goes on
    by the steps of ``greedy.plan``. So the plan is never worse than the greedy one, and whether
    there is one is decided exactly. The bound is over all candidates, with multipliers of the sites
    that come from a tree and are then fitted to all of them.

    Args:
        problem: What is asked. ``Selection.work`` says how many plans on trees were met.
    """
    start = time.perf_counter()
    reduced = reduce(problem)
    prices = to_integers(reduced.price)
    found = search(CoverProgram.of(reduced, prices.values))
    cover = greedy.plan(reduced, found.cover)
    if cover is None:
        return certify_infeasible(problem, seconds=time.perf_counter() - start)
    return certify(
        problem,
        reduced,
        [cover],
        prices.to_price(found.bound),
        prices=prices,
        multipliers=found.multipliers,
        work={"plans": found.num_plans},
        seconds=time.perf_counter() - start,
    )
