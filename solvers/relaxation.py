"""The linear relaxation of planning: a proven bound, and which candidates can matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog
from scipy.sparse import csc_array, csr_array, csr_matrix, vstack

from npas_fx.solvers.exact_cover import CoverProgram

_Array = npt.NDArray[np.float64]
_Integers = npt.NDArray[np.object_]  # of Python's, which have no largest

# Multipliers are rounded to multiples of 2**-64 of a price unit: far below one unit even when
# multiplied by the largest cost.
MULTIPLIER_BITS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Multipliers:
    """Prices of the constraints, in price units of a program times ``2**MULTIPLIER_BITS``.

    Attributes:
        site: ``(S,)``, what covering each site is worth.
        resource: What one of each resource is worth, 0 or more.
    """

    site: _Integers
    resource: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxation:
    """Lower bounds, in the price unit of the program.

    Attributes:
        bound: No cover within the budgets has a lower price.
        bound_with: ``(C,)``: no such cover that uses candidate ``c`` has a lower price.
        multipliers: What the bounds were computed from.
        value: ``(C,)``, how much of each candidate the relaxation takes; zeros where unknown.
        is_reproducible: Whether it was not cut short.
    """

    bound: int
    bound_with: _Integers
    multipliers: Multipliers
    value: _Array
    is_reproducible: bool = True


def relax(program: CoverProgram, seconds: float | None = None) -> Relaxation:
    """Bound the price of every cover, from the linear relaxation.

    A linear solver proposes the multipliers: GLOP, which is the fastest here, or HiGHS where there
    is no OR-Tools. ``bound_by`` makes a proven bound of them, however well the solver did.

    Args:
        program: With any costs and prices.
        seconds: Of wall time; None for any.
    """
    multipliers, value, is_reproducible = _solve(program, seconds)
    bound, bound_with = bound_by(program, multipliers)
    return Relaxation(
        bound=bound,
        bound_with=bound_with,
        multipliers=multipliers,
        value=value,
        is_reproducible=is_reproducible,
    )


def bound_by(program: CoverProgram, multipliers: Multipliers) -> tuple[int, _Integers]:
    """Bound the price of every cover by Lagrange multipliers, exactly.

    For any ``lambda_i`` (one for each site) and ``mu_r >= 0`` (one for each resource), each cover
    ``z`` within the budgets has the price ::

        sum_c price_c z_c >= sum_i lambda_i - sum_r mu_r budget_r + sum_c reduced_c z_c
                          >= sum_i (lambda_i + least_i) - sum_r mu_r budget_r
        where reduced_c = price_c - sum_{i in c} lambda_i + sum_r mu_r cost_rc
              least_i   = min(0, min_{c covers i} reduced_c / |c|)

    since each site is in one candidate of the cover; and, if it uses ``c``, at least
    ``max(0, reduced_c)`` more. All in integers.

    Returns:
        The bound, and ``(C,)`` the bound with each candidate.
    """
    one = 1 << MULTIPLIER_BITS
    reduced: _Integers = program.price.astype(object) * one
    if len(reduced):
        reduced = reduced - program.incidence.total(multipliers.site)
    for r, mu in multipliers.resource.items():
        if mu:
            reduced = reduced + mu * program.cost[r].astype(object)
    bound = sum(multipliers.site.tolist()) - sum(
        mu * program.budget[r] for r, mu in multipliers.resource.items()
    )
    negative = np.flatnonzero(reduced < 0)
    least: dict[int, int] = {}
    incidence = program.incidence
    for c in negative.tolist():
        sites = incidence.sites[incidence.starts[c] : incidence.starts[c + 1]].tolist()
        share = reduced[c] // len(sites)  # rounded down
        for i in sites:
            if share < least.get(i, 0):
                least[i] = share
    bound += sum(least.values())
    # Prices are whole, so bounds may be rounded up.
    bound_with: _Integers = -(-(bound + np.maximum(reduced, 0)) >> MULTIPLIER_BITS)
    return -((-bound) >> MULTIPLIER_BITS), bound_with


def _solve(program: CoverProgram, seconds: float | None) -> tuple[Multipliers, _Array, bool]:
    """Solve the relaxation; where that fails, the multipliers are 0."""
    num_sites, num_candidates = program.num_sites, len(program.price)
    nothing = Multipliers(
        site=np.array([0] * num_sites, object), resource=dict.fromkeys(program.budget, 0)
    )
    if not num_candidates or not num_sites:
        return nothing, np.zeros(num_candidates), True
    # Linear solvers have absolute tolerances: they get prices and costs of about 1 for each bank.
    price_unit = max(int(np.abs(program.price).max()) // num_sites, 1)
    cost_unit = {r: max(budget // num_sites, 1) for r, budget in program.budget.items()}
    linear = _Linear(
        price=program.price / price_unit,
        cover=csr_array(
            csc_array(
                (np.ones(len(program.incidence.sites)), *_indices(program)),
                shape=(num_sites, num_candidates),
            )
        ),
        cost=csr_array(np.array([cost / cost_unit[r] for r, cost in program.cost.items()]))
        if program.cost
        else None,
        budget=[program.budget[r] / cost_unit[r] for r in program.cost],
    )
    answer = _solve_by_glop(linear, seconds)
    if answer is None:
        answer = _solve_by_highs(linear, seconds)
    if answer.value is None:
        return nothing, np.zeros(num_candidates), not answer.is_cut_short
    unit = price_unit << MULTIPLIER_BITS
    site = np.array([_multiply(unit, float(m)) for m in answer.cover_dual], object)
    resource = {
        r: _multiply(unit, max(0.0, -float(m))) // cost_unit[r]
        for r, m in zip(program.cost, answer.cost_dual, strict=True)
    }
    return Multipliers(site=site, resource=resource), answer.value, True


class _Linear(NamedTuple):
    """Minimise ``price z`` where ``cover z = 1``, ``cost z <= budget`` and ``z >= 0``."""

    price: _Array
    cover: csr_array[np.float64]
    cost: csr_array[np.float64] | None
    budget: list[float]


class _Answer(NamedTuple):
    """What a linear solver says; no ``value`` where it found no optimum."""

    value: _Array | None
    cover_dual: _Array
    cost_dual: _Array
    is_cut_short: bool


def _indices(program: CoverProgram) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    return program.incidence.sites, program.incidence.starts


def _solve_by_glop(linear: _Linear, seconds: float | None) -> _Answer | None:
    """Dual simplex; None where OR-Tools cannot be imported, or GLOP found no optimum."""
    try:
        from ortools.linear_solver.python import model_builder_helper as helper
    except ImportError:
        return None
    num_sites, num_candidates = linear.cover.shape
    rows = linear.cover if linear.cost is None else vstack([linear.cover, linear.cost])
    ones, nothing = np.ones(num_sites), np.full(len(linear.budget), -np.inf)
    model: Any = helper.ModelBuilderHelper()  # its types want arrays of known shapes
    model.fill_model_from_sparse_data(
        np.zeros(num_candidates),
        np.full(num_candidates, np.inf),  # cover: z_c <= 1
        linear.price,
        np.concatenate([ones, nothing]),
        np.concatenate([ones, linear.budget]),
        csr_matrix(rows),
    )
    solver = helper.ModelSolverHelper("glop")
    if seconds is not None:
        solver.set_time_limit_in_seconds(seconds)
    solver.solve(model)
    if solver.status() != helper.SolveStatus.OPTIMAL:
        return None
    dual = np.asarray(solver.dual_values(), float)
    return _Answer(
        value=np.asarray(solver.variable_values(), float),
        cover_dual=dual[:num_sites],
        cost_dual=dual[num_sites:],
        is_cut_short=False,
    )


def _solve_by_highs(linear: _Linear, seconds: float | None) -> _Answer:
    """Dual simplex: interior points take longer where candidates have many sites in common."""
    result: Any = linprog(  # type: ignore[call-overload]  # scipy-stubs knows no sparse arrays
        linear.price,
        A_eq=linear.cover,
        b_eq=np.ones(linear.cover.shape[0]),
        A_ub=linear.cost,
        b_ub=linear.budget or None,
        bounds=(0, None),  # cover: z_c <= 1
        method="highs-ds",
        options={} if seconds is None else {"time_limit": seconds},
    )
    return _Answer(
        value=np.asarray(result.x, float) if result.status == 0 else None,
        cover_dual=result.eqlin.marginals,
        cost_dual=result.ineqlin.marginals if linear.budget else np.zeros(0),
        is_cut_short=result.status == 1,
    )


def _multiply(number: int, factor: float) -> int:
    numerator, denominator = factor.as_integer_ratio()
    return number * numerator // denominator
