"""Propose: the possible banks that a plan is chosen from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform

from npas_fx.generators import GENERATORS, Generator
from npas_fx.generators.generator import Shapes, num_parameters, shapes_of
from npas_fx.ir import Candidate, Mixture, Profile, Site, Size
from npas_fx.rules import Rules

# Indices of the sites of a bank, increasing; and such sets that are never apart.
Members: TypeAlias = "tuple[int, ...]"

# Sizes that are proposed for a family at first differ by this factor; ``refine`` adds those between
# that the best plan could use.
SPACING = 2.0
_RUN_LENGTHS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
# Of more weights than this, runs have fewer lengths and start at fewer places.
_MANY = 400
# Up to so many weights all their sets are families.
_FEW = 6
_LINKAGES: tuple[Literal["average", "complete"], ...] = ("average", "complete")
# The distances of more weights than this take gigabytes, so there is no tree over them.
_MOST_IN_TREE = 12_000
# A group of ``different_bank`` makes as many variants of each family as it has weights, up to this.
_MOST_VARIANTS = 8


def propose(pricer: Pricer) -> tuple[Candidate, ...]:
    """List the candidates: families of site sets, times generators, times sizes.

    The families are all single sites, classes of one shape, of one role and of one place in the
    blocks that are repeated, runs of neighbours in depth in these and in all, and the nodes of
    clustering trees over the profile's distances; of very few weights, all sets. A bank has one
    dtype and one device, so each family is made within these. Sites in one group of ``same_bank``
    are never apart, those in one of ``different_bank`` never together.

    Returns:
        The pinned banks, in their order; then candidates without those that another one for the
        same sites beats in cost and price. Each site is in at least one.
    """
    candidates = pricer.pinned()
    for members in sorted(_families(pricer.rules, pricer.profile)):
        candidates += pricer.candidates(members, spacing=SPACING)
    return tuple(candidates)


class Option(NamedTuple):
    """A bank for weights of given shapes: all that does not depend on which weights they are."""

    generator: str
    size: Size
    parameters: int
    mixture: Mixture


@dataclass(frozen=True, kw_only=True)
class Pricer:
    """Counts and prices the banks that sites may have.

    Attributes:
        rules: the user's.
        profile: of the same inventory.
        generators: the rules that banks may follow.
        above: whether banks larger than their weights are wanted too.
    """

    rules: Rules
    profile: Profile
    generators: Sequence[Generator]
    above: bool
    # Blocks are repeated, so most families have shapes that were seen before.
    _options: dict[tuple[Hashable, float], tuple[Option, ...]] = field(
        default_factory=dict, init=False
    )
    _candidates: dict[tuple[Members, float], list[Candidate]] = field(
        default_factory=dict, init=False
    )

    def candidates(self, members: Members, *, spacing: float) -> list[Candidate]:
        """List the banks that these sites may have, without those that another one beats.

        Args:
            members: indices of sites of one dtype and device.
            spacing: the least factor between the parameters of two sizes of one generator.
        """
        if (members, spacing) not in self._candidates:
            is_private = len(members) == 1 and members[0] in self.rules.private
            found = [
                price_option(members, self.rules.inventory.sites, option, self.profile)
                for option in self.options(members, spacing)
                if not is_private or option.generator == "dedicated"
            ]
            self._candidates[members, spacing] = list(_drop_dominated(found))
        return self._candidates[members, spacing]

    def options(self, members: Members, spacing: float) -> tuple[Option, ...]:
        """List the sizes of banks for these sites; see ``candidates``."""
        sites = [self.rules.inventory.sites[k] for k in members]
        key = tuple(site.part_shapes for site in sites), spacing
        if key not in self._options:
            options: list[Option] = []
            for generator in self.generators:
                shapes = shapes_of(sites, generator)
                sizes = generator.propose(shapes, above=self.above)
                each = [describe(generator, shapes, size) for size in sizes]
                if len(sites) == 1 < len(shapes):
                    each = [option for option in each if not _is_one_for_all(option.mixture)]
                options += _spread(sorted(each, key=lambda o: o.parameters), spacing)
            self._options[key] = tuple(options)
        return self._options[key]

    def pinned(self) -> list[Candidate]:
        """The banks that the user pinned."""
        known = {**GENERATORS, **{generator.name: generator for generator in self.generators}}
        sites = self.rules.inventory.sites
        return [
            make_candidate(pin.sites, sites, known[pin.generator], pin.size, self.profile)
            for pin in self.rules.pinned
        ]


def make_candidate(
    members: Members, sites: Sequence[Site], generator: Generator, size: Size, profile: Profile
) -> Candidate:
    """Count and price one bank."""
    option = describe(generator, shapes_of([sites[k] for k in members], generator), size)
    return price_option(members, sites, option, profile)


def describe(generator: Generator, shapes: Shapes, size: Size) -> Option:
    """Count one bank for weights of these shapes."""
    return Option(
        generator=generator.name,
        size=size,
        parameters=num_parameters(generator, shapes, size),
        mixture=generator.describe(shapes, size),
    )


def price_option(
    members: Members, sites: Sequence[Site], option: Option, profile: Profile
) -> Candidate:
    """Price a bank whose parameters are counted."""
    price = 0.0
    if option.generator != "dedicated":
        price = profile.price(members, option.mixture)
    return Candidate(
        sites=members,
        generator=option.generator,
        size=option.size,
        parameters=option.parameters,
        bytes=option.parameters * sites[members[0]].dtype.itemsize,
        price=price,
    )


def _is_one_for_all(mixture: Mixture) -> bool:
    """Whether all weights are copies of one but for their scales, which parts of one cannot be."""
    return mixture.templates <= 1 and mixture.parts <= 1


def _spread(options: Sequence[Option], spacing: float) -> Iterator[Option]:
    """Leave out sizes that are too near to the one before; the largest stays."""
    least = 0.0
    for option in options:
        if option.parameters >= least or option is options[-1]:
            least = option.parameters * spacing
            yield option


def _drop_dominated(candidates: Iterable[Candidate]) -> Iterator[Candidate]:
    best = float("inf")
    for candidate in sorted(candidates, key=lambda c: (c.parameters, c.price)):
        if candidate.price < best:
            best = candidate.price
            yield candidate


def make_atoms(rules: Rules) -> list[list[Members]]:
    """Groups of ``same_bank`` and single sites that may share, apart by dtype and device.

    Those of one dtype and device stand in the order of their depth.
    """
    sites = rules.inventory.sites
    grouped = {k for group in rules.groups for k in group}
    singles = [(k,) for k in range(len(sites)) if k not in grouped and k not in rules.private]
    apart: dict[Hashable, list[Members]] = defaultdict(list)
    for atom in (*singles, *rules.groups):
        apart[sites[atom[0]].dtype, sites[atom[0]].device].append(atom)
    return [
        sorted(atoms, key=lambda atom: (sites[atom[0]].depth, atom)) for atoms in apart.values()
    ]


def keeps_apart(members: Iterable[int], rules: Rules) -> bool:
    """Whether no two of these sites are in one group of ``different_bank``."""
    chosen = set(members)
    return all(len(chosen.intersection(group)) < 2 for group in rules.apart)


def _families(rules: Rules, profile: Profile) -> set[Members]:
    """Site sets that a bank may have; a group of ``same_bank`` counts as one element."""
    sites, places = rules.inventory.sites, rules.inventory.places()
    families: set[Members] = {(k,) for k in rules.private}
    for atoms in make_atoms(rules):
        families.update(atoms)
        for chosen in (
            *_classes(atoms, lambda k: sites[k].shape),
            *_classes(atoms, lambda k: sites[k].role),
            *_classes(atoms, lambda k: (sites[k].role, sites[k].shape)),
            *_classes(atoms, lambda k: places.get(sites[k].name, sites[k].name)),
            atoms,
        ):
            families.add(_union(chosen))
            families.update(_runs(chosen))
        families.update(_trees(atoms, profile))
        if len(atoms) <= _FEW:
            for number in range(1, len(atoms) + 1):
                families.update(map(_union, combinations(atoms, number)))
    if not rules.apart:
        return families
    return {variant for members in families for variant in _variants(members, rules)}


def _union(atoms: Iterable[Members]) -> Members:
    return tuple(sorted(k for atom in atoms for k in atom))


def _classes(atoms: Sequence[Members], key: Callable[[int], Hashable]) -> list[list[Members]]:
    classes: dict[Hashable, list[Members]] = defaultdict(list)
    for atom in atoms:
        classes[key(atom[0])].append(atom)
    return list(classes.values())


def _runs(atoms: Sequence[Members]) -> Iterator[Members]:
    """Runs of neighbours in depth: short ones at every place, long ones at every half length."""
    is_many = len(atoms) > _MANY
    for length in _RUN_LENGTHS:
        if is_many and length & (length - 1):  # powers of two only
            continue
        step = max(1, length // (2 if is_many else 4))
        for start in range(0, len(atoms) - length + 1, step):
            yield _union(atoms[start : start + length])
    for parts in range(1, 5):  # and equal parts of the whole
        bounds = [round(part * len(atoms) / parts) for part in range(parts + 1)]
        for start, stop in pairwise(bounds):
            if stop > start:
                yield _union(atoms[start:stop])


def _trees(atoms: Sequence[Members], profile: Profile) -> Iterator[Members]:
    """Nodes of clustering trees over the profile's distances, one for each linkage."""
    if not 2 <= len(atoms) <= _MOST_IN_TREE:
        return
    first = np.array([atom[0] for atom in atoms])
    distance = profile.distance[np.ix_(first, first)]
    np.fill_diagonal(distance, 0)
    condensed = squareform(distance, checks=False)
    for method in _LINKAGES:
        nodes = [_union([atom]) for atom in atoms]
        for left, right, *_ in linkage(condensed, method=method):
            nodes.append(_union([nodes[int(left)], nodes[int(right)]]))
            yield nodes[-1]


def _variants(members: Members, rules: Rules) -> Iterator[Members]:
    """Parts of a family that keep ``different_bank``; in each variant another site comes first."""
    together = {k: group for group in rules.groups for k in group}
    groups_of = {
        atom: {g for g, group in enumerate(rules.apart) if set(group).intersection(atom)}
        for atom in sorted({together.get(k, (k,)) for k in members})
    }
    rivals = [atom for atom, groups in groups_of.items() if groups]
    free = [atom for atom, groups in groups_of.items() if not groups]
    for turn in range(max(1, min(len(rivals), _MOST_VARIANTS))):
        parts: list[tuple[list[Members], set[int]]] = []
        for atom in (*rivals[turn:], *rivals[:turn], *free):
            for part, groups in parts:
                if not groups & groups_of[atom]:
                    part.append(atom)
                    groups |= groups_of[atom]
                    break
            else:
                parts.append(([atom], set(groups_of[atom])))
        for part, _ in parts:
            yield _union(part)
