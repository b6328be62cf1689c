"""Plans that nobody optimised: groups made by hand, or drawn."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
from torch import nn

import npas_fx
from npas_fx.generators import GENERATORS, Generator
from npas_fx.generators.generator import shapes_of
from npas_fx.ir import Inventory, Mixture, Plan, Site
from npas_fx.ir.size import Size

Groups = Sequence[Sequence[str]]


def plan_groups(
    model: nn.Module,
    budget: object,
    groups: Groups,
    generators: Sequence[str] = ("wavg",),
) -> Plan:
    """Give each group one bank, all about the same share of their weights; the rest is dedicated.

    Args:
        model: to plan for.
        budget: as for ``npas_fx.plan``.
        groups: of names of sites; one that stands alone may stay dedicated.
        generators: that banks may follow.

    Raises:
        npas_fx.InfeasibleBudgetError: with these groups it cannot be met.
    """
    names = [site.name for site in npas_fx.inspect(model).sites]
    grouped = {name for group in groups for name in group}
    return npas_fx.plan(
        model,
        budget,
        same_bank=[list(group) for group in groups if len(group) > 1],
        different_bank=[[group[0] for group in groups]] if len(groups) > 1 else None,
        keep_private=[name for name in names if name not in grouped] or None,
        profile=Proportional,
        generators=generators,
    )


def group_sites(model: nn.Module, key: Callable[[Site], Hashable]) -> list[list[str]]:
    """Group the names of sites, in the order of their depth."""
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for site in sorted(npas_fx.inspect(model).sites, key=lambda site: site.depth):
        groups[key(site)].append(site.name)
    return list(groups.values())


def cut_groups(groups: Groups, length: int) -> list[list[str]]:
    """Cut each group into runs of at most ``length``."""
    return [
        list(group[start : start + length])
        for group in groups
        for start in range(0, len(group), length)
    ]


def shuffle_groups(groups: Groups, number: int, seed: int) -> list[list[str]]:
    """Deal out all names to ``number`` groups of equal size, give or take one."""
    names = [name for group in groups for name in group]
    order = np.random.default_rng(seed).permutation(len(names))
    return [[names[k] for k in part] for part in np.array_split(order, number) if len(part)]


@dataclasses.dataclass(frozen=True)
class Proportional:
    """A profile by which every bank should own the same share of its weights."""

    inventory: Inventory

    @property
    def name(self) -> str:
        """Of the profile."""
        return "equal shares"

    @property
    def distance(self) -> npt.NDArray[np.float64]:
        """Not used, since the groups are given."""
        return np.zeros((len(self.inventory.sites),) * 2)

    def price(self, sites: Sequence[int], mixture: Mixture) -> float:
        """Quadratic in the missing share, so that equal shares are cheapest."""
        numel = sum(self.inventory.sites[k].numel for k in sites)
        total = sum(site.numel for site in self.inventory.sites)
        if mixture.share > 1:
            return -1e-3 * numel / total * math.log2(mixture.share)
        return max(numel / total * (1 - mixture.share) ** 2, 1e-9)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A profile that prices at random, so that the best plan is a random one.

    A bank costs the logarithm of its reuse, which spreads what there is over all banks, times a
    factor of its own, and each role's weights times a factor of the role. All factors are the same
    for the same seed.
    """

    inventory: Inventory
    seed: int

    @property
    def name(self) -> str:
        """Of the profile."""
        return f"random prices {self.seed}"

    @property
    def distance(self) -> npt.NDArray[np.float64]:
        """Random, so that the clustering tree is."""
        count = len(self.inventory.sites)
        drawn = np.random.default_rng([self.seed, 0]).random((count, count)) + 0.1
        symmetric: npt.NDArray[np.float64] = drawn + drawn.T
        np.fill_diagonal(symmetric, 0)
        return symmetric

    def price(self, sites: Sequence[int], mixture: Mixture) -> float:
        """A random factor of the bank, times what each of its sites shares."""
        reuse = max(-math.log(mixture.share), 1e-9)
        own = math.exp(np.random.default_rng([self.seed, 1, *sites]).normal() / 2)
        return own * reuse * sum(self._worth(self.inventory.sites[k]) for k in sites)

    def _worth(self, site: Site) -> float:
        letters = [ord(letter) for letter in site.role]
        drawn = np.random.default_rng([self.seed, 2, *letters]).normal()
        return site.numel * math.exp(drawn / 2)


def describe_plan(plan: Plan, inventory: Inventory) -> str:
    """Write the banks as JSON: numbers of sites, generator, and the fields of the size.

    A rank of 0 is left out.

    Short enough for a cell of a table; ``Plan.to_json`` writes all, names and certificate too.
    """
    number = {site.name: index for index, site in enumerate(inventory.sites)}
    banks = [
        [
            [number[name] for name in bank.sites],
            bank.generator,
            bank.size.num_templates,
            bank.size.template_size,
            bank.size.num_partial,
            *([bank.size.rank] if bank.size.rank else []),
        ]
        for bank in plan.banks
    ]
    return json.dumps(banks, separators=(",", ":"))


def read_banks(described: str) -> Iterable[tuple[tuple[int, ...], str, Size]]:
    """Read what ``describe_plan`` wrote: sites, generator and size of each bank."""
    fields = [field.name for field in dataclasses.fields(Size)]
    for sites, generator, *numbers in json.loads(described):
        size = Size(**dict(zip(fields, numbers, strict=False)))
        yield tuple(sites), generator, size


def find_generator(name: str) -> Generator:
    """Find a generator; others than those that are built in mix templates as ``wavg`` does."""
    return GENERATORS.get(name, GENERATORS["wavg"])


def count_generation_flops(plan: Plan, inventory: Inventory) -> int:
    """Count multiplications and additions that make all weights of a plan once."""
    sites = {site.name: site for site in inventory.sites}
    total = 0
    for bank in plan.banks:
        generator = find_generator(bank.generator)
        total += generator.flops(shapes_of([sites[n] for n in bank.sites], generator), bank.size)
    return total
