"""Refine: add the candidates that a plan could use, until none could make it better."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from npas_fx.ir import Candidate, Size
from npas_fx.propose import Members, Pricer, keeps_apart, make_atoms
from npas_fx.solvers import Selection
from npas_fx.solvers.pricing import Pricing
from npas_fx.solvers.problem import Incidence
from npas_fx.solvers.reduce import MAX_BANKS

_Key: TypeAlias = "tuple[Members, str, Size]"

# A candidate is added where its reduced cost is below minus this share of the relaxation's price.
_LEAST_GAIN = 1e-6
# A family gets further sizes where its best one so far costs at most this much more than its sites
# are worth, as a share of that. Where sizes are numbers of whole templates, prices jump: with 0.05,
# three templates for five weights were missed, and a plan cost 1 % more.
_NEAR = 0.3
# Banks that each bank is merged with, and sites that are moved into it: the nearest ones.
_NEIGHBOURS = 4
# Sites that are moved out of a bank: those that are the farthest from it.
_LEAVING = 6
# Plans that are nearer to the relaxation than this need no further candidates, and at most so many
# are added for others.
_CLOSE = 1e-4
_MOST_ADDED = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Refined:
    """Candidates, and how they came about.

    Attributes:
        candidates: the pinned ones, those that were proposed, and those that were added.
        pricings: the last ones, one for each budget, None for one that cannot be met; empty where
            no round was made.
        rounds: how often some were added.
    """

    candidates: tuple[Candidate, ...]
    pricings: tuple[Pricing | None, ...]
    rounds: int


def refine(
    candidates: Sequence[Candidate],
    pricer: Pricer,
    price: Callable[[Sequence[Candidate]], Sequence[Pricing | None]],
    *,
    rounds: int,
) -> Refined:
    """Add sizes, and merged, split and changed banks, by their reduced costs, and price again.

    Args:
        candidates: to start from.
        pricer: that made them.
        price: solves the linear relaxation over given candidates, once for each budget.
        rounds: the most that are made.

    Returns:
        Where the rounds were enough, nothing of these has a negative reduced cost: a size of a
        family that was near to being used; a bank made of one that the relaxation uses by adding a
        near bank or weight, taking one out, or splitting it by depth, shape, role or place.
    """
    if not rounds:
        return Refined(candidates=tuple(candidates), pricings=(), rounds=0)
    found, known = list(candidates), {_key(candidate) for candidate in candidates}
    for done in range(rounds + 1):
        pricings = tuple(price(found))
        if done == rounds:
            break
        more: dict[_Key, Candidate] = {}
        for pricing in pricings:
            if pricing is not None:
                banks = [found[c].sites for c in pricing.taken]
                least_gain = _LEAST_GAIN * abs(pricing.price)
                for _, candidate in _below(-least_gain, found, banks, pricer, pricing):
                    more.setdefault(_key(candidate), candidate)
        fresh = [candidate for key, candidate in more.items() if key not in known]
        if not fresh:
            return Refined(candidates=tuple(found), pricings=pricings, rounds=done)
        known.update(map(_key, fresh))
        found += fresh
    return Refined(candidates=tuple(found), pricings=pricings, rounds=rounds)


def add_near(refined: Refined, pricer: Pricer, selections: Sequence[Selection]) -> Refined | None:
    """Add what could make plans better that are not at the relaxation's price.

    A plan with a candidate costs at least its reduced cost more than the relaxation; so what can be
    of use has one below the difference between a plan and the relaxation.

    Args:
        refined: the candidates that the plans are from.
        pricer: that made them.
        selections: the plans, one for each budget.

    Returns:
        The same with more candidates; None where there are none to add.
    """
    found = refined.candidates
    known = {_key(candidate) for candidate in found}
    more: dict[_Key, tuple[float, Candidate]] = {}
    for pricing, selection in zip(refined.pricings, selections, strict=True):
        if pricing is None or selection.objective is None:
            continue
        gap = selection.objective - pricing.price
        if gap <= _CLOSE * abs(selection.objective):
            continue
        banks = [found[c].sites for c in {*pricing.taken, *selection.chosen}]
        for reduced, candidate in _below(gap, found, banks, pricer, pricing):
            key = _key(candidate)
            if key not in known and (key not in more or reduced < more[key][0]):
                more[key] = reduced, candidate
    if not more:
        return None
    best = sorted(more.items(), key=lambda item: (item[1][0], item[0][:2], str(item[0][2])))
    fresh = [candidate for _, (_, candidate) in best[:_MOST_ADDED]]
    return replace(refined, candidates=(*found, *fresh), rounds=refined.rounds + 1)


def _key(candidate: Candidate) -> _Key:
    return candidate.sites, candidate.generator, candidate.size


def _below(
    limit: float,
    candidates: Sequence[Candidate],
    banks: Iterable[Members],
    pricer: Pricer,
    pricing: Pricing,
) -> Iterator[tuple[float, Candidate]]:
    """List reduced costs below a limit, and whose they are.

    Args:
        limit: of the reduced costs.
        candidates: whose families get all their sizes, where the best is near.
        banks: that others are made from.
        pricer: counts and prices.
        pricing: what sites and resources are worth.
    """
    incidence = Incidence.of([candidate.sites for candidate in candidates])
    value = incidence.total(np.array(pricing.site_value)).astype(np.float64)
    reduced = _reduced_costs(candidates, value, pricing)
    near = np.flatnonzero(reduced <= max(limit, 0.0) + _NEAR * np.abs(value))
    families = {candidates[c].sites: float(value[c]) for c in near.tolist()}
    changed = _changed(banks, pricer).difference(candidate.sites for candidate in candidates)
    site_value = pricing.site_value
    families |= {members: sum(site_value[k] for k in members) for members in sorted(changed)}
    for members, worth in families.items():
        rivals = pricer.candidates(members, spacing=1.0)
        reduced = _reduced_costs(rivals, np.full(len(rivals), worth), pricing)
        yield from ((float(reduced[n]), rivals[n]) for n in np.flatnonzero(reduced < limit))


def _reduced_costs(
    candidates: Sequence[Candidate], value: npt.NDArray[np.float64], pricing: Pricing
) -> npt.NDArray[np.float64]:
    """``(C,)``, what candidates cost beyond what their sites are worth; see ``Pricing``."""
    reduced: npt.NDArray[np.float64] = np.array([c.price for c in candidates], float) - value
    for r, price in pricing.shadow_price.items():
        if r == MAX_BANKS:
            reduced += price * np.array([len(candidate.sites) > 1 for candidate in candidates])
        else:
            reduced += price * np.array([getattr(candidate, r) for candidate in candidates], float)
    return reduced


def _changed(banks: Iterable[Members], pricer: Pricer) -> set[Members]:
    """Site sets that are one step from these: unions, parts, and sites that move."""
    rules, distance = pricer.rules, pricer.profile.distance
    sites, places = rules.inventory.sites, rules.inventory.places()
    keys: tuple[Callable[[int], Hashable], ...] = (
        lambda k: sites[k].shape,
        lambda k: sites[k].role,
        lambda k: places.get(sites[k].name, sites[k].name),
    )
    banks, found = set(banks), set[Members]()
    for atoms in make_atoms(rules):
        atom_of = {k: atom for atom in atoms for k in atom}
        here = sorted(bank for bank in banks if bank[0] in atom_of)
        first = np.array([atom[0] for atom in atoms])
        middle = np.array([bank[len(bank) // 2] for bank in here], int)
        for bank, centre in zip(here, middle.tolist(), strict=True):
            own = sorted({atom_of[k] for k in bank})
            near = np.argsort(distance[centre, middle], kind="stable")[: _NEIGHBOURS + 1]
            found.update(_union(bank, here[n]) for n in near.tolist())
            near = np.argsort(distance[centre, first], kind="stable")[: len(own) + _NEIGHBOURS]
            found.update(_union(bank, atoms[n]) for n in near.tolist())
            far = sorted(own, key=lambda atom: (-distance[centre, atom[0]], atom))[:_LEAVING]
            found.update(_without(bank, atom) for atom in far)
            by_depth = sorted(own, key=lambda atom: (sites[atom[0]].depth, atom))
            parts = [by_depth[: len(own) // 2]]
            for key in keys:
                parts += [
                    [atom for atom in own if key(atom[0]) == value]
                    for value in {key(atom[0]) for atom in own}
                ]
            for part in parts:
                members = _union(*part)
                found.update((members, _without(bank, members)))
    found.discard(())
    return {members for members in found if keeps_apart(members, rules)}


def _union(*parts: Members) -> Members:
    return tuple(sorted({k for part in parts for k in part}))


def _without(bank: Members, other: Members) -> Members:
    return tuple(sorted(set(bank).difference(other)))
