"""A possible bank, and the evidence by which it is priced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from npas_fx.ir.size import Size


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A possible bank.

    Attributes:
        sites: indices into the inventory's sites, in its order.
        generator: name of the generator.
        size: of the bank.
        parameters: trainable parameters that it owns.
        bytes: bytes of these.
        price: expected loss; 0 for dedicated weights, negative for more than these.
    """

    sites: tuple[int, ...]
    generator: str
    size: Size
    parameters: int
    bytes: int
    price: float


class Mixture(NamedTuple):
    """How much a bank shares, as far as prices ask.

    Attributes:
        share: parameters that the weights are made of, as a share of their elements.
        templates: that each part of a weight is mixed from; 1 for weights that are one and the
            same up to a factor.
        parts: that a weight is cut into, each with coefficients of its own; a mean over weights.
        rank: of a generated weight at most, as a matrix with a row for each output; None where
            only the number of parameters limits it.
    """

    share: float
    templates: float
    parts: float
    rank: int | None = None


class Profile(Protocol):
    """The evidence behind distances and prices."""

    @property
    def name(self) -> str:
        """What the certificate calls it."""

    @property
    def distance(self) -> npt.NDArray[np.float64]:
        """``(S, S)``, how unlike the ideal weights of two sites are; symmetric."""

    def price(self, sites: Sequence[int], mixture: Mixture) -> float:
        """Price of a bank.

        Args:
            sites: its members.
            mixture: how much it shares.
        """
