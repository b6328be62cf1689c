"""``structure``: prices from shapes, roles and depth alone, for want of better evidence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from npas_fx.ir import Inventory, Site

# How much a parameter of a weight of each role matters, next to one of any other. Where each factor
# comes from and what would change it: docs/decisions/0007-factors-of-roles.md.
ROLE_FACTORS = {
    "stem": 4.0,
    "head": 4.0,
    "embedding": 2.0,
    "residual_writer": 1.25,
    "residual_reader": 1.0,
    "parallel_projection": 1.0,
    "shortcut": 1.0,
    "depthwise": 1.0,
    "other": 1.0,
}
# How alike the ideal weights of two sites are taken to be: the sum of what they have in common.
# Where the numbers come from, and how little that is: docs/decisions/0004-prices-from-structure.md.
ALIKE = {"anything": 0.1, "kind": 0.2, "role": 0.4, "shape": 0.3}
# Price of any sharing at all, so that nothing shared is ever as good as dedicated weights.
SHARING = 0.05
# What doubling a bank beyond the size of its weights is worth; so little that no weights are
# shared to make room for it.
EXCESS = 0.02
# Prices are multiples of this, so that their sums are exact in floating point.
RESOLUTION = 2.0**-32


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What prices from structure rest on; each can be another to see what it is worth.

    Attributes:
        role_factors: role -> how much a parameter of it matters.
        alike: what two sites may have in common -> how alike it makes them; the sum is 1.
        depth_decay: likeness falls by this factor from the input of the network to its output.
        conflict: price of unlike weights in one bank, as a share of what the bank gives up.
    """

    role_factors: Mapping[str, float] = field(default_factory=lambda: ROLE_FACTORS)
    alike: Mapping[str, float] = field(default_factory=lambda: ALIKE)
    depth_decay: float = 3.0
    conflict: float = 0.5


@dataclass(frozen=True, kw_only=True)
class StructureProfile:
    """``G_ij = sqrt(e_i e_j) rho_ij``, with importance ``e`` (summing to 1) and likeness ``rho``.

    A bank with templates for ``K`` of its ``S`` sites is priced at what its best ``K`` templates
    leave, the sum of the smaller eigenvalues of its part of ``G`` (linear in between), plus a term
    for the conflict among its sites, which eigenvalues alone do not see.
    """

    importance: npt.NDArray[np.float64]
    likeness: npt.NDArray[np.float64]
    similarity: npt.NDArray[np.float64]
    assumptions: Assumptions = field(default_factory=Assumptions)

    @property
    def name(self) -> str:
        """Of the profile."""
        return "structure"

    @cached_property
    def distance(self) -> npt.NDArray[np.float64]:
        """``(S, S)``: ``sqrt(2 - 2 rho)``."""
        distance: npt.NDArray[np.float64] = np.sqrt(np.clip(2 - 2 * self.likeness, 0, None))
        return distance

    @cached_property
    def _spectra(self) -> dict[tuple[int, ...], tuple[list[float], float, float]]:
        return {}

    def price(self, sites: Sequence[int], share: float) -> float:
        """Price of a bank that owns ``share`` of the parameters of its sites."""
        left, conflict, importance = self._spectrum(tuple(sites))
        if share > 1:
            # Generating a weight costs time whatever the excess: rather two templates for half of
            # the weights than a few more for all, and rather small banks than large ones.
            worth = math.log2(share) if share > 2 else (share - 1) ** 2
            return _round(-EXCESS * importance * worth * (1 - 1e-3 * min(len(sites), 100)))
        reach = share * (len(left) - 1)
        whole = min(int(reach), len(left) - 2)  # numpy.interp, called for each candidate, is slow
        tail = left[whole] + (reach - whole) * (left[whole + 1] - left[whole])
        return _round(
            tail + (1 - share) * (self.assumptions.conflict * conflict + SHARING * importance)
        )

    def _spectrum(self, sites: tuple[int, ...]) -> tuple[list[float], float, float]:
        if sites not in self._spectra:
            chosen = np.array(sites)
            importance = self.importance[chosen]
            root = np.sqrt(importance)
            gram = root[:, None] * self.likeness[np.ix_(chosen, chosen)] * root
            values = np.clip(np.linalg.eigvalsh(gram), 0, None)
            left = [0.0, *np.cumsum(values).tolist()][::-1]
            total = float(importance.sum())
            weight = importance / total
            conflict = total * float(
                weight @ (1 - self.similarity[np.ix_(chosen, chosen)]) @ weight
            )
            self._spectra[sites] = (left, conflict, total)
        return self._spectra[sites]


def profile_structure(
    inventory: Inventory, assumptions: Assumptions | None = None
) -> StructureProfile:
    """Profile an inventory from the shapes, roles and depth of its sites."""
    assumptions = Assumptions() if assumptions is None else assumptions
    sites, factors = inventory.sites, assumptions.role_factors
    matters = np.array([site.numel * factors[site.role] for site in sites], dtype=np.float64)
    depth = np.array([site.depth for site in sites])
    similarity = np.array(
        [[_similarity(a, b, assumptions.alike) for b in sites] for a in sites]
    ).reshape(len(sites), len(sites))
    nearness = np.exp(-math.log(assumptions.depth_decay) * np.abs(depth[:, None] - depth))
    return StructureProfile(
        importance=matters / max(matters.sum(), 1),
        likeness=similarity * nearness,
        similarity=similarity,
        assumptions=assumptions,
    )


def _similarity(a: Site, b: Site, alike: Mapping[str, float]) -> float:
    return (
        alike["anything"]
        + alike["kind"] * (a.kind == b.kind)
        + alike["role"] * (a.role == b.role)
        + alike["shape"] * (a.shape == b.shape)
    )


def _round(price: float) -> float:
    steps = round(price / RESOLUTION) or (1 if price > 0 else -1)  # never as good as dedicated
    return steps * RESOLUTION
