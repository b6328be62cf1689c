"""Generators: the rules from templates and coefficients to weights."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from npas_fx.errors import NPASError
from npas_fx.generators.avg import Average
from npas_fx.generators.basis import Basis
from npas_fx.generators.dedicated import Dedicated
from npas_fx.generators.emb import LayerEmbedding
from npas_fx.generators.generator import Generator, Moments, Tensors
from npas_fx.generators.recursive import Recursive
from npas_fx.generators.resized import Resized
from npas_fx.generators.stretching import RULES
from npas_fx.generators.superweight import SuperWeight
from npas_fx.generators.tied import Tied
from npas_fx.generators.wavg import WeightedAverage
from npas_fx.generators.within import Within
from npas_fx.ir import Mixture

# What the planner may choose from where the user does not say: docs/evidence.md.
DEFAULT_GENERATORS = ("dedicated", "tied", "wavg")

_BUILT_IN: tuple[Generator, ...] = (
    Dedicated(),
    Tied(),
    WeightedAverage(),
    Average(),
    LayerEmbedding(),
    SuperWeight(),
    SuperWeight(shares_coefficients=True),
    Basis(),
    Recursive(),
    *map(Resized, RULES),
)
_registered: dict[str, Generator] = {generator.name: generator for generator in _BUILT_IN}

# All that plans may name -> the generator.
GENERATORS: Mapping[str, Generator] = MappingProxyType(_registered)


def register_generator(generator: Generator) -> None:
    """Let plans name a generator: ``generators=["name"]``, and in files that are applied or loaded.

    It is not among those that are used by default.

    Args:
        generator: of a name of its own; one that was registered before is replaced.

    Raises:
        NPASError: the name is that of a built-in generator, or empty.
    """
    if not generator.name or any(generator.name == built_in.name for built_in in _BUILT_IN):
        raise NPASError(
            f"{generator.name!r} cannot be the name of a generator of yours; choose another"
        )
    _registered[generator.name] = generator


__all__ = [
    "DEFAULT_GENERATORS",
    "GENERATORS",
    "Generator",
    "Mixture",
    "Moments",
    "Tensors",
    "Within",
    "register_generator",
]
