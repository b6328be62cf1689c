"""What a solver answers: the chosen candidates, and how good they are proven to be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from npas_fx.solvers.problem import Incidence, PlanningProblem, total_price

# The gap of an objective about 0 is measured against this much of the cheapest plan's price.
SMALL_OBJECTIVE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Obstacle:
    """Why there is no plan. Rules go by ``private``, ``same_bank[0]``, ``max_banks`` and so on.

    Attributes:
        smallest: Resource -> the least that any plan takes of it which keeps the rules and the
            other budgets; without those resources where no plan does.
        blocking: Rules, each of which leaves no plan at any budget, or only together with others;
            and sites that no candidate may cover, as ``site 3``. Empty where some budget will do.
        savings: Rule -> resource -> how much less a plan could take without that rule; only where
            it is less.
    """

    smallest: Mapping[str, int]
    blocking: tuple[str, ...] = ()
    savings: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The chosen candidates, and how good they are proven to be.

    Attributes:
        chosen: The chosen candidates, increasing; empty when infeasible.
        objective: Their total price; None when infeasible.
        bound: No plan has a lower price than this; ``bound <= objective``; None when infeasible.
        gap: ``(objective - bound) / max(|objective|, eps)``, where ``eps`` is 1e-6 of the absolute
            price of the cheapest plan (in the first resource); 0 when both are equal, infinite
            when both terms of the maximum are 0; None when infeasible.
        status: ``optimal``: no plan has a lower price, up to the rounding that
            ``npas_fx.solvers.integer_prices`` states and that ``gap`` shows. ``feasible``: a plan,
            perhaps not the best. ``infeasible``: proven that there is none.
        obstacle: Why there is none; None when there is one.
        num_candidates: How many candidates the proof is over: all of the problem's.
        site_value: ``(S,)``, what covering each site is worth at the bound: a candidate can lower
            the price only if ``price < sum_i site_value_i - sum_r shadow_price_r cost_r``. Empty
            where the solver has none.
        shadow_price: Resource -> by how much one more of it would lower the bound.
        work: What was done, in units that come out the same everywhere: see the solver.
        is_reproducible: Whether no limit of wall time cut the search short.
        seconds: Wall-clock time.
    """

    chosen: tuple[int, ...]
    objective: float | None
    bound: float | None
    gap: float | None
    status: Literal["optimal", "feasible", "infeasible"]
    obstacle: Obstacle | None = None
    num_candidates: int
    site_value: tuple[float, ...] = ()
    shadow_price: Mapping[str, float] = field(default_factory=dict)
    work: Mapping[str, float] = field(default_factory=dict)
    is_reproducible: bool = True
    seconds: float


def relative_gap(
    problem: PlanningProblem,
    objective: float,
    bound: float,
    cheapest_plan: Callable[[], tuple[int, ...]],
) -> float:
    """Measure how far a plan may be from the best; see ``Selection.gap``.

    Args:
        problem: What was asked.
        objective: Price of the plan.
        bound: At most that.
        cheapest_plan: Finds the plan that takes the least of the first resource. It is called only
            where the objective is so small that it matters.
    """
    if objective == bound:
        return 0.0
    scale = abs(objective)
    if scale < SMALL_OBJECTIVE * _largest_price(problem):
        scale = max(scale, SMALL_OBJECTIVE * abs(total_price(problem, cheapest_plan())))
    return (objective - bound) / scale if scale > 0 else math.inf


def _largest_price(problem: PlanningProblem) -> float:
    """Bound the absolute price of every cover: ``sum_i max_{c covers i} |price_c| / |c|``."""
    incidence = Incidence.of(problem.members)
    share = np.abs(np.array(problem.price, float)) / np.maximum(incidence.lengths, 1)
    largest = np.zeros(problem.num_sites)
    np.maximum.at(largest, incidence.sites, share[incidence.candidates()])
    return float(largest.sum()) * (1 + 1e-9)
