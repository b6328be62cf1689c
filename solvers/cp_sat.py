"""The best plan: greedy, then the relaxation, then CP-SAT among what can still matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from npas_fx.solvers import greedy
from npas_fx.solvers.certify import certify, certify_infeasible
from npas_fx.solvers.exact_cover import CoverProgram
from npas_fx.solvers.integer_prices import to_integers
from npas_fx.solvers.problem import PlanningProblem, PlanningProblemError
from npas_fx.solvers.reduce import reduce
from npas_fx.solvers.rounds import EMERGENCY, Clock, Found, Limits, Round, search
from npas_fx.solvers.selection import Selection

# The relaxation is nearly integral: the few candidates that it takes, and those of the greedy plan,
# mostly hold a plan within 0.05 % of the bound, which CP-SAT finds at once. Among 18,000 candidates
# of 2,000 sites it finds none in 12 s, not even the one that it is given.
LIMITS = Limits(
    rounds=(
        Round(columns=0, limit=2.0),
        Round(columns=1000, limit=0.5),
        Round(columns=2000, limit=1.0),
        Round(columns=4000, limit=1.0),
        Round(columns=8000, limit=2.0),
        Round(columns=20_000, limit=4.0),
    ),
    proof=0.25,
    close_enough=5e-4,
)


def select(
    problem: PlanningProblem, *, limits: Limits = LIMITS, seconds: float = EMERGENCY
) -> Selection:
    """Solve the planning problem, to proven optimality wherever the limits allow.

    ::

        minimise   sum_c price_c z_c
        subject to sum_{c in candidates_of[i]} z_c = 1       for every site i      (cover[i])
                   sum_c cost_rc z_c <= budget_r             for every resource r  (budget[r])
                   z_c in {0, 1}

    Rules are fewer candidates, and ``max_banks`` is a resource. The plan is never worse than the
    greedy one. Whether there is a plan is decided without a limit. The program itself is built in
    ``npas_fx.solvers.exact_cover``.

    Args:
        problem: What is asked.
        limits: In deterministic work. ``Selection.work`` says how much of it was done: the sites of
            all candidates in the linear relaxation, and CP-SAT's deterministic time.
        seconds: Of wall time, for an emergency. A plan that it cuts short is not reproducible.
    """
    return select_frontier(problem, [problem.budget], limits=limits, seconds=seconds)[0]


def select_frontier(
    problem: PlanningProblem,
    budgets: Sequence[int | Mapping[str, int]],
    *,
    limits: Limits = LIMITS,
    seconds: float = EMERGENCY,
) -> list[Selection]:
    """Solve the same problem under many budgets.

    Plans for smaller budgets start the search for larger ones, and bounds of larger ones hold for
    smaller ones, so no plan has a higher price, and none a higher bound, than that of a budget
    with less of everything.

    Args:
        problem: What is asked, but for its budgets.
        budgets: What there is of each resource, or of the first one if the others stay as they are.
        limits: For each budget; see ``select``.
        seconds: For all of them; see ``select``.

    Returns:
        One selection for each budget, in their order.
    """
    clock = Clock(seconds)
    asked = [_replace_budget(problem, budget) for budget in budgets]
    reduced = reduce(problem)
    prices = to_integers(reduced.price)
    solved: dict[int, Found] = {}
    covers: dict[int, list[tuple[int, ...]]] = {}
    # Whoever has less of everything comes first.
    for k in sorted(range(len(asked)), key=lambda k: tuple(asked[k].budget.values())):
        at = replace(reduced, budget={**reduced.budget, **asked[k].budget})
        program = CoverProgram.of(at, prices.values)
        met = dict.fromkeys(cover for found in covers.values() for cover in found)
        known = [cover for cover in met if program.fits(cover)]
        start = greedy.plan(at, known[-1] if known else None)
        if start is not None:
            found = search(program, [start, *known], limits, clock)
            assert found.chosen is not None  # at least the greedy one
            covers[k] = [found.chosen, start, *known]
            solved[k] = found
    selections = []
    for k, problem_k in enumerate(asked):
        if k not in solved:
            selections.append(certify_infeasible(problem_k, seconds=clock.passed))
            continue
        bounds = [
            found.bound
            for more_k, found in solved.items()
            if all(problem_k.budget[r] <= budget for r, budget in asked[more_k].budget.items())
        ]
        selection = certify(
            problem_k,
            reduced,
            covers[k],
            prices.to_price(max(bounds)),
            is_proven=solved[k].is_proven,
            prices=prices,
            multipliers=solved[k].relaxation.multipliers,
            work={"relaxation": len(reduced.incidence.sites), "cp_sat": solved[k].work},
            is_reproducible=solved[k].is_reproducible,
            seconds=clock.passed,
        )
        selections.append(selection)
    return selections


def _replace_budget(problem: PlanningProblem, budget: int | Mapping[str, int]) -> PlanningProblem:
    if not isinstance(budget, Mapping):
        if not problem.budget:
            raise PlanningProblemError(
                f"budget={budget}, but the problem counts nothing. Give the cost of a resource."
            )
        budget = {next(iter(problem.budget)): budget}
    unknown = budget.keys() - problem.budget.keys()
    if unknown:
        raise PlanningProblemError(
            f"a budget of {min(unknown)!r}, of which the problem has no cost. "
            f"It counts {', '.join(map(repr, problem.budget)) or 'nothing'}."
        )
    return replace(problem, budget={**problem.budget, **budget})
