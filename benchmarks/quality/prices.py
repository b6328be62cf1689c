"""The structural prices that were tried, and what each says of a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from npas_fx.generators.generator import shapes_of
from npas_fx.ir import Inventory, Mixture, Profile
from npas_fx.profiles.structure import ROLE_FACTORS, UNLIKE, Assumptions, profile_structure
from quality.eigenvalues import profile_eigenvalues
from quality.plans import find_generator, read_banks


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """A price from sizes alone: a function of the share that a bank owns, times the bank's part."""

    inventory: Inventory
    of_share: Callable[[float], float]

    @property
    def name(self) -> str:
        """Of the profile."""
        return "sizes alone"

    @property
    def distance(self) -> npt.NDArray[np.float64]:
        """All sites are as far from each other."""
        count = len(self.inventory.sites)
        return np.ones((count, count)) - np.eye(count)

    def price(self, sites: Sequence[int], mixture: Mixture) -> float:
        """Price of a bank that owns a share of the parameters of its sites."""
        total = sum(site.numel for site in self.inventory.sites)
        part = sum(self.inventory.sites[k].numel for k in sites) / total
        return part * self.of_share(mixture.share)


def _assume(**changes: object) -> Callable[[Inventory], Profile]:
    return partial(profile_structure, assumptions=Assumptions(**changes))  # type: ignore[arg-type]


def _missing(of_share: Callable[[float], float]) -> Callable[[Inventory], Profile]:
    return lambda inventory: Missing(inventory=inventory, of_share=of_share)


def _factor(factor: float, *roles: str) -> dict[str, float]:
    return {**ROLE_FACTORS, **dict.fromkeys(roles, factor)}


PRICES: Mapping[str, Callable[[Inventory], Profile]] = {
    "as shipped": profile_structure,
    "all roles alike": _assume(role_factors=dict.fromkeys(ROLE_FACTORS, 1.0)),
    "writers cost double": _assume(role_factors=_factor(2.0, "residual_writer")),
    "readers cost double": _assume(role_factors=_factor(2.0, "residual_reader")),
    "projections cost double": _assume(role_factors=_factor(2.0, "parallel_projection")),
    "all weights matter alike": _assume(growth=0.0),
    "weights matter by their size": _assume(growth=1.0),
    "no price of reuse": _assume(reuse=0.0),
    "double price of reuse": _assume(reuse=2 * Assumptions().reuse),
    "no price of rank": _assume(rank=0.0),
    "double price of rank": _assume(rank=2 * Assumptions().rank),
    "all weights alike": _assume(unlike=dict.fromkeys(UNLIKE, 0.0)),
    "no price of parts": _assume(parts=0.0),
    "double price of parts": _assume(parts=2 * Assumptions().parts),
    "no price of distance in depth": _assume(depth=0.0),
    "double price of distance in depth": _assume(depth=2 * Assumptions().depth),
    "no price of unlike weights that are mixed": _assume(mixed=0.0),
    "fivefold price of unlike weights that are mixed": _assume(mixed=5 * Assumptions().mixed),
    "no price of a factor only": _assume(alone=0.0),
    "double price of a factor only": _assume(alone=2 * Assumptions().alone),
    "eigenvalues of likeness": profile_eigenvalues,
    "missing parameters": _missing(lambda share: max(0.0, 1 - share)),
    "missing parameters, squared": _missing(lambda share: max(0.0, 1 - share) ** 2),
    "logarithm of reuse": _missing(lambda share: max(0.0, -math.log(share))),
    "reuse": _missing(lambda share: max(0.0, 1 / share - 1)),
}


def price_plan(profile: Profile, inventory: Inventory, described: str) -> float:
    """Price of a plan that ``describe_plan`` wrote, its partial templates included."""
    prices = []
    for members, name, size in read_banks(described):
        if name != "dedicated":
            sites, generator = [inventory.sites[k] for k in members], find_generator(name)
            mixture = generator.describe(shapes_of(sites, generator), replace(size, num_partial=0))
            share = mixture.share + size.num_partial / sum(site.numel for site in sites)
            prices.append(profile.price(members, mixture._replace(share=share)))
    return math.fsum(prices)
