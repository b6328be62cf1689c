"""The runs of one task and setting as a grid of methods and budgets, and what to compare in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from quality.intervals import find_best
from quality.records import Row

PLAIN = "plain"
SMALLER = ("narrower", "shallower")  # plain networks with less of something; two methods
EITHER_SMALLER = "plain, narrower or shallower"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """What a table shows of a run.

    Attributes:
        split: ``"test"`` or ``"valid"``.
        measure: ``"loss"`` or ``"accuracy"``.
    """

    split: Literal["test", "valid"]
    measure: Literal["loss", "accuracy"]

    @property
    def lower_is_better(self) -> bool:
        """Of losses."""
        return self.measure == "loss"

    @property
    def digits(self) -> int:
        """Decimals that are shown."""
        return 3 if self.measure == "loss" else 1

    @property
    def title(self) -> str:
        """With the unit."""
        measured = "cross entropy" if self.measure == "loss" else "accuracy"
        split = "test" if self.split == "test" else "validation"
        return f"{split} {measured} ({self.unit})"

    @property
    def unit(self) -> str:
        """Of figures."""
        return "nats" if self.measure == "loss" else "%"

    def figure_of(self, row: Row) -> float:
        """Nats, or percent."""
        figure = getattr(row.result, f"{self.split}_{self.measure}")
        return float(figure) * (1 if self.measure == "loss" else 100)


def choose_metric(rows: Iterable[Row]) -> Metric:
    """The test set's where all rows of a task have read it, or else the validation split's."""
    rows = list(rows)
    measure: Literal["loss", "accuracy"]
    measure = "loss" if rows[0].run.task.startswith("char") else "accuracy"
    split: Literal["test", "valid"]
    split = "test" if all(has_test(row, measure) for row in rows) else "valid"
    return Metric(split=split, measure=measure)


def has_test(row: Row, measure: str) -> bool:
    """Whether a run has read the test set."""
    return getattr(row.result, f"test_{measure}") is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The runs of one task and setting.

    Attributes:
        task: of all its runs.
        setting: likewise.
        metric: to compare by.
        ours: the method that the others are compared with.
        methods: all but the plain network; ours first, ``SMALLER`` last.
        budgets: ascending, those of ``methods``.
        cells: method and budget -> seed -> row; no key where there is no row.
        plain: seed -> row.
    """

    task: str
    setting: str
    metric: Metric
    ours: str
    methods: tuple[str, ...]
    budgets: tuple[float, ...]
    cells: Mapping[tuple[str, float], Mapping[int, Row]]
    plain: Mapping[int, Row]

    @property
    def rows(self) -> tuple[Row, ...]:
        """All of them, those of the plain network first."""
        return tuple(row for cell in (self.plain, *self.cells.values()) for row in cell.values())

    @property
    def seeds(self) -> frozenset[int]:
        """Those of any run."""
        return frozenset(row.run.seed for row in self.rows)

    def column(self, budget: float) -> dict[str, dict[int, float]]:
        """Method -> seed -> figure, empty where a method has no run of this budget."""
        return {
            method: figures(self.metric, self.cells.get((method, budget), {}))
            for method in self.methods
        }

    def smaller(self, budget: float) -> str | None:
        """Which of ``SMALLER`` is better on the validation split; None where neither has run."""
        metric = Metric(split="valid", measure=self.metric.measure)
        cells = {name: self.cells.get((name, budget), {}) for name in SMALLER}
        return find_best(
            {name: figures(metric, cell) for name, cell in cells.items()},
            lower_is_better=metric.lower_is_better,
        )


def figures(metric: Metric, cell: Mapping[int, Row]) -> dict[int, float]:
    """Seed -> figure."""
    return {seed: metric.figure_of(row) for seed, row in cell.items()}


def make_grids(rows: Iterable[Row], ours: str) -> list[Grid]:
    """Sort runs into one grid for each task and setting.

    Raises:
        ValueError: a seed has two rows in a cell, or a cell's runs differ in more than the seed.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.run.task, row.run.setting), []).append(row)
    return [_make_grid(groups[key], ours) for key in sorted(groups)]


def _make_grid(rows: list[Row], ours: str) -> Grid:
    def place(method: str) -> tuple[bool, bool, str]:
        return method != ours, method in SMALLER, method

    shared = [row for row in rows if row.run.method != PLAIN]
    found: dict[tuple[str, float], list[Row]] = {}
    for row in shared:
        found.setdefault((row.run.method, row.run.budget), []).append(row)
    return Grid(
        task=rows[0].run.task,
        setting=rows[0].run.setting,
        metric=choose_metric(rows),
        ours=ours,
        methods=tuple(sorted({row.run.method for row in shared}, key=place)),
        budgets=tuple(sorted({row.run.budget for row in shared})),
        cells={key: by_seed(found[key]) for key in sorted(found)},
        plain=by_seed([row for row in rows if row.run.method == PLAIN]),
    )


def by_seed(rows: Iterable[Row]) -> dict[int, Row]:
    """Seed -> row, for runs that differ in nothing else; ascending.

    Raises:
        ValueError: two rows have the same seed, or differ in another respect.
    """
    sorted_rows = sorted(rows, key=lambda row: row.run.seed)
    cell: dict[int, Row] = {}
    for row in sorted_rows:
        run, first = row.run, sorted_rows[0].run
        where = f"{run.method!r} at budget {run.budget:g} ({run.task}, {run.setting})"
        if run.seed in cell:
            raise ValueError(
                f"{where} has two rows for seed {run.seed}: {cell[run.seed].run} and {run}. "
                "Keep one of them, or give one another study."
            )
        for name in ("budget", "steps", "lr", "weight_decay", "options"):
            if getattr(run, name) != getattr(first, name):
                raise ValueError(
                    f"{where} mixes {name}={getattr(first, name)!r} (seed {first.seed}) and "
                    f"{getattr(run, name)!r} (seed {run.seed}). A mean is over seeds only: give "
                    "one of them another study."
                )
        cell[run.seed] = row
    return cell
