"""Generators: the rules from templates and coefficients to weights."""

from __future__ import annotations

from collections.abc import Mapping

from npas_fx.generators.dedicated import Dedicated
from npas_fx.generators.generator import Generator, Moments, Tensors
from npas_fx.generators.tied import Tied
from npas_fx.generators.wavg import WeightedAverage

GENERATORS: Mapping[str, Generator] = {
    "dedicated": Dedicated(),
    "tied": Tied(),
    "wavg": WeightedAverage(),
}

__all__ = ["GENERATORS", "Generator", "Moments", "Tensors"]
