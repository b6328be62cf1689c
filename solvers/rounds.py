"""The search, in rounds: relax, drop what cannot matter, and let CP-SAT decide among the rest."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from npas_fx.solvers.exact_cover import Cover, CoverProgram, minimise
from npas_fx.solvers.relaxation import Relaxation, relax
from npas_fx.solvers.trees import approximate

# An emergency stop: plans come from limits that are the same everywhere, unless one takes this
# long, in seconds of wall time.
EMERGENCY = 600.0


# Of more sites than this, multipliers come from clustering trees: of 10,000 sites the linear
# relaxation took GLOP 114 s and HiGHS's interior points more than 150 s, and trees 30 s.
MOST_RELAXED = 3000
# For each so many sites, a cover will do that is once more as far from the bound, up to four times:
# the last hundredths of a percent of 2,000 sites can take twice as long as all before.
SITES_OF_ONE_GAP = 1000
MOST_GAPS = 4
# What the relaxation takes more of than this, it takes; up to 1 less this, it takes in part.
TAKEN = 1e-6
# Of sites that the relaxation covers in parts, a search is among so many candidates each. With none
# 2,000 sites at half their size came to a gap of 0.22 %, with 20 to 0.07 %.
AROUND = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One search by CP-SAT.

    Attributes:
        columns: It is among so many candidates that may be in a better cover, those with the
            lowest bounds, and what is near the relaxation's solution; None for all.
        limit: In CP-SAT's deterministic time; None to go on until there is a proof.
    """

    columns: int | None
    limit: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When to stop.

    Attributes:
        rounds: Searches, one after the other.
        proof: What may be spent on a proof that a cover is the best, in deterministic time.
        close_enough: After that, a cover will do whose price is this close to the bound, as a
            share of it; of more than 1,000 sites, up to four times as far.
    """

    rounds: tuple[Round, ...]
    proof: float = 0.0
    close_enough: float = 0.0


# Until there is a proof.
EXACT = Limits(rounds=(Round(columns=2000, limit=1.0), Round(columns=None, limit=None)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search found.

    Attributes:
        chosen: The best cover within the budgets, increasing; None where none was found.
        bound: No such cover has a lower price.
        is_proven: Whether none is better, or there is none.
        relaxation: The bounds that it started from.
        work: CP-SAT's deterministic time.
        is_reproducible: Whether no limit of wall time cut it short.
    """

    chosen: tuple[int, ...] | None
    bound: int
    is_proven: bool
    relaxation: Relaxation
    work: float = 0.0
    is_reproducible: bool = True


class Clock:
    """What is left of the emergency's wall time."""

    def __init__(self, seconds: float = EMERGENCY) -> None:
        self.start = time.perf_counter()
        self.end = self.start + seconds

    @property
    def left(self) -> float:
        """Seconds, 0 or more."""
        return max(0.0, self.end - time.perf_counter())

    @property
    def passed(self) -> float:
        """Seconds."""
        return time.perf_counter() - self.start


def search(
    program: CoverProgram,
    covers: Sequence[tuple[int, ...]],
    limits: Limits,
    clock: Clock,
    *,
    good: int | None = None,
) -> Found:
    """Find the best cover by CP-SAT among the candidates that may be in a better one than is known.

    The relaxation bounds every cover that uses candidate ``c`` from below; where this bound
    reaches the price of a known cover, leaving ``c`` out loses nothing. So a search among all
    candidates left open proves as much as one among all candidates.

    Args:
        program: Each site is in some candidate.
        covers: Covers within the budgets, if any are known.
        limits: When to stop.
        clock: When to stop in an emergency.
        good: Stop at a cover of this price, or when it is proven that there is none.
    """
    affordable = program.affordable()
    position = {int(c): k for k, c in enumerate(affordable)}
    found = _search(
        program.restrict(affordable),
        [tuple(position[c] for c in cover) for cover in covers],
        limits,
        clock,
        good,
    )
    if found.chosen is None:
        return found
    return replace(found, chosen=tuple(int(affordable[k]) for k in found.chosen))


def _search(
    program: CoverProgram,
    known: Sequence[tuple[int, ...]],
    limits: Limits,
    clock: Clock,
    good: int | None,
) -> Found:
    if program.num_sites <= MOST_RELAXED:
        relaxation = relax(program, clock.left)
        covers = [*known, *_whole(program, relaxation)]
    else:
        relaxation = approximate(program)
        covers = [*known, *_whole(program, relaxation)]
        relaxation = _relax_few(program, relaxation, clock)
    num_gaps = min(max(program.num_sites / SITES_OF_ONE_GAP, 1), MOST_GAPS)
    limits = replace(limits, close_enough=limits.close_enough * num_gaps)
    bound, work, is_reproducible = relaxation.bound, 0.0, relaxation.is_reproducible
    is_near = _near_relaxation(program, relaxation)
    is_infeasible = not program.coverage(range(len(program.price))).all()
    for round_ in limits.rounds:
        least = min((program.total(cover) for cover in covers), default=None)
        left_to_prove = max(0.0, limits.proof - work)
        gap = 0.0 if left_to_prove else limits.close_enough
        if is_infeasible or _is_done(least, bound, gap, good) or not clock.left:
            break
        is_searched = _is_searched(relaxation, is_near, least, round_.columns)
        hint = min(covers, key=program.total, default=())
        cover = _minimise_among(
            program, np.flatnonzero(is_searched), hint, round_.limit, left_to_prove, limits, clock
        )
        work += cover.work
        is_reproducible &= cover.is_reproducible
        if cover.chosen is not None:
            covers.append(cover.chosen)
        is_stuck = cover.status == "unknown" and bool(covers)  # with more, it would be as well
        # A cover either has a candidate that was left out, or is bounded by the search.
        bounds = relaxation.bound_with[~is_searched].tolist()
        bounds += [] if cover.bound is None else [cover.bound]
        is_infeasible = not bounds
        bound = max(bound, min(bounds, default=bound))
        if is_stuck:
            break
    best = min(covers, key=lambda cover: (program.total(cover), cover), default=None)
    least = None if best is None else program.total(best)
    return Found(
        chosen=best,
        bound=bound if least is None else min(bound, least),
        is_proven=is_infeasible or (least is not None and bound >= least),
        relaxation=relaxation,
        work=work,
        is_reproducible=is_reproducible and clock.left > 0,
    )


def _is_done(least: int | None, bound: int, close_enough: float, good: int | None) -> bool:
    if good is not None and (bound > good or (least is not None and least <= good)):
        return True
    return least is not None and least - bound <= close_enough * abs(least)


def _whole(program: CoverProgram, relaxation: Relaxation) -> list[tuple[int, ...]]:
    """The relaxation's solution, where that is a cover within the budgets."""
    chosen = np.flatnonzero(relaxation.value > 0.5)
    cover = tuple(chosen.tolist())
    return [cover] if (program.coverage(chosen) == 1).all() and program.fits(cover) else []


def _relax_few(program: CoverProgram, relaxation: Relaxation, clock: Clock) -> Relaxation:
    """Keep the bounds, and see what the linear relaxation takes of those with the lowest."""
    bound_with = relaxation.bound_with.tolist()
    order = sorted(range(len(bound_with)), key=bound_with.__getitem__)
    few = np.union1d(order[: 2 * program.num_sites], np.flatnonzero(relaxation.value))
    linear = relax(program.restrict(few), clock.left)
    value = np.zeros(len(program.price))
    value[few] = linear.value
    return replace(relaxation, value=value, is_reproducible=linear.is_reproducible)


def _near_relaxation(program: CoverProgram, relaxation: Relaxation) -> npt.NDArray[np.bool_]:
    """``(C,)``: what the relaxation takes, and the best for each site that it covers in parts."""
    is_near = np.asarray(relaxation.value > TAKEN, bool)
    in_parts = np.flatnonzero(is_near & (relaxation.value < 1 - TAKEN))
    sites = np.unique(program.restrict(in_parts).incidence.sites).tolist()
    candidates_of = program.incidence.candidates_of(program.num_sites) if sites else []
    for i in sites:
        bound_with = relaxation.bound_with[candidates_of[i]].tolist()
        best = sorted(range(len(bound_with)), key=bound_with.__getitem__)[:AROUND]
        is_near[candidates_of[i][best]] = True
    return is_near


def _is_searched(
    relaxation: Relaxation,
    is_near: npt.NDArray[np.bool_],
    least: int | None,
    columns: int | None,
) -> npt.NDArray[np.bool_]:
    """``(C,)``, which candidates a search is among."""
    bound_with = relaxation.bound_with
    is_open = np.ones(len(bound_with), bool)
    if least is not None:
        is_open = np.asarray(bound_with < least, bool)
    if columns is None or columns >= int(is_open.sum()):
        return is_open
    is_searched = is_near & is_open
    open_ = np.flatnonzero(is_open)
    order = sorted(range(len(open_)), key=bound_with[open_].tolist().__getitem__)
    is_searched[open_[order[:columns]]] = True
    return is_searched


def _minimise_among(
    program: CoverProgram,
    candidates: npt.NDArray[np.int64],
    hint: tuple[int, ...],
    limit: float | None,
    left_to_prove: float,
    limits: Limits,
    clock: Clock,
) -> Cover:
    """Search among these candidates and those of the hint."""
    columns = np.union1d(candidates, np.array(hint, np.int64))
    restricted = program.restrict(columns)
    known = np.searchsorted(columns, hint).tolist()
    cover = Cover(chosen=None, bound=None, status="unknown")
    if not limits.close_enough or left_to_prove:
        most = limit
        if limits.close_enough:
            most = left_to_prove if limit is None else min(limit, left_to_prove)
        cover = minimise(restricted, hint=known, limit=most, seconds=clock.left)
        limit = None if limit is None else limit - cover.work
    is_open = cover.status in ("feasible", "unknown") and (limit is None or limit > 0)
    if limits.close_enough and is_open and clock.left:
        again = minimise(
            restricted,
            hint=cover.chosen or known,
            limit=limit,
            gap=limits.close_enough,
            seconds=clock.left,
        )
        cover = _better(restricted, cover, again)
    if cover.chosen is None:
        return cover
    return replace(cover, chosen=tuple(int(columns[k]) for k in cover.chosen))


def _better(program: CoverProgram, one: Cover, other: Cover) -> Cover:
    """The cheaper of two covers of a program, with the higher of their bounds."""
    found = [cover.chosen for cover in (one, other) if cover.chosen is not None]
    bounds = [cover.bound for cover in (one, other) if cover.bound is not None]
    return Cover(
        chosen=min(found, key=program.total, default=None),
        bound=max(bounds, default=None),
        status=other.status,
        work=one.work + other.work,
        is_reproducible=one.is_reproducible and other.is_reproducible,
    )
