"""The structural prices that were tried, and what each says of a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from npas_fx.ir import Inventory, Profile
from npas_fx.profiles.structure import (
    ALIKE,
    ROLE_FACTORS,
    Assumptions,
    profile_structure,
)
from quality.plans import read_banks


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

    def price(self, sites: Sequence[int], share: float) -> float:
        """Price of a bank that owns ``share`` of the parameters of its sites."""
        total = sum(site.numel for site in self.inventory.sites)
        part = sum(self.inventory.sites[k].numel for k in sites) / total
        return part * self.of_share(share)


def _assume(**changes: object) -> Callable[[Inventory], Profile]:
    return partial(profile_structure, assumptions=Assumptions(**changes))  # type: ignore[arg-type]


def _missing(of_share: Callable[[float], float]) -> Callable[[Inventory], Profile]:
    return lambda inventory: Missing(inventory=inventory, of_share=of_share)


def _factor(factor: float, *roles: str) -> dict[str, float]:
    return {**ROLE_FACTORS, **dict.fromkeys(roles, factor)}


_EQUAL = dict.fromkeys(ROLE_FACTORS, 1.0)
_NOT_ALIKE = dict.fromkeys(ALIKE, 0.0)

PRICES: Mapping[str, Callable[[Inventory], Profile]] = {
    "as shipped": profile_structure,
    "all roles alike": _assume(role_factors=_EQUAL),
    "writers cost double": _assume(role_factors=_factor(2.0, "residual_writer")),
    "readers cost double": _assume(role_factors=_factor(2.0, "residual_reader")),
    "projections cost double": _assume(role_factors=_factor(2.0, "parallel_projection")),
    "no price of conflict": _assume(conflict=0.0),
    "double price of conflict": _assume(conflict=1.0),
    "no decay with depth": _assume(depth_decay=1.0),
    "tenfold decay with depth": _assume(depth_decay=10.0),
    "alike by role only": _assume(alike={**_NOT_ALIKE, "role": 1.0}),
    "alike by shape only": _assume(alike={**_NOT_ALIKE, "shape": 1.0}),
    "all alike": _assume(alike={**_NOT_ALIKE, "anything": 1.0}),
    "missing parameters": _missing(lambda share: max(0.0, 1 - share)),
    "missing parameters, squared": _missing(lambda share: max(0.0, 1 - share) ** 2),
    "logarithm of reuse": _missing(lambda share: max(0.0, -math.log(share))),
    "reuse": _missing(lambda share: max(0.0, 1 / share - 1)),
}


def price_plan(profile: Profile, inventory: Inventory, described: str) -> float:
    """Price of a plan that ``describe_plan`` wrote, its partial templates included."""
    prices = []
    for sites, generator, size in read_banks(described):
        if generator != "dedicated":
            owned = size.num_templates * size.template_size + size.num_partial
            total = sum(inventory.sites[k].numel for k in sites)
            prices.append(profile.price(sites, owned / total))
    return math.fsum(prices)
