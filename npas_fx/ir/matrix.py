"""Weights as matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a weight: a row for each place along its first axis longer than 1."""
    rows = next((length for length in shape if length > 1), 1)
    return rows, math.prod(shape) // rows
