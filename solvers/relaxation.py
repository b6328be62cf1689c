"""The linear relaxation of planning: a proven bound, and which candidates can matter."""

from __future__ import annotations

from dataclasses import dataclass

from npas_fx.solvers.exact_cover import CoverProgram

# Dual values are rounded to multiples of 2**-64 of a price unit: far below one unit even when
# multiplied by the largest cost.
DUAL_BITS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxation:
    """Lower bounds, in the price unit of the program.

    Attributes:
        bound: No cover within the budgets has a lower price.
        bound_with: ``bound_with[c]``: no such cover that uses candidate ``c`` has a lower price.
    """

    bound: int
    bound_with: tuple[int, ...]


def relax(program: CoverProgram) -> Relaxation:
    """Bound the price of every cover by Lagrange multipliers, taken from the linear relaxation.

    For any ``lambda_i`` (one for each site) and ``mu_r >= 0`` (one for each resource), each cover
    ``z`` within the budgets has the price ::

        sum_c price_c z_c >= sum_i lambda_i - sum_r mu_r budget_r + sum_c min(0, reduced_c)
        where reduced_c = price_c - sum_{i in c} lambda_i + sum_r mu_r cost_rc

    and, if it uses ``c``, at least ``max(0, reduced_c)`` more. GLOP only proposes the multipliers,
    in floats; the bound is computed from them in integers, so it holds however well GLOP did.
    """
    lambda_, mu = _multipliers(program)
    reduced = [p << DUAL_BITS for p in program.price]
    for c, sites in enumerate(program.members):
        reduced[c] -= sum(lambda_[i] for i in sites)
    for r, cost in program.cost.items():
        if mu[r]:
            for c, cost_rc in enumerate(cost):
                reduced[c] += mu[r] * cost_rc
    bound = (
        sum(lambda_)
        - sum(mu[r] * budget for r, budget in program.budget.items())
        + sum(min(0, reduced_c) for reduced_c in reduced)
    )
    return Relaxation(
        bound=_ceil(bound),
        bound_with=tuple(_ceil(bound + max(0, reduced_c)) for reduced_c in reduced),
    )


def _ceil(fixed_point: int) -> int:
    # Prices are whole, so a bound may be rounded up.
    return -((-fixed_point) >> DUAL_BITS)


def _multipliers(program: CoverProgram) -> tuple[list[int], dict[str, int]]:
    """Solve the relaxation; return ``lambda`` and ``mu`` times ``2**DUAL_BITS``, rounded."""
    from ortools.linear_solver.python import model_builder

    # GLOP's tolerances are absolute: it gets prices, costs and budgets of about 1.
    price_unit = max((abs(p) for p in program.price), default=0) or 1
    cost_unit = {r: budget or 1 for r, budget in program.budget.items()}
    candidates_of: list[list[int]] = [[] for _ in range(program.num_sites)]
    for c, sites in enumerate(program.members):
        for i in sites:
            candidates_of[i].append(c)

    model = model_builder.Model()  # type: ignore[no-untyped-call]  # OR-Tools 9.15
    z = [model.new_num_var(0.0, float("inf"), None) for _ in program.price]  # cover: z_c <= 1
    weighted_sum = model_builder.LinearExpr.weighted_sum
    cover = [
        model.add(weighted_sum([z[c] for c in covering], [1.0] * len(covering)) == 1.0)
        for covering in candidates_of
    ]
    budget = {
        r: model.add(weighted_sum(z, [cost_rc / cost_unit[r] for cost_rc in cost]) <= limit)
        for r, cost in program.cost.items()
        for limit in [program.budget[r] / cost_unit[r]]
    }
    model.minimize(weighted_sum(z, [p / price_unit for p in program.price]))
    solver = model_builder.Solver("glop")
    if solver.solve(model) != model_builder.SolveStatus.OPTIMAL:
        return [0] * program.num_sites, dict.fromkeys(program.budget, 0)
    unit = price_unit << DUAL_BITS
    lambda_ = [_multiply(unit, float(solver.dual_value(row))) for row in cover]
    mu = {
        r: _multiply(unit, max(0.0, -float(solver.dual_value(row)))) // cost_unit[r]
        for r, row in budget.items()
    }
    return lambda_, mu


def _multiply(number: int, factor: float) -> int:
    numerator, denominator = factor.as_integer_ratio()
    return number * numerator // denominator
