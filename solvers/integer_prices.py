"""Prices as integers, with one power of two for all: the only place where prices are rounded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Up to here a float holds every integer, so totals come back from CP-SAT and GLOP unchanged.
MAX_TOTAL = 2**53


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerPrices:
    """Integers that stand for prices: ``values[c] = floor(price[c] * 2**shift)``.

    Attributes:
        values: One integer for each price; their absolute values add up to at most ``2**53``.
        shift: Exponent of the scale. Where all prices are multiples of one power of two and not
            too many of it, the scale makes all of them whole and nothing is rounded. Elsewhere
            each price is rounded down by less than ``2**-shift``, a cover of ``n`` candidates by
            less than ``n * 2**-shift``, and that is at most ``n * len(values) * 2**-51`` of
            the largest absolute price. Rounded down, a lower bound stays one.
    """

    values: tuple[int, ...]
    shift: int

    def to_price(self, total: int) -> float:
        """Turn a total back; a correctly rounded float, so the order of totals is kept."""
        return _times_power_of_two(total, -self.shift)


def to_integers(price: Sequence[float]) -> IntegerPrices:
    """Scale prices by the power of two that makes them whole, or by the largest that fits."""
    ratios = [p.as_integer_ratio() for p in map(float, price)]
    # The lowest set bit of each price: at this scale it becomes an odd integer.
    exact_shift = max(
        ((den & -den).bit_length() - (num & -num).bit_length() for num, den in ratios if num),
        default=0,
    )
    largest = max((abs(p) for p in price), default=0.0)
    # frexp: largest < 2**exponent, so the floors add up to at most len * (2**exponent * scale).
    fitting_shift = (
        MAX_TOTAL.bit_length() - 1 - math.frexp(largest)[1] - len(ratios).bit_length()
        if largest
        else 0
    )
    shift = min(exact_shift, fitting_shift)
    if shift >= 0:
        values = tuple((num << shift) // den for num, den in ratios)
    else:
        values = tuple(num // (den << -shift) for num, den in ratios)
    return IntegerPrices(values=values, shift=shift)


def _times_power_of_two(number: int, exponent: int) -> float:
    if exponent >= 0:
        return float(number << exponent)
    return number / (1 << -exponent)  # int / int is correctly rounded, unlike ldexp of a float
