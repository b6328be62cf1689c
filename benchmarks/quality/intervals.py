"""Means over seeds with their intervals, and which of them can be told apart."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from scipy.stats import t

CONFIDENCE = 0.95

Name = TypeVar("Name", bound=Hashable)
Mark = Literal["best", "tie", "unknown", "worse"]
Verdict = Literal["better", "worse", "tie", "one seed only", "diverged", "no common seed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: not finite where one of the figures is not.
        half_width: of the t-interval of the mean; None with one seed, or where a figure is not
            finite.
        num_seeds: that it is a mean of.
    """

    mean: float
    half_width: float | None
    num_seeds: int


def estimate(figures: Collection[float]) -> Estimate:
    """Mean ``m`` with ``m ± t_(n-1, 0.975) s / sqrt(n)``, for at least one figure."""
    values = np.array(list(figures))
    count = len(values)
    if not np.isfinite(values).all():
        return Estimate(mean=math.nan, half_width=None, num_seeds=count)
    half_width = None
    if count > 1:
        quantile = float(t.ppf((1 + CONFIDENCE) / 2, count - 1))
        half_width = quantile * float(values.std(ddof=1)) / math.sqrt(count)
    return Estimate(mean=float(values.mean()), half_width=half_width, num_seeds=count)


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> Estimate | None:
    """Mean of ``first - second`` over the seeds that both have; None where there are none."""
    common = sorted(first.keys() & second.keys())
    return estimate([first[seed] - second[seed] for seed in common]) if common else None


def judge(difference: Estimate | None, *, lower_is_better: bool) -> Verdict:
    """Say in a word what a paired difference shows of its first term."""
    if difference is None:
        return "no common seed"
    if not math.isfinite(difference.mean):
        return "diverged"
    if difference.half_width is None:
        return "one seed only"
    if abs(difference.mean) <= difference.half_width:
        return "tie"
    return "better" if (difference.mean < 0) == lower_is_better else "worse"


def find_best(
    figures_of: Mapping[Name, Mapping[int, float]], *, lower_is_better: bool
) -> Name | None:
    """The name with the best mean, the first of equals; None where no mean is finite."""
    means = {name: estimate(own.values()).mean for name, own in figures_of.items() if own}
    finite = [name for name, mean in means.items() if math.isfinite(mean)]
    sign = 1 if lower_is_better else -1
    return min(finite, key=lambda name: sign * means[name], default=None)


def mark_ties(
    figures_of: Mapping[Name, Mapping[int, float]], *, lower_is_better: bool
) -> dict[Name, Mark]:
    """Compare each with the best mean, paired by seed.

    Args:
        figures_of: name -> seed -> figure.
        lower_is_better: of the figures.

    Returns:
        Name -> mark, for the names that have figures. Where seeds are missing, one can be better
        than the best mean on their common seeds; that is called a tie too.
    """
    best = find_best(figures_of, lower_is_better=lower_is_better)
    marks: dict[Name, Mark] = {}
    for name, own in figures_of.items():
        if not own:
            continue
        if name == best:
            marks[name] = "best"
        elif best is None or not math.isfinite(estimate(own.values()).mean):
            marks[name] = "worse"
        else:
            difference = paired_difference(own, figures_of[best])
            verdict = judge(difference, lower_is_better=lower_is_better)
            if verdict == "worse":
                marks[name] = "worse"
            else:
                marks[name] = "tie" if verdict in ("tie", "better") else "unknown"
    return marks
