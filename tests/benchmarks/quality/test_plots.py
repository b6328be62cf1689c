from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from finished_runs import make_cell, make_row
from quality.grid import Grid, make_grids
from quality.records import Row

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from quality.plots import TICKS, _draw_axes, draw, share


@pytest.fixture
def rows() -> list[Row]:
    rows = make_cell("plain", 1.0, [1.4, 1.6])
    for place, method in enumerate(("ours", "hashing", "narrower")):
        for budget in (0.1, 0.5, 2.0):
            rows += make_cell(method, budget, [2 + place - budget / 4, 2.1 + place - budget / 4])
    return rows


@pytest.fixture
def grid(rows: list[Row]) -> Grid:
    (grid,) = make_grids(rows, "ours")
    return grid


def error_bars(grid: Grid) -> tuple[Axes, list[ErrorbarContainer]]:
    """The drawn axes, and in them the lines of the methods."""
    axes = Figure().add_subplot()
    _draw_axes(axes, grid)
    return axes, [each for each in axes.containers if isinstance(each, ErrorbarContainer)]


def comments(path: Path) -> list[str]:
    """The texts of a picture, which stand as comments beside their outlines."""
    return re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"))


def test_picture_names_methods_ticks_and_axes(grid: Grid, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "picture.svg"
    draw(grid, path)
    texts = comments(path)
    assert {"ours", "hashing", "narrower", "plain", "char-mixer, small"} <= set(texts)
    assert [text for text in texts if text.endswith(" %")] == [
        "10 %",
        "25 %",
        "50 %",
        "100 %",
        "200 %",
    ]
    assert "test cross entropy (nats), lower is better" in texts


def test_equal_grids_give_equal_bytes_without_a_date(
    grid: Grid, rows: list[Row], tmp_path: Path
) -> None:
    draw(grid, tmp_path / "one.svg")
    draw(make_grids(rows[::-1], "ours")[0], tmp_path / "two.svg")
    content = (tmp_path / "one.svg").read_bytes()
    assert content == (tmp_path / "two.svg").read_bytes()
    assert b"dc:date" not in content


def test_picture_is_700_pixels_wide(grid: Grid, tmp_path: Path) -> None:
    draw(grid, tmp_path / "one.svg")
    width = ElementTree.parse(tmp_path / "one.svg").getroot().attrib["width"]
    assert float(width.removesuffix("pt")) * 96 / 72 == pytest.approx(700)


def test_lines_show_means_at_true_sizes_and_ours_stands_out(grid: Grid) -> None:
    axes, containers = error_bars(grid)
    by_label = {str(each.get_label()): each.lines[0] for each in containers}
    assert list(by_label) == ["ours", "hashing", "narrower"]
    ours, hashing = by_label["ours"], by_label["hashing"]
    assert np.asarray(ours.get_xdata()) == pytest.approx([0.1, 0.5, 2.0])
    assert np.asarray(hashing.get_ydata()) == pytest.approx([3.025, 2.925, 2.55])
    assert ours.get_linewidth() > hashing.get_linewidth()
    assert len({line.get_marker() for line in by_label.values()}) == 3
    assert len({line.get_color() for line in by_label.values()}) == 3
    (plain,) = [line for line in axes.lines if line.get_label() == "plain"]
    assert np.asarray(plain.get_ydata()) == pytest.approx([1.5, 1.5])
    assert axes.get_xscale() == "log"
    assert tuple(axes.get_xticks()) == TICKS


def test_error_bars_are_the_intervals_and_one_seed_has_none() -> None:
    rows = [*make_cell("ours", 0.1, [1.0, 2.0]), make_row("ours", 0.5, 0, 1.0)]
    _, (container,) = error_bars(make_grids(rows, "ours")[0])
    (bars,) = container.lines[2]
    heights = [segment[:, 1] for segment in bars.get_segments() if len(segment)]
    assert [list(each) for each in heights] == [pytest.approx([1.5 - 6.353, 1.5 + 6.353], abs=1e-3)]


def test_share_is_of_what_networks_have_and_the_budget_without_a_plain_one() -> None:
    rows = make_cell("ours", 0.25, [1.0], parameters=240)
    (grid,) = make_grids(rows, "ours")
    assert share(grid, "ours", 0.25) == 0.25
    (grid,) = make_grids(rows + make_cell("plain", 1.0, [1.0], parameters=1000), "ours")
    assert share(grid, "ours", 0.25) == 0.24


def test_every_method_of_many_looks_different() -> None:
    rows = [row for k in range(14) for row in make_cell(f"method {k}", 0.1, [1.0, 1.1])]
    _, containers = error_bars(make_grids(rows, "ours")[0])
    lines = [each.lines[0] for each in containers]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 14
