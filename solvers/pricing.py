"""What sites and resources are worth: which further candidates could make a plan better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from npas_fx.solvers.exact_cover import CoverProgram
from npas_fx.solvers.integer_prices import to_integers
from npas_fx.solvers.problem import PlanningProblem
from npas_fx.solvers.reduce import MAX_BANKS, reduce
from npas_fx.solvers.relaxation import MULTIPLIER_BITS, relax


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


def price_sites(problem: PlanningProblem) -> Pricing | None:
    """Solve the linear relaxation; None where it has no solution, or none was found."""
    reduced = reduce(problem)
    if reduced.bare:
        return None
    prices = to_integers(reduced.price)
    relaxation = relax(CoverProgram.of(reduced, prices.values))
    taken = {
        reduced.given[k]: float(value) for k, value in enumerate(relaxation.value) if value > 1e-6
    }
    if not taken and problem.num_sites:
        return None
    unit = prices.to_price(1) / (1 << MULTIPLIER_BITS)
    multipliers = relaxation.multipliers
    return Pricing(
        site_value=tuple(float(value) * unit for value in multipliers.site),
        shadow_price={r: float(mu) * unit for r, mu in multipliers.resource.items()},
        taken=taken,
        price=prices.to_price(relaxation.bound),
    )


__all__ = ["MAX_BANKS", "Pricing", "price_sites"]
