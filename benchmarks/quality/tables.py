"""From finished runs to Markdown: quality against parameters, and any other study as a list."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from quality.grid import (
    EITHER_SMALLER,
    PLAIN,
    SMALLER,
    Grid,
    Metric,
    by_seed,
    figures,
    has_test,
    make_grids,
)
from quality.intervals import Estimate, Mark, Verdict, estimate, judge, mark_ties, paired_difference
from quality.records import Row, Run

MISSING = "\N{EN DASH}"
SUFFIX: Mapping[Mark, str] = {"best": "", "tie": " =", "unknown": " ?", "worse": ""}
RULE = (
    "Bold: the best mean. `=`: a tie with it, the 95 % t-interval of the differences paired by "
    "seed includes 0 (or, where seeds are missing, favours the other). `?`: fewer than 2 common "
    "seeds, nothing can be told. No mark: worse. Intervals are not corrected for the number of "
    "comparisons."
)
PHRASES: Mapping[Verdict, str] = {
    "better": "**better** than",
    "tie": "**tie** with",
    "worse": "**worse** than",
    "one seed only": "**one seed only**:",
    "diverged": "diverged, or the other did:",
    "no common seed": "no common seed with",
}
Configuration: TypeAlias = tuple[str, str, float, float, int]


def write_results(
    rows: Sequence[Row], *, command: str, ours: str, plots: Mapping[tuple[str, str], str]
) -> str:
    """The page of quality against parameters.

    Args:
        rows: of one study.
        command: that makes the page.
        ours: the method that is compared with each other one.
        plots: task and setting -> address of the picture, as the page may link it.
    """
    parts = ["# Quality against parameters", f"`{command}`", describe_machines(rows)]
    for grid in make_grids(rows, ours):
        parts.append(f"## {grid.task}, {grid.setting}")
        if (grid.task, grid.setting) in plots:
            address = plots[grid.task, grid.setting]
            parts.append(f"![{grid.metric.title}, against parameters]({address})")
        parts += [describe_plain(grid), write_caption(grid), write_quality(grid), RULE]
        if has_both_smaller(grid):
            parts.append(
                f'"{EITHER_SMALLER}" takes at each budget the one with the better mean on the '
                "validation split, whatever the other figures say."
            )
        parts += [count_runs(grid), f"### {ours} against each other method"]
        parts += [write_comparisons(grid), "### Costs", write_costs(grid)]
    return "\n\n".join(parts) + "\n"


def write_study(rows: Sequence[Row], *, study: str, command: str) -> str:
    """The page of a study that is no comparison of methods: all configurations, best first."""
    parts = [
        f"# Study: {study}",
        f"`{command}`",
        describe_machines(rows),
        "Mean validation cross entropy in nats, lower is better, ± half width of its 95 % "
        f"t-interval over seeds. {RULE}",
    ]
    groups: dict[tuple[str, str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.run.task, row.run.setting, row.run.budget), []).append(row)
    for task, setting, budget in sorted(groups):
        parts.append(f"## {task}, {setting}, {percent(budget)}")
        parts.append(write_configurations(groups[task, setting, budget]))
    return "\n\n".join(parts) + "\n"


def describe_machines(rows: Iterable[Row]) -> str:
    """What the runs ran on, with the versions of torch."""
    counts = Counter(row.result.machine for row in rows)
    return "\n".join(f"- {name}: {count(counts[name], 'run')}" for name in sorted(counts))


def describe_plain(grid: Grid) -> str:
    """One line on the network that all budgets are shares of."""
    if not grid.plain:
        return "Plain network: no run yet."
    own = estimate(figures(grid.metric, grid.plain).values())
    parameters = mean(row.result.parameters for row in grid.plain.values())
    figure = write_estimate(grid.metric, own, with_seeds=True)
    return f"Plain network: {grid.metric.title} {figure}, {parameters:,.0f} parameters."


def write_caption(grid: Grid) -> str:
    """What the cells of the quality table hold."""
    order = "lower" if grid.metric.lower_is_better else "higher"
    steps = " or ".join(f"{each:,}" for each in sorted({row.run.steps for row in grid.rows}))
    caption = (
        f"Mean {grid.metric.title}, {order} is better, of {count(most_seeds(grid), 'seed')} or the "
        "number in brackets, ± half width of its 95 % t-interval where there are two or more; "
        "columns: trainable parameters as a share of the plain network's; "
        f"{steps} steps."
    )
    if grid.metric.split == "valid":
        without = sum(not has_test(row, grid.metric.measure) for row in grid.rows)
        caption += (
            f" These are figures of the validation split, not of the test set: {without} of "
            f"{count(len(grid.rows), 'run')} did not read the test set."
        )
    return caption


def write_quality(grid: Grid) -> str:
    """Methods by budgets."""
    most = most_seeds(grid)
    columns = {}
    for budget in grid.budgets:
        column = grid.column(budget)
        marks = mark_ties(column, lower_is_better=grid.metric.lower_is_better)
        texts = {}
        for method, mark in marks.items():
            own = estimate(column[method].values())
            text = write_estimate(grid.metric, own, with_seeds=own.num_seeds != most)
            texts[method] = f"**{text}**" if mark == "best" else text + SUFFIX[mark]
        smaller = grid.smaller(budget)
        if smaller is not None:
            texts[EITHER_SMALLER] = f"{texts[smaller]} ({smaller})"
        columns[budget] = texts
    methods = [*grid.methods, *([EITHER_SMALLER] if has_both_smaller(grid) else [])]
    return write_table(
        ["method", *(percent(budget) for budget in grid.budgets)],
        [
            [each, *(columns[budget].get(each, MISSING) for budget in grid.budgets)]
            for each in methods
        ],
    )


def has_both_smaller(grid: Grid) -> bool:
    """Whether there is something to choose between."""
    return set(SMALLER) <= set(grid.methods)


def most_seeds(grid: Grid) -> int:
    """The largest number of seeds in a cell, which captions name so that few cells have to."""
    return max((len(cell) for cell in grid.cells.values()), default=0)


def count_runs(grid: Grid) -> str:
    """How complete the table is."""
    methods, budgets, seeds = len(grid.methods), len(grid.budgets), len(grid.seeds)
    expected = methods * budgets * seeds
    there = sum(len(cell) for cell in grid.cells.values())
    in_empty_cells = (methods * budgets - len(grid.cells)) * seeds
    return (
        f"{there} of {count(expected, 'expected run')} are there ({count(methods, 'method')}, each "
        f"with {count(budgets, 'budget')} and {count(seeds, 'seed')}, as far as any run has them), "
        f"and {len(grid.plain)} of {seeds} of the plain network. Of the {expected - there} that "
        f"are not, {in_empty_cells} belong to cells without any run, some of which may not be "
        "planned."
    )


def write_comparisons(grid: Grid) -> str:
    """Ours against each other method, a line for each budget."""
    if grid.ours not in grid.methods:
        return f"No run of {grid.ours} yet."
    metric, most = grid.metric, most_seeds(grid)
    lines = [
        f"Mean of {grid.ours} minus the other, paired by seed, over {count(most, 'seed')} or the "
        "number told, ± half width of the 95 % t-interval "
        f"({'nats' if metric.measure == 'loss' else 'percentage points'}; "
        f"{'below' if metric.lower_is_better else 'above'} 0, {grid.ours} is better); tie: the "
        "interval includes 0.",
        "",
    ]
    for budget in grid.budgets:
        others = grid.column(budget)
        own = others.pop(grid.ours, {})
        smaller = grid.smaller(budget)
        if has_both_smaller(grid) and smaller is not None:
            others[f'"{EITHER_SMALLER}"'] = others[smaller]
        others[f"{PLAIN} at 100 %"] = figures(metric, grid.plain)
        told: dict[Verdict, list[str]] = {verdict: [] for verdict in PHRASES}
        for name, theirs in others.items():
            if own and theirs:
                difference = paired_difference(own, theirs)
                verdict = judge(difference, lower_is_better=metric.lower_is_better)
                told[verdict].append(name + _write_difference(metric, difference, most))
        sentence = "; ".join(
            f"{PHRASES[verdict]} {', '.join(names)}" for verdict, names in told.items() if names
        )
        lines.append(f"- {percent(budget)}: {sentence or 'nothing to compare yet'}.")
    return "\n".join(lines)


def _write_difference(metric: Metric, difference: Estimate | None, most: int) -> str:
    if difference is None or not math.isfinite(difference.mean):
        return ""
    text = f"{difference.mean:+.{metric.digits}f}"
    if difference.half_width is not None:
        text += f" ± {difference.half_width:.{metric.digits}f}"
        if difference.num_seeds != most:
            text += f", {count(difference.num_seeds, 'seed')}"
    return f" ({text})"


def write_costs(grid: Grid) -> str:
    """Parameters, FLOPs and step time of what has run, plain first; means over seeds."""
    cells = {(PLAIN, 1.0): grid.plain}
    for method in grid.methods:
        for budget in grid.budgets:
            cells[method, budget] = grid.cells.get((method, budget), {})
    plain_parameters = mean(row.result.parameters for row in grid.plain.values())
    lines = []
    for (method, budget), cell in cells.items():
        if not cell:
            continue
        results = [row.result for row in cell.values()]
        parameters = mean(each.parameters for each in results)
        flops = mean(each.generation_flops for each in results)
        step_time = mean(each.step_time for each in results)
        lines.append(
            [
                method,
                percent(budget),
                _or_missing(parameters, ",.0f"),
                _or_missing(100 * parameters / plain_parameters, ".1f", " %"),
                _or_missing(flops / 1e6, ",.3f"),
                _or_missing(step_time, ".2f"),
                str(len(cell)),
            ]
        )
    header = "method, budget, parameters, of plain, generation (MFLOP), step time / plain, seeds"
    return write_table(header.split(", "), lines)


def write_configurations(rows: Iterable[Row]) -> str:
    """Everything that was tried with one task, setting and budget, best first.

    Raises:
        ValueError: a configuration has two rows for one seed.
    """
    metric = Metric(split="valid", measure="loss")
    found: dict[Configuration, list[Row]] = {}
    for row in rows:
        found.setdefault(_configuration(row.run), []).append(row)
    figures_of = {each: figures(metric, by_seed(found[each])) for each in sorted(found)}
    estimates = {each: estimate(own.values()) for each, own in figures_of.items()}
    marks = mark_ties(figures_of, lower_is_better=True)

    def place(each: Configuration) -> tuple[bool, float]:
        own = estimates[each].mean
        return not math.isfinite(own), own if math.isfinite(own) else 0.0

    lines = []
    for each in sorted(figures_of, key=place):
        method, options, lr, weight_decay, steps = each
        text = write_estimate(metric, estimates[each], with_seeds=False)
        text = f"**{text}**" if marks[each] == "best" else text + SUFFIX[marks[each]]
        shown = "" if options == "{}" else f"`{options}`"
        seeds = str(estimates[each].num_seeds)
        lines.append([method, shown, f"{lr:g}", f"{weight_decay:g}", f"{steps:,}", text, seeds])
    header = ["method", "options", "lr", "weight decay", "steps", metric.title, "seeds"]
    return f"{write_table(header, lines)}\n\n{_count_ties(list(marks.values()))}"


def _configuration(run: Run) -> Configuration:
    return run.method, run.options, run.lr, run.weight_decay, run.steps


def _count_ties(marks: Sequence[Mark]) -> str:
    ties, unknown = marks.count("tie"), marks.count("unknown")
    return (
        f"Of {count(len(marks), 'configuration')}, {ties} cannot be told from the best mean, "
        f"{unknown} cannot be compared with it for want of seeds, {marks.count('worse')} "
        f"{'is' if marks.count('worse') == 1 else 'are'} worse."
    )


def write_estimate(metric: Metric, own: Estimate, *, with_seeds: bool) -> str:
    """Mean, interval, and the number of seeds where asked for or where there is but one."""
    if not math.isfinite(own.mean):
        text = "diverged"
    elif own.half_width is None:
        text = f"{own.mean:.{metric.digits}f}"
    else:
        text = f"{own.mean:.{metric.digits}f} ± {own.half_width:.{metric.digits}f}"
    if with_seeds or own.num_seeds == 1:
        text += f" ({count(own.num_seeds, 'seed')})"
    return text


def write_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    rows = [header, ["---"] * len(header), *lines]
    cells = [[text.replace("|", "\\|") for text in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def percent(share: float) -> str:
    """``0.25`` as ``25 %``."""
    return f"{100 * share:g} %"


def count(number: int, noun: str) -> str:
    """A number with its noun, in the plural where needed."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def mean(values: Iterable[float]) -> float:
    """Of the finite ones; not a number where there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def _or_missing(value: float, form: str, unit: str = "") -> str:
    return f"{value:{form}}{unit}" if math.isfinite(value) else MISSING
