"""The whole program at once, solved by HiGHS: an independent check of CP-SAT, and its stand-in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from npas_fx.solvers import greedy
from npas_fx.solvers.certify import certify, certify_infeasible
from npas_fx.solvers.exact_cover import Cover, CoverProgram
from npas_fx.solvers.integer_prices import to_integers
from npas_fx.solvers.problem import PlanningProblem
from npas_fx.solvers.reduce import reduce
from npas_fx.solvers.rounds import EMERGENCY, Clock
from npas_fx.solvers.selection import Selection

# HiGHS's own, absolute: constraints may be violated by it, and covers that are better by less than
# it are not looked for.
TOLERANCE = 1e-6
# How often budgets are tightened that HiGHS's tolerance overran; once does it but for rounding.
MAX_ATTEMPTS = 3


def select(problem: PlanningProblem, *, gap: float = 0.0, seconds: float = EMERGENCY) -> Selection:
    """Solve the planning problem by HiGHS, to the last digit of its tolerance.

    The formula is that of ``npas_fx.solvers.exact_cover.minimise``, over all candidates. The plan
    is never worse than the greedy one. Without a limit of work this takes minutes where
    ``cp_sat.select`` takes seconds.

    Args:
        problem: What is asked.
        gap: How far the bound may be from the plan's price, as a share of the latter.
        seconds: Of wall time, for an emergency. A plan that it cuts short is not reproducible.
            ``Selection.work`` counts the nodes of the branch and bound.
    """
    clock = Clock(seconds)
    reduced = reduce(problem)
    prices = to_integers(reduced.price)
    program = CoverProgram.of(reduced, prices.values)
    found = minimise(program, gap=gap, seconds=clock.left)
    # Where a limit left neither a cover nor a proof, None from here is a proof.
    grown = None if found.status == "infeasible" else greedy.plan(reduced, found.chosen)
    if grown is None:
        return certify_infeasible(problem, seconds=clock.passed)
    assert found.bound is not None  # it is not infeasible
    covers = [grown] if found.chosen is None else [grown, found.chosen]
    return certify(
        problem,
        reduced,
        covers,
        prices.to_price(found.bound),
        is_proven=found.status == "optimal",
        work={"nodes": found.work},
        is_reproducible=found.is_reproducible,
        seconds=clock.passed,
    )


def minimise(program: CoverProgram, *, gap: float = 0.0, seconds: float | None = None) -> Cover:
    """Solve the exact cover with budgets; the formula is that of ``exact_cover.minimise``.

    HiGHS counts in floats, up to a tolerance. So what it answers is counted again in integers: a
    budget that is overrun is tightened and the program solved once more, for a cover that is
    perhaps not the best. ``optimal`` is said only where the bound, less all tolerances and rounded
    up, reaches the cover's price.

    Args:
        program: The integers.
        gap: How far the bound may be from the price of the cover, as a share of the latter.
        seconds: Of wall time; None for any. A search that it stops is not reproducible.

    Returns:
        The cover; its work is the number of nodes of the branch and bound.
    """
    clock = Clock(math.inf if seconds is None else seconds)
    if not program.num_sites:
        return Cover(chosen=(), bound=0, status="optimal")
    # What no budget allows would only spoil the scale.
    affordable = program.affordable()
    open_ = program.restrict(affordable)
    if not program.coverage(affordable).all():
        return Cover(chosen=None, bound=None, status="infeasible")

    bound, work, is_reproducible = int(np.minimum(program.price, 0).sum()), 0.0, True
    # At most all is spent.
    limit = {r: min(program.budget[r], int(cost.sum())) for r, cost in open_.cost.items()}
    slack = {r: math.ceil(TOLERANCE * _cost_unit(open_, r)) for r in limit}
    for attempt in range(MAX_ATTEMPTS):
        result = _solve(open_, limit, gap, clock.left)
        work += float(result.mip_node_count or 0)
        is_reproducible &= result.status != 1  # the limit of time
        if attempt == 0:
            if result.status == 2:
                return Cover(chosen=None, bound=None, status="infeasible", work=work)
            bound = max(bound, _round_up(open_, result.mip_dual_bound))
        cover = () if result.x is None else tuple(np.flatnonzero(result.x > 0.5).tolist())
        if (open_.coverage(cover) != 1).any():
            break
        if open_.fits(cover):
            total = open_.total(cover)
            return Cover(
                chosen=tuple(affordable[list(cover)].tolist()),
                bound=min(bound, total),
                status="optimal" if bound >= total else "feasible",
                work=work,
                is_reproducible=is_reproducible,
            )
        for r, cost in open_.cost.items():
            overrun = int(cost[list(cover)].sum()) - program.budget[r]
            if overrun > 0:
                limit[r] -= max(overrun, slack[r])
    return Cover(
        chosen=None, bound=bound, status="unknown", work=work, is_reproducible=is_reproducible
    )


def _solve(program: CoverProgram, limit: Mapping[str, int], gap: float, seconds: float) -> Any:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csc_array, csr_array

    incidence, num_candidates = program.incidence, len(program.price)
    cover = csc_array(
        (np.ones(len(incidence.sites)), incidence.sites, incidence.starts),
        shape=(program.num_sites, num_candidates),
    )
    constraints = [LinearConstraint(cover, 1, 1)]  # sum_{c in candidates_of[i]} z_c = 1
    for r, cost in program.cost.items():  # sum_c cost_rc z_c <= budget_r
        unit = _cost_unit(program, r)
        constraints.append(
            LinearConstraint(csr_array((cost / unit)[None]), -np.inf, limit[r] / unit)
        )
    return milp(
        program.price / _price_unit(program),  # minimise sum_c price_c z_c
        integrality=np.ones(num_candidates, np.int64),
        bounds=Bounds(0, 1),  # z_c in {0, 1}
        constraints=constraints,
        options={"mip_rel_gap": gap, "time_limit": seconds},
    )


def _price_unit(program: CoverProgram) -> int:
    """Prices of about 1 for each bank: HiGHS has absolute tolerances."""
    return max(int(np.abs(program.price).max()) // program.num_sites, 1)


def _cost_unit(program: CoverProgram, resource: str) -> int:
    """The same for costs."""
    most = min(program.budget[resource], int(program.cost[resource].sum()))
    return max(most // program.num_sites, 1)


def _round_up(program: CoverProgram, dual_bound: float | None) -> int:
    """Make a proven bound of HiGHS's: less its tolerance, once for each bank and for its cut-off.

    Prices are whole, so the bound is too.
    """
    if dual_bound is None or not math.isfinite(dual_bound):
        return int(np.minimum(program.price, 0).sum())
    tolerance = Fraction(TOLERANCE) * (program.num_sites + 2)
    return math.ceil((Fraction(dual_bound) - tolerance) * _price_unit(program))
