"""From finished runs to pictures: quality against parameters, one line for each method."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from quality.grid import PLAIN, Grid, figures
from quality.intervals import estimate
from quality.tables import mean, percent

TICKS = (0.1, 0.25, 0.5, 1.0, 2.0)
# Okabe and Ito, Color Universal Design, 2008, without the yellow, which white swallows, and black,
# which is the plain network's.
OURS_COLOR = "#D55E00"
COLORS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#666666")
MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "p")
DASHES = ("-", "--", "-.", ":")
INCHES = (525 / 72, 4.6)  # 525 pt are 700 px


def draw(grid: Grid, path: Path) -> None:
    """Write one picture as SVG; equal grids give equal bytes.

    Horizontally stands what the networks really have, not the budget. Error bars are 95 %
    t-intervals; a point of one seed has none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A figure that pyplot does not know: no display and no state that outlives it. The salt keeps
    # the names inside the file from differing between two calls.
    with matplotlib.rc_context({"font.size": 10, "svg.hashsalt": "npas_fx"}):
        figure = Figure(figsize=INCHES, layout="constrained")
        axes = figure.add_subplot()
        _draw_axes(axes, grid)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _draw_axes(axes: Axes, grid: Grid) -> None:
    if grid.ours in grid.methods:
        _draw_method(axes, grid, grid.ours, color=OURS_COLOR, marker="o", is_ours=True)
    others = [method for method in grid.methods if method != grid.ours]
    for place, method in enumerate(others):
        _draw_method(
            axes,
            grid,
            method,
            color=COLORS[place % len(COLORS)],
            marker=MARKERS[place % len(MARKERS)],
            linestyle=DASHES[place // len(COLORS) % len(DASHES)],
        )
    if grid.plain:
        height = estimate(figures(grid.metric, grid.plain).values()).mean
        axes.axhline(height, color="black", linestyle="--", linewidth=1, label=PLAIN, zorder=1)
    axes.set_title(f"{grid.task}, {grid.setting}")
    axes.set_xlabel("parameters, share of the plain network's")
    order = "lower" if grid.metric.lower_is_better else "higher"
    axes.set_ylabel(f"{grid.metric.title}, {order} is better")
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.09), max(high, 1.1))
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: percent(share)))
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_method(
    axes: Axes,
    grid: Grid,
    method: str,
    *,
    color: str,
    marker: str,
    linestyle: str = "-",
    is_ours: bool = False,
) -> None:
    budgets = [budget for budget in grid.budgets if (method, budget) in grid.cells]
    cells = [grid.cells[method, budget] for budget in budgets]
    estimates = [estimate(figures(grid.metric, cell).values()) for cell in cells]
    _, caps, bars = axes.errorbar(
        [share(grid, method, budget) for budget in budgets],
        [each.mean for each in estimates],
        yerr=[math.nan if each.half_width is None else each.half_width for each in estimates],
        label=method,
        color=color,
        marker=marker,
        linestyle=linestyle,
        linewidth=2.5 if is_ours else 1.2,
        markersize=8 if is_ours else 5.5,
        elinewidth=1.5 if is_ours else 1,
        capsize=3,
        zorder=4 if is_ours else 3,
    )
    if not is_ours:
        for part in (*caps, *bars):  # pale, or else the bars of ten methods hide the lines
            part.set_alpha(0.45)


def share(grid: Grid, method: str, budget: float) -> float:
    """Parameters of a cell's networks against the plain one's; the budget where none has run."""
    if not grid.plain:
        return budget
    own = mean(row.result.parameters for row in grid.cells[method, budget].values())
    return own / mean(row.result.parameters for row in grid.plain.values())
