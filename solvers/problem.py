"""What a solver is asked, in plain numbers: no torch, no names of sites."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import numpy.typing as npt

# CP-SAT counts in int64 and wants room for differences.
MAX_TOTAL_COST = 2**62


class PlanningProblemError(ValueError):
    """A planning problem that contradicts itself; the message names the candidate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanningProblem:
    """Choose candidates that cover each site exactly once, at the least price, within budgets.

    Attributes:
        num_sites: The sites are ``0 .. num_sites - 1``.
        members: ``members[c]`` are the sites of candidate ``c``, strictly increasing.
        price: ``price[c]`` is the expected loss of candidate ``c``; it may be negative.
        cost: Resource -> what each candidate takes of it, whole and not negative; parameters,
            bytes, FLOPs, whatever is counted. The cheapest plan in the first resource sets the
            scale of the gap.
        budget: Resource -> what may be taken of it; the same resources as in ``cost``.
        private: Sites that are alone in their bank.
        same_bank: Groups of sites; a bank that has one of a group has all of it.
        different_bank: Groups of sites; no bank has two of a group.
        max_banks: The most banks of two or more sites; None for any number.
        pin: Candidates that every plan has.

    Raises:
        PlanningProblemError: The numbers contradict each other. That rules leave no plan is no
            error, but what a solver finds out.
    """

    num_sites: int
    members: tuple[tuple[int, ...], ...]
    price: tuple[float, ...]
    cost: Mapping[str, tuple[int, ...]]
    budget: Mapping[str, int]
    private: frozenset[int] = frozenset()
    same_bank: tuple[tuple[int, ...], ...] = ()
    different_bank: tuple[tuple[int, ...], ...] = ()
    max_banks: int | None = None
    pin: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no solver could answer."""
        _check_lengths(self)
        _check_members(self)
        _check_prices(self)
        _check_costs(self)
        _check_rules(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Incidence:
    """Which sites candidates have, as arrays.

    Attributes:
        sites: ``(M,)``, the sites of candidate 0, of candidate 1 and so on.
        starts: ``(C + 1,)``, where those of each candidate start.
    """

    sites: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, members: Sequence[tuple[int, ...]]) -> Incidence:
        """Lay the sites of all candidates one after the other."""
        lengths = np.fromiter(map(len, members), np.int64, len(members))
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        sites = np.fromiter(chain.from_iterable(members), np.int64, int(starts[-1]))
        return cls(sites=sites, starts=starts)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """``(C,)``, how many sites each candidate has."""
        return np.diff(self.starts)

    def candidates(self) -> npt.NDArray[np.int64]:
        """``(M,)``, the candidate of each entry of ``sites``."""
        return np.repeat(np.arange(len(self.starts) - 1), self.lengths)

    def candidates_of(self, num_sites: int) -> list[npt.NDArray[np.int64]]:
        """Site -> the candidates that cover it, increasing."""
        ordered = self.candidates()[np.argsort(self.sites, kind="stable")]
        ends = np.cumsum(np.bincount(self.sites, minlength=num_sites))
        return np.split(ordered, ends[:-1]) if num_sites else []

    def total(self, value: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """Add up a value of each site over the sites of each candidate; every one has some."""
        if len(self.starts) == 1:
            return value[:0]
        total: npt.NDArray[np.generic] = np.add.reduceat(value[self.sites], self.starts[:-1])
        return total


def total_price(problem: PlanningProblem, chosen: Iterable[int]) -> float:
    """Add up prices, rounded once, so that the order does not matter."""
    return math.fsum(problem.price[c] for c in chosen)


def total_cost(problem: PlanningProblem, chosen: Iterable[int], resource: str) -> int:
    """Add up what the chosen candidates take of one resource."""
    cost = problem.cost[resource]
    return sum(cost[c] for c in chosen)


def fits(problem: PlanningProblem, chosen: tuple[int, ...]) -> bool:
    """Whether the chosen candidates stay within every budget."""
    return all(
        total_cost(problem, chosen, resource) <= budget
        for resource, budget in problem.budget.items()
    )


def _check_lengths(problem: PlanningProblem) -> None:
    num_candidates = len(problem.members)
    if problem.num_sites < 0:
        raise PlanningProblemError(
            f"num_sites={problem.num_sites} is negative. Give the number of sites, 0 or more."
        )
    if len(problem.price) != num_candidates:
        raise PlanningProblemError(
            f"price has {len(problem.price)} entries for {num_candidates} candidates. "
            "Give one price for each candidate in members."
        )
    if problem.cost.keys() != problem.budget.keys():
        raise PlanningProblemError(
            f"cost has the resources {sorted(problem.cost)}, budget has {sorted(problem.budget)}. "
            "Give both for the same resources; leave out what has no budget."
        )
    for resource, cost in problem.cost.items():
        if len(cost) != num_candidates:
            raise PlanningProblemError(
                f"cost[{resource!r}] has {len(cost)} entries for {num_candidates} candidates. "
                "Give one cost for each candidate in members."
            )


def _check_members(problem: PlanningProblem) -> None:
    for c, sites in enumerate(problem.members):
        if not sites:
            raise PlanningProblemError(f"candidate {c} has no sites. Leave it out.")
        if min(sites) < 0 or max(sites) >= problem.num_sites:
            raise PlanningProblemError(
                f"candidate {c} has the sites {min(sites)} to {max(sites)}, out of range for "
                f"num_sites={problem.num_sites}. Number the sites 0 to num_sites - 1."
            )
    incidence = Incidence.of(problem.members)
    flat, candidates = incidence.sites, incidence.candidates()
    unsorted = (np.diff(flat) <= 0) & (np.diff(candidates) == 0)
    if unsorted.any():
        k = int(unsorted.argmax())
        raise PlanningProblemError(
            f"candidate {candidates[k]}: site {flat[k + 1]} follows site {flat[k]}. "
            "Give the sites of a candidate sorted, each once."
        )
    bare = np.bincount(flat, minlength=problem.num_sites) == 0
    if bare.any():
        site = int(bare.argmax())
        raise PlanningProblemError(
            f"site {site} is in no candidate, so no plan can cover it. "
            f"Add a candidate with members ({site},)."
        )


def _check_prices(problem: PlanningProblem) -> None:
    for c, price in enumerate(problem.price):
        if not math.isfinite(price):
            raise PlanningProblemError(
                f"candidate {c} has price={price}. Prices are finite: leave out a candidate that "
                "must never be chosen."
            )
    try:
        math.fsum(abs(price) for price in problem.price)
    except OverflowError as err:
        largest = max(range(len(problem.price)), key=lambda c: abs(problem.price[c]))
        raise PlanningProblemError(
            f"the prices add up to more than a float holds; candidate {largest} has the largest, "
            f"{problem.price[largest]}. Give prices in a larger unit."
        ) from err


def _check_costs(problem: PlanningProblem) -> None:
    for resource, cost in problem.cost.items():
        for c, entry in enumerate(cost):
            if not isinstance(entry, int):
                raise PlanningProblemError(
                    f"candidate {c} has cost[{resource!r}]={entry!r}, a {type(entry).__name__}. "
                    "Costs are counted exactly: give an int."
                )
            if entry < 0:
                raise PlanningProblemError(
                    f"candidate {c} has cost[{resource!r}]={entry}. Give 0 or more."
                )
        if sum(cost) >= MAX_TOTAL_COST:
            largest = max(range(len(cost)), key=cost.__getitem__)
            raise PlanningProblemError(
                f"cost[{resource!r}] adds up to {sum(cost)} over all candidates, 2**62 or more; "
                f"candidate {largest} has the largest, {cost[largest]}. Count in a larger unit."
            )
    for resource, budget in problem.budget.items():
        if not isinstance(budget, int):
            raise PlanningProblemError(
                f"budget[{resource!r}]={budget!r} is a {type(budget).__name__}. "
                "Budgets are counted exactly: give an int."
            )
        if budget < 0:
            raise PlanningProblemError(f"budget[{resource!r}]={budget}. Give 0 or more.")


def _check_rules(problem: PlanningProblem) -> None:
    named: dict[str, tuple[tuple[int, ...], ...]] = {
        "private": (tuple(problem.private),),
        "same_bank": problem.same_bank,
        "different_bank": problem.different_bank,
    }
    for rule, groups in named.items():
        for group in groups:
            outside = [site for site in group if not 0 <= site < problem.num_sites]
            if outside:
                raise PlanningProblemError(
                    f"{rule} names site {outside[0]}, out of range for "
                    f"num_sites={problem.num_sites}. Number the sites 0 to num_sites - 1."
                )
    for c in problem.pin:
        if not 0 <= c < len(problem.members):
            raise PlanningProblemError(
                f"pin names candidate {c}, but there are {len(problem.members)} candidates. "
                "Give an index into members."
            )
    if problem.max_banks is not None and problem.max_banks < 0:
        raise PlanningProblemError(f"max_banks={problem.max_banks}. Give 0 or more, or None.")


def restrict(problem: PlanningProblem, candidates: Sequence[int]) -> PlanningProblem:
    """Keep these candidates only; candidate ``k`` of the result is ``candidates[k]``.

    Raises:
        PlanningProblemError: They leave out a site, or one that is pinned.
    """
    position = {c: k for k, c in enumerate(candidates)}
    lost = [c for c in problem.pin if c not in position]
    if lost:
        raise PlanningProblemError(f"candidate {lost[0]} is pinned. Do not leave it out.")
    return replace(
        problem,
        members=tuple(problem.members[c] for c in candidates),
        price=tuple(problem.price[c] for c in candidates),
        cost={r: tuple(cost[c] for c in candidates) for r, cost in problem.cost.items()},
        pin=tuple(position[c] for c in problem.pin),
    )
