"""How the tensors of a new bank are drawn, so that its weights have the moments of plain ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from npas_fx.generators.generator import Moments

# A generated weight may miss the mean of the one it replaces by this many standard deviations
# before an offset mends it: adding one costs a pass over the weight at each forward, and the mean
# of a large random weight is off by less anyway.
MEAN_TOLERANCE = 0.02

# The same seed draws the same bank whatever defaults of dtype and device the program has set; of
# half precision there is not even a QR decomposition.
PLAIN: Any = {"dtype": torch.float32, "device": "cpu"}


def typical_std(moments: Sequence[Moments]) -> float:
    """The root mean square of the standard deviations; 1 where all weights are constant."""
    return math.sqrt(sum(m.std**2 for m in moments) / len(moments)) or 1.0


def draw_normal(rows: int, columns: int, random: torch.Generator) -> Tensor:
    """``(rows, columns)``, standard normal."""
    return torch.randn(rows, columns, generator=random, **PLAIN)


def draw_rows(rows: int, columns: int, random: torch.Generator) -> Tensor:
    """``(rows, columns)`` of norm 1, orthonormal where there are no more rows than columns.

    Of one column, each row is a normal number: of norm 1, rows would be copies of one another.
    """
    drawn = draw_normal(rows, columns, random)
    if columns == 1:
        return drawn if rows > 1 else torch.ones_like(drawn)
    if rows <= columns:
        orthonormal: Tensor = torch.linalg.qr(drawn.T)[0].T.contiguous()
        return orthonormal
    return functional.normalize(drawn, dim=1)


def match_moments(weights: Sequence[Tensor], moments: Sequence[Moments]) -> tuple[Tensor, Tensor]:
    """Find the gains and offsets that give weights the moments that are wanted.

    Args:
        weights: as generated with all gains 1.
        moments: wanted of each.

    Returns:
        Gain and offset of each weight, ``(S,)``. A weight that is to be constant has a gain of 1
        and its constant as offset: whoever draws it sets to zero what it is generated from.
    """
    gain, offset = torch.ones(len(weights), **PLAIN), torch.zeros(len(weights), **PLAIN)
    for k, (weight, wanted) in enumerate(zip(weights, moments, strict=True)):
        if wanted.std == 0:
            offset[k] = wanted.mean
            continue
        drawn = Moments.of(weight)
        gain[k] = wanted.std / drawn.std
        missing = wanted.mean - wanted.std / drawn.std * drawn.mean
        if abs(missing) > MEAN_TOLERANCE * wanted.std:
            offset[k] = missing
    return gain, offset


def constant(moments: Sequence[Moments]) -> list[int]:
    """Places of the weights that are to be constant."""
    return [k for k, wanted in enumerate(moments) if wanted.std == 0]
