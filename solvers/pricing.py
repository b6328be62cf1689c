"""What sites and resources are worth: which further candidates could make a plan better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from npas_fx.solvers.certify import to_floats
from npas_fx.solvers.exact_cover import CoverProgram
from npas_fx.solvers.integer_prices import to_integers
from npas_fx.solvers.problem import PlanningProblem
from npas_fx.solvers.reduce import reduce
from npas_fx.solvers.relaxation import relax
from npas_fx.solvers.rounds import TAKEN


@dataclass(frozen=True, slots=True, kw_only=True)
class Pricing:
    """The linear relaxation of a planning problem, and its dual.

    A candidate can lower the relaxation's price only if its *reduced cost* is negative::

        price - sum_{i in its sites} site_value_i + sum_r shadow_price_r cost_r

    where ``max_banks`` is a resource of which each bank of two or more sites takes one.

    Attributes:
        site_value: ``(S,)``, what covering each site is worth.
        shadow_price: Resource -> by how much one more of it would lower the price, 0 or more.
        taken: Candidate -> how much of it the relaxation takes; those of which it takes some.
        price: Of the relaxation.
    """

    site_value: tuple[float, ...]
    shadow_price: Mapping[str, float]
    taken: Mapping[int, float]
    price: float


def price_sites(problem: PlanningProblem, budgets: Sequence[int]) -> list[Pricing | None]:
    """Solve the linear relaxation at many budgets of the first resource.

    Returns:
        One pricing for each budget; None where the relaxation has no solution, or none was found.
    """
    reduced = reduce(problem)
    if reduced.bare:
        return [None] * len(budgets)
    prices = to_integers(reduced.price)
    resource = next(iter(problem.budget))
    pricings: list[Pricing | None] = []
    for budget in budgets:
        at = replace(reduced, budget={**reduced.budget, resource: budget})
        relaxation = relax(CoverProgram.of(at, prices.values))
        taken = {
            reduced.given[k]: float(relaxation.value[k])
            for k in np.flatnonzero(relaxation.value > TAKEN).tolist()
        }
        site_value, shadow_price = to_floats(relaxation.multipliers, prices)
        pricing = Pricing(
            site_value=site_value,
            shadow_price=shadow_price,
            taken=taken,
            price=prices.to_price(relaxation.bound),
        )
        pricings.append(pricing if taken or not problem.num_sites else None)
    return pricings
