"""From what a solver found to a ``Selection``, the same for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from npas_fx.solvers.floor import cheapest_plan, find_obstacle
from npas_fx.solvers.integer_prices import IntegerPrices
from npas_fx.solvers.problem import PlanningProblem, total_price
from npas_fx.solvers.reduce import Reduced
from npas_fx.solvers.relaxation import MULTIPLIER_BITS, Multipliers
from npas_fx.solvers.selection import Selection, relative_gap


def certify(
    problem: PlanningProblem,
    reduced: Reduced,
    covers: Iterable[tuple[int, ...]],
    bound: float,
    *,
    is_proven: bool = False,
    prices: IntegerPrices | None = None,
    multipliers: Multipliers | None = None,
    work: Mapping[str, float] | None = None,
    is_reproducible: bool = True,
    seconds: float,
) -> Selection:
    """Write the certificate of the best of some plans.

    Args:
        problem: What was asked.
        reduced: The same, reduced.
        covers: Plans, as candidates of ``reduced``. Integers may tell apart what floats take for
            equal, and the other way round, so the best by price may not be the one that was found.
        bound: No plan has a lower price, but for rounding.
        is_proven: Whether none is better, though rounding keeps the bound below.
        prices: What the integers of ``multipliers`` stand for; given with these.
        multipliers: That prove the bound, if they are known.
        work: See ``Selection``.
        is_reproducible: See ``Selection``.
        seconds: See ``Selection``.
    """
    plans = [tuple(sorted(reduced.given[k] for k in cover)) for cover in covers]
    chosen = min(plans, key=lambda plan: (total_price(problem, plan), plan))
    objective = total_price(problem, chosen)
    bound = min(objective, bound)
    site_value: tuple[float, ...] = ()
    shadow_price: dict[str, float] = {}
    if multipliers is not None:
        assert prices is not None
        site_value, shadow_price = to_floats(multipliers, prices)
    return Selection(
        chosen=chosen,
        objective=objective,
        bound=bound,
        gap=relative_gap(problem, objective, bound, lambda: cheapest_plan(reduced, problem)),
        status="optimal" if is_proven or bound == objective else "feasible",
        num_candidates=len(problem.members),
        site_value=site_value,
        shadow_price={r: mu for r, mu in shadow_price.items() if r in problem.cost},
        work=work or {},
        is_reproducible=is_reproducible,
        seconds=seconds,
    )


def certify_infeasible(problem: PlanningProblem, *, seconds: float) -> Selection:
    """Write the certificate that there is no plan."""
    return Selection(
        chosen=(),
        objective=None,
        bound=None,
        gap=None,
        status="infeasible",
        obstacle=find_obstacle(problem),
        num_candidates=len(problem.members),
        seconds=seconds,
    )


def to_floats(
    multipliers: Multipliers, prices: IntegerPrices
) -> tuple[tuple[float, ...], dict[str, float]]:
    """Turn multipliers back into prices: of the sites, and of one of each resource."""
    unit = prices.to_price(1) / (1 << MULTIPLIER_BITS)
    site_value = tuple(float(value) * unit for value in multipliers.site)
    return site_value, {r: float(mu) * unit for r, mu in multipliers.resource.items()}
