"""Measure calls in turn, and compare them pair by pair."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

from scipy.stats import binom

SHORTEST = 0.005  # seconds of one measurement: quicker calls are repeated in it


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 32 MiB, as it does within a training step.

    There, what is freed has memory in use above it and is not returned: generating the weights of a
    WRN-28-10 made none of its 35,644 pages anew. Alone in a process, a large bank may make all of
    them at each call, which takes several times as long as the rest, or none, as it happens.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
        library.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


class Ratio(NamedTuple):
    """Median of pairwise ratios, and the 95 % interval of that median."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.low:.2f} to {self.high:.2f})"


def take_turns(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Measure the CPU seconds of each call, one after the other, so many times."""
    number = {}
    for name, call in calls.items():
        call()
        number[name] = max(1, int(SHORTEST / max(_measure(call, 1), 1e-6)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(_measure(call, number[name]))
    return seconds


def _measure(call: Callable[[], object], number: int) -> float:
    start = time.process_time()
    for _ in range(number):
        call()  # what it returns is freed here, in its time
    return (time.process_time() - start) / number


def compare(slow: Sequence[float], fast: Sequence[float]) -> Ratio:
    """How many times the second the first took."""
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    # Order statistics between which the median lies with 95 % probability.
    rank = max(int(binom.ppf(0.025, len(ratios), 0.5)) - 1, 0)
    return Ratio(median(ratios), ratios[rank], ratios[-1 - rank])
