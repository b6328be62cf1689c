"""A price from the eigenvalues of likeness: tried, and replaced by the one that ships."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from npas_fx.ir import Inventory, Mixture, Site
from npas_fx.profiles.structure import ROLE_FACTORS

# How alike two weights are: the sum of what they have in common.
_ALIKE = {"anything": 0.1, "kind": 0.2, "role": 0.4, "shape": 0.3}
# Likeness falls by this factor from the input of the network to its output.
_DEPTH_DECAY = 3.0
# Price of unlike weights in one bank, as a share of what it gives up, and of any sharing at all.
_CONFLICT, _SHARING = 0.5, 0.05


@dataclass(frozen=True, kw_only=True)
class Eigenvalues:
    """``G_ij = sqrt(e_i e_j) rho_ij``, with importance ``e`` (summing to 1) and likeness ``rho``.

    A bank with templates for ``K`` of its ``S`` sites is priced at what its best ``K`` templates
    leave, the sum of the smaller eigenvalues of its part of ``G`` (linear in between), plus a term
    for the conflict among its sites, which eigenvalues alone do not see.
    """

    importance: npt.NDArray[np.float64]
    likeness: npt.NDArray[np.float64]
    similarity: npt.NDArray[np.float64]

    @property
    def name(self) -> str:
        """Of the profile."""
        return "eigenvalues of likeness"

    @cached_property
    def distance(self) -> npt.NDArray[np.float64]:
        """``(S, S)``: ``sqrt(2 - 2 rho)``."""
        distance: npt.NDArray[np.float64] = np.sqrt(np.clip(2 - 2 * self.likeness, 0, None))
        return distance

    @cached_property
    def _spectra(self) -> dict[tuple[int, ...], tuple[list[float], float, float]]:
        return {}

    def price(self, sites: Sequence[int], mixture: Mixture) -> float:
        """Price of a bank, whatever its weights have of their own."""
        left, conflict, importance = self._spectrum(tuple(sites))
        if mixture.share >= 1:
            return 0.0
        reach = mixture.share * (len(left) - 1)
        whole = min(int(reach), len(left) - 2)  # numpy.interp, called for each candidate, is slow
        tail = left[whole] + (reach - whole) * (left[whole + 1] - left[whole])
        return tail + (1 - mixture.share) * (_CONFLICT * conflict + _SHARING * importance)

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


def profile_eigenvalues(inventory: Inventory) -> Eigenvalues:
    """Profile an inventory from the shapes, roles and depth of its sites."""
    sites = inventory.sites
    matters = np.array([site.numel * ROLE_FACTORS[site.role] for site in sites], dtype=np.float64)
    depth = np.array([site.depth for site in sites])
    similarity = np.array([[_similarity(a, b) for b in sites] for a in sites])
    nearness = np.exp(-math.log(_DEPTH_DECAY) * np.abs(depth[:, None] - depth))
    return Eigenvalues(
        importance=matters / max(matters.sum(), 1),
        likeness=similarity * nearness,
        similarity=similarity,
    )


def _similarity(a: Site, b: Site) -> float:
    return (
        _ALIKE["anything"]
        + _ALIKE["kind"] * (a.kind == b.kind)
        + _ALIKE["role"] * (a.role == b.role)
        + _ALIKE["shape"] * (a.shape == b.shape)
    )
