"""The integer program of planning, and its solution by CP-SAT."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from npas_fx.errors import SolverWarning
from npas_fx.solvers.problem import Incidence
from npas_fx.solvers.reduce import Reduced

# Any fixed number makes a search reproducible; this one is CP-SAT's own default.
RANDOM_SEED = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CoverProgram:
    """A planning problem in integers: what the formula of ``minimise`` names.

    Attributes:
        num_sites: The sites are ``0 .. num_sites - 1``.
        incidence: The sites of each candidate.
        price: ``(C,)``, in a unit of the caller's; their absolute values add up to at most 2**62.
        cost: Resource -> ``(C,)``.
        budget: Resource -> what may be taken of it.
    """

    num_sites: int
    incidence: Incidence
    price: npt.NDArray[np.int64]
    cost: Mapping[str, npt.NDArray[np.int64]]
    budget: Mapping[str, int]

    @classmethod
    def of(cls, reduced: Reduced, price: npt.ArrayLike) -> CoverProgram:
        """Give a problem integer prices."""
        return cls(
            num_sites=reduced.num_sites,
            incidence=reduced.incidence,
            price=np.asarray(price, np.int64),
            cost=reduced.cost,
            budget=reduced.budget,
        )

    def restrict(self, candidates: npt.NDArray[np.int64]) -> CoverProgram:
        """Keep these candidates only; candidate ``k`` of the result is ``candidates[k]``."""
        starts, lengths = self.incidence.starts[candidates], self.incidence.lengths[candidates]
        ends = np.cumsum(lengths)
        # The place of each entry in its candidate, from where that starts.
        entries = np.arange(int(ends[-1]) if len(ends) else 0)
        entries += np.repeat(starts - (ends - lengths), lengths)
        return replace(
            self,
            incidence=Incidence(
                sites=self.incidence.sites[entries],
                starts=np.concatenate([[0], ends]).astype(np.int64),
            ),
            price=self.price[candidates],
            cost={resource: cost[candidates] for resource, cost in self.cost.items()},
        )

    def affordable(self) -> npt.NDArray[np.int64]:
        """The candidates that take no more than there is of anything."""
        fits = np.ones(len(self.price), bool)
        for r, cost in self.cost.items():
            fits &= cost <= self.budget[r]
        return np.flatnonzero(fits)

    def coverage(self, candidates: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """``(S,)``, how many of these candidates have each site."""
        sites = self.restrict(np.asarray(candidates, np.int64)).incidence.sites
        return np.bincount(sites, minlength=self.num_sites)

    def total(self, cover: Sequence[int]) -> int:
        """Add up the prices of a cover."""
        return int(self.price[list(cover)].sum())

    def fits(self, cover: Sequence[int]) -> bool:
        """Whether a cover stays within every budget."""
        return all(int(cost[list(cover)].sum()) <= self.budget[r] for r, cost in self.cost.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Cover:
    """What was found.

    Attributes:
        chosen: Candidates, increasing; None when none was found.
        bound: No cover of the program has a lower price; None when infeasible.
        status: ``unknown`` when the limit came before a cover and before a proof.
        work: Deterministic time.
        is_reproducible: Whether the limit of wall time did not cut the search short.
    """

    chosen: tuple[int, ...] | None
    bound: int | None
    status: Literal["optimal", "feasible", "infeasible", "unknown"]
    work: float = 0.0
    is_reproducible: bool = True


def minimise(
    program: CoverProgram,
    *,
    hint: Sequence[int] = (),
    limit: float | None = None,
    gap: float = 0.0,
    seconds: float | None = None,
) -> Cover:
    """Solve the exact cover with budgets.

    ::

        minimise   sum_c price_c z_c
        subject to sum_{c in candidates_of[i]} z_c = 1       for every site i      (cover[i])
                   sum_c cost_rc z_c <= budget_r             for every resource r  (budget[r])
                   z_c in {0, 1}

    Where OR-Tools cannot be imported, HiGHS solves it, and a ``SolverWarning`` says so.

    Args:
        program: The integers.
        hint: A known cover, where the search starts.
        limit: In CP-SAT's deterministic time, whose unit is about a second of an old machine and
            which comes out the same everywhere; None searches until there is a proof.
        gap: How far the bound may be from the price of the cover, as a share of the latter.
        seconds: Of wall time; None for any. A search that it stops is not reproducible.
    """
    try:
        # Imported here: whoever only reads a plan need not wait a second for OR-Tools.
        from ortools.sat.python import cp_model
    except ImportError as err:
        return _minimise_by_highs(program, err, gap=gap, seconds=seconds)

    price, cost, budget = program.price.tolist(), program.cost, program.budget
    candidates_of = program.incidence.candidates_of(program.num_sites)

    model = cp_model.CpModel()
    z = [model.new_bool_var(f"z[{c}]") for c in range(len(price))]  # z_c in {0, 1}
    for i, covering in enumerate(candidates_of):  # sum_{c in candidates_of[i]} z_c = 1
        model.add_exactly_one(z[c] for c in covering.tolist()).with_name(f"cover[{i}]")
    for r in budget:  # sum_c cost_rc z_c <= budget_r
        spent = cp_model.LinearExpr.weighted_sum(z, cost[r].tolist())
        # At most all is spent: a budget beyond that may not even fit into an int64.
        model.add(spent <= min(budget[r], int(cost[r].sum()))).with_name(f"budget[{r}]")
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
    if seconds is not None:
        solver.parameters.max_time_in_seconds = max(seconds, 0.0)
    status = solver.solve(model)
    work = float(solver.response_proto.deterministic_time)
    is_reproducible = seconds is None or solver.wall_time < seconds

    if status == cp_model.INFEASIBLE:
        return Cover(chosen=None, bound=None, status="infeasible", work=work)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        assert status == cp_model.UNKNOWN, f"{solver.status_name()}: {model.validate()}"
        return Cover(
            chosen=None,
            bound=int(np.minimum(program.price, 0).sum()),
            status="unknown",
            work=work,
            is_reproducible=is_reproducible,
        )
    chosen = tuple(c for c, z_c in enumerate(z) if solver.boolean_value(z_c))
    objective = program.total(chosen)
    if status == cp_model.OPTIMAL and not gap:
        return Cover(chosen=chosen, bound=objective, status="optimal", work=work)
    # A whole number, and exact as a float for the totals of integer_prices; costs may be larger.
    bound = round(solver.best_objective_bound)
    if abs(bound) > 2**53:
        bound -= abs(bound) >> 52
    bound = min(objective, bound)
    return Cover(
        chosen=chosen, bound=bound, status="feasible", work=work, is_reproducible=is_reproducible
    )


def _minimise_by_highs(
    program: CoverProgram, err: ImportError, *, gap: float, seconds: float | None
) -> Cover:
    from npas_fx.solvers.highs import minimise as minimise_by_highs

    warnings.warn(
        f"OR-Tools cannot be imported ({err}), so HiGHS solves the plan, through scipy, which may "
        "take longer; install it with: pip install ortools",
        SolverWarning,
        stacklevel=2,
    )
    return minimise_by_highs(program, gap=gap, seconds=seconds)
