"""The integer program of planning, and its solution by CP-SAT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

# Any fixed number makes a search reproducible; this one is CP-SAT's own default.
RANDOM_SEED = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CoverProgram:
    """A planning problem in integers: what the formula of ``minimise`` names.

    Attributes:
        num_sites: The sites are ``0 .. num_sites - 1``.
        members: Candidate -> its sites.
        price: Candidate -> its price, an integer in a unit of the caller's.
        cost: Resource -> what each candidate takes of it.
        budget: Resource -> what may be taken of it.
    """

    num_sites: int
    members: tuple[tuple[int, ...], ...]
    price: tuple[int, ...]
    cost: Mapping[str, tuple[int, ...]]
    budget: Mapping[str, int]

    def restrict(self, candidates: Sequence[int]) -> CoverProgram:
        """Keep these candidates only; candidate ``k`` of the result is ``candidates[k]``."""
        return replace(
            self,
            members=tuple(self.members[c] for c in candidates),
            price=tuple(self.price[c] for c in candidates),
            cost={
                resource: tuple(cost[c] for c in candidates) for resource, cost in self.cost.items()
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cover:
    """What CP-SAT found.

    Attributes:
        chosen: Candidates, increasing; None when none was found.
        bound: No cover of the program has a lower price; None when infeasible.
        status: ``unknown`` when the limit came before a cover and before a proof.
    """

    chosen: tuple[int, ...] | None
    bound: int | None
    status: Literal["optimal", "feasible", "infeasible", "unknown"]


def minimise(
    program: CoverProgram,
    *,
    hint: Sequence[int] = (),
    limit: float | None = None,
    gap: float = 0.0,
) -> Cover:
    """Solve the exact cover with budgets.

    ::

        minimise   sum_c price_c z_c
        subject to sum_{c in candidates_of[i]} z_c = 1       for every site i      (cover[i])
                   sum_c cost_rc z_c <= budget_r             for every resource r  (budget[r])
                   z_c in {0, 1}

    Args:
        program: The integers.
        hint: A known cover, where the search starts.
        limit: In CP-SAT's deterministic time, whose unit is about a second of an old machine and
            which comes out the same everywhere; None searches until there is a proof.
        gap: How far the bound may be from the price of the cover, as a share of the latter.
    """
    # Imported here: whoever only reads a plan need not wait a second for OR-Tools.
    from ortools.sat.python import cp_model

    price, cost, budget = program.price, program.cost, program.budget
    candidates_of: list[list[int]] = [[] for _ in range(program.num_sites)]
    for c, sites in enumerate(program.members):
        for i in sites:
            candidates_of[i].append(c)

    model = cp_model.CpModel()
    z = [model.new_bool_var(f"z[{c}]") for c in range(len(price))]  # z_c in {0, 1}
    for i, covering in enumerate(candidates_of):  # sum_{c in candidates_of[i]} z_c = 1
        model.add_exactly_one(z[c] for c in covering).with_name(f"cover[{i}]")
    for r in budget:  # sum_c cost_rc z_c <= budget_r
        spent = cp_model.LinearExpr.weighted_sum(z, cost[r])
        # At most all is spent: a budget beyond that may not even fit into an int64.
        model.add(spent <= min(budget[r], sum(cost[r]))).with_name(f"budget[{r}]")
    model.minimize(cp_model.LinearExpr.weighted_sum(z, price))  # minimise sum_c price_c z_c

    hinted = frozenset(hint)
    if hinted:
        for c, z_c in enumerate(z):
            model.add_hint(z_c, c in hinted)

    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = RANDOM_SEED
    solver.parameters.linearization_level = 2  # the relaxation is nearly integral
    # Mostly 0: CP-SAT compares gaps as floats, which beyond 2**53 takes different totals for equal.
    solver.parameters.relative_gap_limit = gap
    solver.parameters.absolute_gap_limit = 0.0
    if limit is not None:
        solver.parameters.max_deterministic_time = limit
    status = solver.solve(model)

    if status == cp_model.INFEASIBLE:
        return Cover(chosen=None, bound=None, status="infeasible")
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        assert status == cp_model.UNKNOWN, f"{solver.status_name()}: {model.validate()}"
        return Cover(chosen=None, bound=sum(min(p, 0) for p in price), status="unknown")
    chosen = tuple(c for c, z_c in enumerate(z) if solver.boolean_value(z_c))
    objective = sum(price[c] for c in chosen)
    if status == cp_model.OPTIMAL and not gap:
        return Cover(chosen=chosen, bound=objective, status="optimal")
    # A whole number, and exact as a float for the totals of integer_prices.
    bound = min(objective, round(solver.best_objective_bound))
    return Cover(chosen=chosen, bound=bound, status="feasible")
