"""The best plan: relax, drop what cannot matter, and let CP-SAT decide among the rest."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

from npas_fx.solvers import greedy
from npas_fx.solvers.cheapest import find_floor
from npas_fx.solvers.dominance import undominated
from npas_fx.solvers.exact_cover import Cover, CoverProgram, minimise
from npas_fx.solvers.integer_prices import to_integers
from npas_fx.solvers.problem import (
    PlanningProblem,
    Selection,
    certify,
    certify_infeasible,
    restrict,
    total_price,
)
from npas_fx.solvers.relaxation import Relaxation, relax

# Searches, one after the other: among how many open candidates of each site (None: all), and for
# how much deterministic time, a unit of which took 0.3 to 0.9 s of one core. The first two mostly
# take 0.2 s and find nearly the best plan, which closes most candidates before the search that
# proves: 200 sites with 22,000 candidates at a twentieth of their size went from 5.3 s to 2.7 s.
ROUNDS: tuple[tuple[int | None, float], ...] = ((8, 1.0), (32, 3.0), (None, 8.0))
# What a search may take to prove its best cover optimal. After that, a cover will do whose price
# is this close to the bound, as a share of it: above a model's size many plans are all but equally
# good, and telling them apart took 14 s for ResNet-50 at twice its size, from a gap of 1e-6 on.
PROOF = 1.0
CLOSE_ENOUGH = 5e-4


def select(problem: PlanningProblem) -> Selection:
    """Solve the planning problem, to proven optimality wherever the limits of ``ROUNDS`` allow.

    A plan within ``CLOSE_ENOUGH`` of its bound will do where a proof takes longer than ``PROOF``.

    ::

        minimise   sum_c price_c z_c
        subject to sum_{c in candidates_of[i]} z_c = 1       for every site i      (cover[i])
                   sum_c cost_rc z_c <= budget_r             for every resource r  (budget[r])
                   z_c in {0, 1}

    The plan is never worse than the greedy one. Whether there is a plan is decided without a
    limit. The program itself is built in ``npas_fx.solvers.exact_cover``.
    """
    start = time.perf_counter()
    kept = undominated(problem)
    reduced = restrict(problem, kept)
    floor = find_floor(reduced)
    if floor.cover is None:
        return certify_infeasible(
            problem, smallest=floor.smallest, seconds=time.perf_counter() - start
        )
    best = _search(reduced, greedy.plan(reduced, floor.cover))
    return certify(
        problem,
        tuple(kept[k] for k in best.chosen),
        best.bound,
        is_proven=best.is_proven,
        smallest=floor.smallest,
        cheapest_price=floor.cheapest_price,
        seconds=time.perf_counter() - start,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Best:
    chosen: tuple[int, ...]
    bound: float
    is_proven: bool


def _search(problem: PlanningProblem, chosen: tuple[int, ...]) -> _Best:
    """Improve a plan by CP-SAT among the candidates that may be in a better one.

    The relaxation bounds every plan that uses candidate ``c`` from below; where this bound
    reaches the price of a known plan, leaving ``c`` out loses nothing. So a search among all
    candidates left open proves as much as one among all candidates.
    """
    columns = [
        c
        for c in range(len(problem.members))
        if all(cost[c] <= problem.budget[r] for r, cost in problem.cost.items())
    ]
    prices = to_integers([problem.price[c] for c in columns])
    program = CoverProgram(
        num_sites=problem.num_sites,
        members=tuple(problem.members[c] for c in columns),
        price=prices.values,
        cost={r: tuple(cost[c] for c in columns) for r, cost in problem.cost.items()},
        budget=problem.budget,
    )
    column_of = {c: k for k, c in enumerate(columns)}
    relaxation = relax(program)
    covers = [tuple(column_of[c] for c in chosen)]
    least = _total(program, covers[0])

    bound = relaxation.bound
    for per_site, limit in ROUNDS:
        if bound >= least:
            break
        open_ = [k for k, bound_with in enumerate(relaxation.bound_with) if bound_with < least]
        searched = _best_of_each_site(program, relaxation, open_, per_site)
        hint = min(covers, key=lambda cover: _total(program, cover))
        cover = _minimise_among(program, searched, hint, limit)
        if cover.chosen is not None:
            covers.append(cover.chosen)
            least = min(least, _total(program, cover.chosen))
        if cover.bound is not None and len(searched) == len(open_):
            bound = max(bound, min(least, cover.bound))
        if cover.status != "optimal" and least - bound <= CLOSE_ENOUGH * abs(least):
            break
    plans = [tuple(columns[k] for k in cover) for cover in covers]
    return _Best(
        chosen=min(plans, key=lambda plan: (total_price(problem, plan), plan)),
        bound=prices.to_price(min(bound, least)),
        is_proven=bound >= least,
    )


def _total(program: CoverProgram, cover: Iterable[int]) -> int:
    return sum(program.price[k] for k in cover)


def _best_of_each_site(
    program: CoverProgram, relaxation: Relaxation, candidates: list[int], per_site: int | None
) -> list[int]:
    """Return the ``per_site`` candidates of each site with the lowest bounds; all for None."""
    if per_site is None:
        return candidates
    num_left = [per_site] * program.num_sites
    few = []
    for k in sorted(candidates, key=lambda k: (relaxation.bound_with[k], k)):
        if any(num_left[i] for i in program.members[k]):
            few.append(k)
            for i in program.members[k]:
                num_left[i] = max(0, num_left[i] - 1)
    return few


def _minimise_among(
    program: CoverProgram, candidates: Iterable[int], hint: tuple[int, ...], limit: float
) -> Cover:
    """Search among these candidates and those of the hint."""
    columns = sorted({*candidates, *hint})
    position = {k: n for n, k in enumerate(columns)}
    restricted = program.restrict(columns)
    known = [position[k] for k in hint]
    cover = minimise(restricted, hint=known, limit=min(limit, PROOF))
    if cover.status in ("feasible", "unknown") and limit > PROOF:
        left = limit - PROOF
        again = minimise(restricted, hint=cover.chosen or known, limit=left, gap=CLOSE_ENOUGH)
        cover = _better(restricted, cover, again)
    if cover.chosen is None:
        return cover
    return replace(cover, chosen=tuple(columns[n] for n in cover.chosen))


def _better(program: CoverProgram, one: Cover, other: Cover) -> Cover:
    """The cheaper of two covers of a program, with the higher of their bounds."""
    found = [cover.chosen for cover in (one, other) if cover.chosen is not None]
    assert one.bound is not None
    assert other.bound is not None  # neither is infeasible: there is the hint
    return Cover(
        chosen=min(found, key=lambda chosen: _total(program, chosen), default=None),
        bound=max(one.bound, other.bound),
        status=other.status,
    )
