from __future__ import annotations

import math
import statistics

import pytest
from scipy.stats import ttest_rel

from quality.intervals import estimate, find_best, judge, mark_ties, paired_difference

# Quantiles 0.975 of Student's t, from a printed table: degrees of freedom -> value.
QUANTILES = {1: 12.706, 2: 4.303, 4: 2.776}


@pytest.mark.parametrize("count", [2, 3, 5])
def test_interval_is_that_of_the_printed_table(count: int) -> None:
    values = [1.7, 1.75, 1.72, 1.9, 1.66][:count]
    own = estimate(values)
    expected = QUANTILES[count - 1] * statistics.stdev(values) / math.sqrt(count)
    assert own.mean == pytest.approx(statistics.fmean(values))
    assert own.half_width == pytest.approx(expected, rel=1e-3)
    assert own.num_seeds == count


def test_one_seed_has_no_interval() -> None:
    own = estimate([1.7])
    assert (own.mean, own.half_width, own.num_seeds) == (1.7, None, 1)


def test_a_diverged_run_leaves_no_mean() -> None:
    own = estimate([1.7, math.inf, 1.8])
    assert math.isnan(own.mean)
    assert own.half_width is None
    assert own.num_seeds == 3


def test_pairs_are_of_common_seeds_and_their_interval_is_that_of_the_paired_test() -> None:
    first = {0: 1.0, 1: 1.5, 2: 1.2, 7: 9.0}
    second = {2: 1.1, 1: 1.3, 0: 1.05, 9: 0.0}
    difference = paired_difference(first, second)
    low, high = ttest_rel([1.0, 1.5, 1.2], [1.05, 1.3, 1.1]).confidence_interval(0.95)
    assert difference is not None
    assert difference.half_width is not None
    assert difference.num_seeds == 3
    assert difference.mean - difference.half_width == pytest.approx(low)
    assert difference.mean + difference.half_width == pytest.approx(high)


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ([1.0, 2.0, 3.0], [1.5, 2.51, 3.52], "better"),  # noisy seeds, steady difference
        ([1.5, 2.51, 3.52], [1.0, 2.0, 3.0], "worse"),
        ([1.0, 2.0, 3.0], [1.5, 1.9, 3.1], "tie"),
        ([1.0, 2.0], [1.0, 2.0], "tie"),
        ([1.0], [2.0], "one seed only"),
        ([math.nan, 1.0], [2.0, 2.0], "diverged"),
    ],
)
def test_verdicts_turn_around_with_the_metric(
    first: list[float], second: list[float], verdict: str
) -> None:
    difference = paired_difference(dict(enumerate(first)), dict(enumerate(second)))
    turned = {"better": "worse", "worse": "better"}.get(verdict, verdict)
    assert judge(difference, lower_is_better=True) == verdict
    assert judge(difference, lower_is_better=False) == turned


def test_no_common_seed_is_said() -> None:
    assert judge(paired_difference({0: 1.0}, {1: 1.0}), lower_is_better=True) == "no common seed"


def test_marks_of_a_column() -> None:
    column = {
        "worse": {0: 2.0, 1: 2.11, 2: 2.22},
        "best": {0: 1.0, 1: 1.1, 2: 1.2},
        "tie": {0: 1.1, 1: 1.05, 2: 1.3},
        "unknown": {0: 1.5, 5: 1.6},
        "diverged": {0: math.nan, 1: 0.5, 2: 0.5},
        "missing": dict[int, float](),
    }
    assert mark_ties(column, lower_is_better=True) == {
        "worse": "worse",
        "best": "best",
        "tie": "tie",
        "unknown": "unknown",
        "diverged": "worse",
    }


def test_whoever_beats_the_best_mean_on_common_seeds_is_not_called_worse() -> None:
    # The first has the better mean only because of seed 2, which the second lacks.
    column = {"lucky": {0: 2.0, 1: 2.1, 2: 0.1}, "steady": {0: 1.9, 1: 2.0}}
    assert mark_ties(column, lower_is_better=True) == {"lucky": "best", "steady": "tie"}


def test_best_is_the_lowest_loss_and_the_highest_accuracy() -> None:
    column = {"a": {0: 3.0}, "b": {0: 1.0}, "c": {0: 2.0}, "none": dict[int, float]()}
    assert find_best(column, lower_is_better=True) == "b"
    assert find_best(column, lower_is_better=False) == "a"
    assert find_best({"none": {}}, lower_is_better=True) is None
