from __future__ import annotations

import math
import random
import statistics

import pytest

from finished_runs import make_cell, make_row
from quality.grid import EITHER_SMALLER, Grid, make_grids
from quality.records import Row
from quality.tables import (
    RULE,
    count_runs,
    describe_machines,
    describe_plain,
    write_caption,
    write_comparisons,
    write_configurations,
    write_costs,
    write_quality,
    write_results,
    write_study,
    write_table,
)

MISSING = "\N{EN DASH}"


def only_grid(rows: list[Row]) -> Grid:
    (grid,) = make_grids(rows, "ours")
    return grid


def read_table(text: str) -> dict[str, list[str]]:
    """First cell of each line -> its other cells."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {first: others for first, *others in lines}


def test_cells_are_means_with_intervals_best_first_among_ties() -> None:
    figures = {
        "ours": [1.50, 1.60, 1.55],
        "hashing": [1.52, 1.61, 1.54],  # cannot be told from ours
        "low rank": [1.70, 1.81, 1.74],
    }
    rows = [row for method, own in figures.items() for row in make_cell(method, 0.25, own)]
    table = read_table(write_quality(only_grid(rows)))

    def cell(method: str) -> str:
        own = figures[method]
        half_width = 4.3026527 * statistics.stdev(own) / math.sqrt(3)
        return f"{statistics.fmean(own):.3f} ± {half_width:.3f}"

    assert table["method"] == ["25 %"]
    assert table["ours"] == [f"**{cell('ours')}**"]
    assert table["hashing"] == [f"{cell('hashing')} ="]
    assert table["low rank"] == [cell("low rank")]


def test_accuracies_are_percent_and_the_highest_is_best() -> None:
    rows = make_cell("ours", 0.1, [0.8012, 0.8212], task="pictures")
    rows += make_cell("hashing", 0.1, [0.9012, 0.9211], task="pictures")
    grid = only_grid(rows)
    table = read_table(write_quality(grid))
    assert table["ours"] == ["81.1 ± 12.7"]  # two figures, 2 apart: t = 12.706, s / sqrt(2) = 1
    assert table["hashing"] == ["**91.1 ± 12.6**"]
    assert "test accuracy (%), higher is better" in write_caption(grid)


def test_losses_say_so() -> None:
    caption = write_caption(only_grid(make_cell("ours", 0.1, [1.0, 2.0])))
    assert "Mean test cross entropy (nats), lower is better, of 2 seeds" in caption
    assert "1,200 steps" in caption
    assert "validation" not in caption


def test_without_test_figures_the_validation_split_stands_in_and_is_named() -> None:
    rows = make_cell("ours", 0.1, [1.0, 1.0], has_test=False)
    rows += make_cell("hashing", 0.1, [3.0, 3.0], valid=2.0)
    grid = only_grid(rows)
    assert read_table(write_quality(grid))["hashing"] == ["2.000 ± 0.000"]
    assert "Mean validation cross entropy" in write_caption(grid)
    assert "validation split, not of the test set: 2 of 4 runs" in write_caption(grid)


def test_one_seed_has_no_interval_and_nothing_can_be_told() -> None:
    rows = [make_row("ours", 0.1, 0, 1.5), make_row("hashing", 0.1, 0, 1.9)]
    table = read_table(write_quality(only_grid(rows)))
    assert table["ours"] == ["**1.500 (1 seed)**"]
    assert table["hashing"] == ["1.900 (1 seed) ?"]


def test_fewer_seeds_than_elsewhere_are_counted_in_the_cell() -> None:
    rows = make_cell("ours", 0.1, [1.0, 1.1, 1.2]) + make_cell("hashing", 0.1, [2.0, 2.2])
    table = read_table(write_quality(only_grid(rows)))
    assert "seed" not in table["ours"][0]
    assert "(2 seeds)" in table["hashing"][0]


def test_missing_cells_are_dashes_and_a_sentence_counts_what_is_there() -> None:
    rows = make_cell("ours", 0.1, [1.0, 1.1, 1.2]) + make_cell("ours", 0.5, [1.0])
    rows += [*make_cell("hashing", 0.5, [1.3, 1.4]), make_row("plain", 1.0, 9, 0.9)]
    grid = only_grid(rows)
    table = read_table(write_quality(grid))
    assert table["method"] == ["10 %", "50 %"]
    assert table["hashing"][0] == MISSING
    sentences = count_runs(grid)
    assert sentences.startswith("6 of 16 expected runs are there (2 methods, each with 2 budgets ")
    assert "and 1 of 4 of the plain network." in sentences
    assert "Of the 10 that are not, 4 belong to cells without any run" in sentences


def test_a_diverged_run_is_neither_best_nor_a_tie() -> None:
    rows = make_cell("ours", 0.1, [1.0, 1.2]) + make_cell("hashing", 0.1, [0.1, math.nan])
    table = read_table(write_quality(only_grid(rows)))
    assert table["hashing"] == ["diverged"]
    assert table["ours"][0].startswith("**1.100")


def test_plain_network_is_one_line_and_no_row() -> None:
    grid = only_grid(make_cell("ours", 0.1, [2.0]) + make_cell("plain", 1.0, [1.5, 1.7]))
    assert describe_plain(grid) == (
        "Plain network: test cross entropy (nats) 1.600 ± 1.271 (2 seeds), 1,000 parameters."
    )
    assert "plain" not in read_table(write_quality(grid))
    assert describe_plain(only_grid(make_cell("ours", 0.1, [2.0]))).endswith("no run yet.")


def test_derived_row_chooses_by_validation_though_the_test_set_says_otherwise() -> None:
    rows = [make_row("narrower", 0.1, seed, 1.0, valid=2.0) for seed in range(2)]
    rows += [make_row("shallower", 0.1, seed, 1.5, valid=1.9) for seed in range(2)]
    rows += [make_row("narrower", 0.5, seed, 1.3, valid=1.2) for seed in range(2)]
    table = read_table(write_quality(only_grid(rows)))
    assert table["narrower"][0] == "**1.000 ± 0.000**"
    assert table[EITHER_SMALLER] == ["1.500 ± 0.000 (shallower)", "**1.300 ± 0.000** (narrower)"]


def test_derived_row_chooses_the_higher_accuracy() -> None:
    rows = make_cell("narrower", 0.1, [0.5, 0.5], task="pictures")
    rows += make_cell("shallower", 0.1, [0.6, 0.6], task="pictures")
    table = read_table(write_quality(only_grid(rows)))
    assert table[EITHER_SMALLER] == ["**60.0 ± 0.0** (shallower)"]


def test_derived_row_needs_both() -> None:
    page = write_results(make_cell("narrower", 0.1, [1.0]), command="c", ours="ours", plots={})
    assert "| narrower |" in page
    assert EITHER_SMALLER not in page


def test_ours_is_compared_with_everybody_by_budget() -> None:
    rows = make_cell("ours", 0.1, [1.0, 1.1, 1.2])
    rows += make_cell("hashing", 0.1, [1.3, 1.41, 1.5])  # differences -0.30, -0.31, -0.30
    rows += make_cell("low rank", 0.1, [0.9, 1.2, 1.2])
    rows += [make_row("mixing", 0.1, 2, 1.3), make_row("other seed", 0.1, 8, 1.3)]
    rows += make_cell("narrower", 0.1, [1.2, 1.3]) + make_cell("shallower", 0.1, [1.4, 1.5])
    rows += make_cell("plain", 1.0, [0.5, 0.6, 0.71]) + make_cell("hashing", 0.5, [1.0])
    lines = write_comparisons(only_grid(rows)).splitlines()
    assert "below 0, ours is better" in lines[0]
    assert lines[-2] == (
        "- 10 %: **better** than hashing (-0.303 ± 0.014), narrower (-0.200 ± 0.000, 2 seeds), "
        "shallower (-0.400 ± 0.000, 2 seeds), "
        f'"{EITHER_SMALLER}" (-0.200 ± 0.000, 2 seeds); '
        "**tie** with low rank (+0.000 ± 0.248); "
        "**worse** than plain at 100 % (+0.497 ± 0.014); "
        "**one seed only**: mixing (-0.100); no common seed with other seed."
    )
    assert lines[-1] == "- 50 %: nothing to compare yet."


def test_comparison_says_that_ours_has_no_run() -> None:
    assert write_comparisons(only_grid(make_cell("hashing", 0.1, [1.0]))) == "No run of ours yet."


def test_costs_are_means_over_seeds() -> None:
    rows = make_cell("plain", 1.0, [1.0], parameters=1_000_000)
    for seed, (parameters, flops, step_time) in enumerate(
        [(249_000, 1_000_000, 1.1), (250_000, 2_000_000, 1.3)]
    ):
        rows.append(
            make_row(
                "ours",
                0.25,
                seed,
                1.0,
                parameters=parameters,
                generation_flops=flops,
                step_time=step_time,
            )
        )
    rows.append(make_row("hashing", 0.5, 0, 1.0, parameters=500_000, step_time=math.nan))
    lines = write_costs(only_grid(rows)).splitlines()
    assert lines[2:] == [
        "| plain | 100 % | 1,000,000 | 100.0 % | 0.000 | 1.00 | 1 |",
        "| ours | 25 % | 249,500 | 24.9 % | 1.500 | 1.20 | 2 |",
        f"| hashing | 50 % | 500,000 | 50.0 % | 0.000 | {MISSING} | 1 |",
    ]


def test_two_rows_for_one_seed_are_refused() -> None:
    rows = [make_row("ours", 0.1, 0, 1.0), make_row("ours", 0.1, 0, 2.0)]
    with pytest.raises(ValueError, match=r"'ours' at budget 0\.1 .* two rows for seed 0"):
        make_grids(rows, "ours")


def test_seeds_that_were_trained_differently_are_refused() -> None:
    rows = [make_row("ours", 0.1, 0, 1.0), make_row("ours", 0.1, 1, 1.0, lr=0.2)]
    with pytest.raises(ValueError, match=r"mixes lr=0\.1 \(seed 0\) and 0\.2 \(seed 1\)"):
        make_grids(rows, "ours")


def test_page_does_not_depend_on_the_order_of_the_rows() -> None:
    rows = [
        row
        for task in ("char-mixer", "pictures")
        for setting in ("small", "large")
        for method, budget in (("plain", 1.0), ("ours", 0.1), ("hashing", 0.1), ("ours", 0.5))
        for row in make_cell(method, budget, [0.1, 0.4, 0.3], task=task, setting=setting)
    ]
    shuffled = random.Random(0).sample(rows, len(rows))
    plots = {("pictures", "small"): "quality/pictures-small.svg"}
    page = write_results(rows, command="python report.py", ours="ours", plots=plots)
    assert page == write_results(shuffled, command="python report.py", ours="ours", plots=plots)
    headings = [line for line in page.splitlines() if line.startswith("## ")]
    assert headings == [
        "## char-mixer, large",
        "## char-mixer, small",
        "## pictures, large",
        "## pictures, small",
    ]
    assert page.splitlines()[2] == "`python report.py`"
    assert page.count("](quality/pictures-small.svg)") == 1
    assert page.count(RULE) == 4


def test_machines_are_named_with_their_runs() -> None:
    rows = make_cell("ours", 0.1, [1.0, 1.0], machine="B, torch 2.13.0")
    rows += make_cell("ours", 0.5, [1.0], machine="A, torch 2.12.0")
    assert describe_machines(rows) == "- A, torch 2.12.0: 1 run\n- B, torch 2.13.0: 2 runs"


def test_study_lists_configurations_best_first_with_ties() -> None:
    rows = make_cell("ours", 0.25, [1.8, 1.91, 2.0], lr=0.3)
    rows += make_cell("ours", 0.25, [1.1, 1.0, 1.3])
    rows += make_cell("ours", 0.25, [1.0, 1.1, 1.2], options='{"rate": 5}')
    rows += make_cell("ours", 0.25, [1.5], weight_decay=0.01)
    rows += make_cell("ours", 0.25, [math.nan], lr=9.0)
    lines = write_configurations(rows).splitlines()
    assert lines[2:] == [
        '| ours | `{"rate": 5}` | 0.1 | 0 | 1,200 | **1.100 ± 0.248** | 3 |',
        "| ours |  | 0.1 | 0 | 1,200 | 1.133 ± 0.379 = | 3 |",
        "| ours |  | 0.1 | 0.01 | 1,200 | 1.500 (1 seed) ? | 1 |",
        "| ours |  | 0.3 | 0 | 1,200 | 1.903 ± 0.249 | 3 |",
        "| ours |  | 9 | 0 | 1,200 | diverged (1 seed) | 1 |",
        "",
        "Of 5 configurations, 1 cannot be told from the best mean, 1 cannot be compared with it "
        "for want of seeds, 2 are worse.",
    ]


def test_study_uses_validation_and_groups_by_budget() -> None:
    rows = make_cell("ours", 0.25, [9.0, 9.0], valid=1.5, study="coefficients")
    rows += make_cell("ours", 0.5, [9.0, 9.0], valid=1.25, study="coefficients")
    page = write_study(rows, study="coefficients", command="python report.py")
    assert page.startswith("# Study: coefficients\n\n`python report.py`\n\n- a machine, torch")
    assert page.index("## char-mixer, small, 25 %") < page.index("1.500 ± 0.000")
    assert page.index("1.500") < page.index("## char-mixer, small, 50 %") < page.index("1.250")
    assert "9.000" not in page


def test_study_refuses_two_rows_for_one_seed() -> None:
    rows = make_cell("ours", 0.25, [1.0]) * 2
    with pytest.raises(ValueError, match="two rows for seed 0"):
        write_configurations(rows)


def test_bars_in_cells_are_escaped() -> None:
    assert write_table(["a"], [["x|y"]]).splitlines()[-1] == "| x\\|y |"
