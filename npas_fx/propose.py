"""Propose: the possible banks that a plan is chosen from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform

from npas_fx.generators import Generator
from npas_fx.generators.generator import num_parameters
from npas_fx.ir import Candidate, Profile, Site, Size
from npas_fx.rules import Rules

_RUN_LENGTHS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def propose(
    rules: Rules, profile: Profile, generators: Iterable[Generator], *, above: bool
) -> tuple[Candidate, ...]:
    """List the candidates: families of site sets, times generators, times sizes.

    The families are all single sites, classes of one shape, of one role and of one place in the
    blocks that are repeated, runs of neighbours in depth in these and in all, and the nodes of a
    clustering tree over the profile's distances. A bank has one dtype and one device, so each
    family is made within these.

    Args:
        rules: sites in one group of ``same_bank`` are never apart; private ones are dedicated.
        profile: of the same inventory.
        generators: the rules that banks may follow.
        above: whether banks larger than their weights are wanted too.

    Returns:
        Candidates without those that another one for the same sites beats in cost and price; each
        site is in at least one.
    """
    sites, generators = rules.inventory.sites, tuple(generators)
    candidates: list[Candidate] = []
    for members in sorted(_families(rules, profile)):
        is_private = len(members) == 1 and members[0] in rules.private
        shapes = [sites[k].shape for k in members]
        for generator in generators:
            if not is_private or generator.name == "dedicated":
                sizes = generator.propose(shapes, above=above)
                candidates += _make_candidates(members, sites, generator, sizes, profile)
    return tuple(_drop_dominated(candidates))


def make_candidate(
    members: Sequence[int],
    sites: Sequence[Site],
    generator: Generator,
    size: Size,
    profile: Profile,
) -> Candidate:
    """Count and price one bank."""
    return next(_make_candidates(members, sites, generator, (size,), profile))


def _make_candidates(
    members: Sequence[int],
    sites: Sequence[Site],
    generator: Generator,
    sizes: Iterable[Size],
    profile: Profile,
) -> Iterator[Candidate]:
    """Count and price banks for the same sites; what all sizes have in common is found once."""
    shapes = [sites[k].shape for k in members]
    total = sum(sites[k].numel for k in members)
    itemsize = sites[members[0]].dtype.itemsize
    is_dedicated = generator.name == "dedicated"
    for size in sizes:
        parameters = num_parameters(generator, shapes, size)
        shared = size.num_templates * size.template_size
        parts = size.rows([sites[k].numel for k in members]) / len(members)
        yield Candidate(
            sites=tuple(members),
            generator=generator.name,
            size=size,
            parameters=parameters,
            bytes=parameters * itemsize,
            price=0.0
            if is_dedicated
            else profile.price(members, shared / total, size.num_templates, parts),
        )


def _drop_dominated(candidates: Iterable[Candidate]) -> Iterator[Candidate]:
    same: dict[tuple[int, ...], list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        same[candidate.sites].append(candidate)
    for rivals in same.values():
        best = float("inf")
        for candidate in sorted(rivals, key=lambda c: (c.parameters, c.price)):
            if candidate.price < best:
                best = candidate.price
                yield candidate


def _families(rules: Rules, profile: Profile) -> set[tuple[int, ...]]:
    """Site sets that a bank may have; a group of ``same_bank`` counts as one element."""
    sites, places = rules.inventory.sites, rules.inventory.places()
    grouped = {k for group in rules.groups for k in group}
    singles = [(k,) for k in range(len(sites)) if k not in grouped]
    families: set[tuple[int, ...]] = {*singles, *rules.groups}
    apart: dict[object, list[tuple[int, ...]]] = defaultdict(list)
    for atom in sorted(families):
        if atom[0] not in rules.private:
            apart[sites[atom[0]].dtype, sites[atom[0]].device].append(atom)
    for atoms in apart.values():
        atoms.sort(key=lambda atom: (sites[atom[0]].depth, atom))
        for chosen in (
            *_classes(atoms, sites, lambda site: site.shape),
            *_classes(atoms, sites, lambda site: site.role),
            *_classes(atoms, sites, lambda site: (site.role, site.shape)),
            *_classes(atoms, sites, lambda site: places.get(site.name, site.name)),
        ):
            families.add(_union(chosen))
            families |= set(_runs(chosen))
        families |= set(_runs(atoms))
        families |= set(_tree(atoms, profile))
    return families


def _union(atoms: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(sorted(k for atom in atoms for k in atom))


def _classes(
    atoms: Sequence[tuple[int, ...]], sites: Sequence[Site], key: object
) -> list[list[tuple[int, ...]]]:
    classes: dict[object, list[tuple[int, ...]]] = defaultdict(list)
    for atom in atoms:
        classes[key(sites[atom[0]])].append(atom)  # type: ignore[operator]
    return list(classes.values())


def _runs(atoms: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """Runs of neighbours in depth: short ones at every place, long ones at every half length."""
    for length in _RUN_LENGTHS:
        step = max(1, length // 4)
        for start in range(0, len(atoms) - length + 1, step):
            yield _union(atoms[start : start + length])
    for parts in range(1, 5):  # and equal parts of the whole
        bounds = [round(part * len(atoms) / parts) for part in range(parts + 1)]
        for start, stop in pairwise(bounds):
            if stop > start:
                yield _union(atoms[start:stop])


def _tree(atoms: Sequence[tuple[int, ...]], profile: Profile) -> Iterator[tuple[int, ...]]:
    """Nodes of an average-linkage clustering tree over the profile's distances."""
    if len(atoms) < 2:
        return
    first = np.array([atom[0] for atom in atoms])
    distance = profile.distance[np.ix_(first, first)].copy()
    np.fill_diagonal(distance, 0)
    nodes = [_union([atom]) for atom in atoms]
    for left, right, *_ in linkage(squareform(distance, checks=False), method="average"):
        nodes.append(_union([nodes[int(left)], nodes[int(right)]]))
        yield nodes[-1]
