"""The page on planning: what was measured, as Markdown."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from statistics import median
from typing import Any

from machine import describe_cpu
from npas_fx.ir import Certificate, Plan
from npas_fx.solvers import Selection
from planning_instances.measure import STEPS, FixedSolve, Planned, Solved, Timed

# The solver that plans are made by, and what it is to reach: sites -> a gap, in so many seconds.
DEFAULT = "cp_sat"
TARGETS = {600: (5e-4, 2.0), 2_000: (1e-3, 10.0), 10_000: (5e-3, 40.0)}
LIBRARIES = ("numpy", "scipy", "ortools", "torch", "timm", "transformers")


def write_page(
    solved: Sequence[Solved],
    planned: Sequence[Planned],
    *,
    command: str,
    repeats: int,
    remark: str,
    fixed: FixedSolve,
) -> str:
    """Write what was measured as Markdown.

    Args:
        solved: The made-up networks.
        planned: The models.
        command: That ran the benchmark.
        repeats: Repetitions of each measurement.
        remark: On what was run.
        fixed: What times are multiples of.
    """
    parts = [_head(command, repeats, fixed, remark)]
    if solved:
        parts += [_targets(solved), _instances(solved), *map(_section, solved)]
    if any(one.frontiers for one in solved):
        parts.append(_frontiers(solved))
    if planned:
        parts.append(_models(planned))
    return "\n\n".join(parts)


def _head(command: str, repeats: int, fixed: FixedSolve, remark: str) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    times = sorted(fixed.seconds)
    how = (
        "The time of a solve includes making the `PlanningProblem`, but not the candidates. *gap* "
        "is what the solver itself proves, *gap to the best bound* measures its plan against the "
        "highest bound that any of the solvers here proved for that network and budget: the one "
        "to read for greedy, which has hardly a bound of its own."
    )
    return (
        "# What planning takes, and how good plans are\n\n"
        f"`{command}`\n\n"
        f"{describe_cpu()}, {os.cpu_count()} cores, of which solvers use one; Python "
        f"{platform.python_version()}, {versions}; medians of {repeats} repetitions, in which "
        "budgets and solvers take turns; gaps are the largest of them. In brackets: as a multiple "
        f"of one fixed solve, made before and after each measurement: {fixed.what}, by the dual "
        f"simplex of HiGHS through scipy. It took {median(times):.3f} s ({times[0]:.3f} to "
        f"{times[-1]:.3f} s). Timings on a shared machine are noisy, the multiples less so than "
        f"the seconds.\n\n{how} {remark}".rstrip()
    )


def _targets(solved: Sequence[Solved]) -> str:
    """What the default solver reaches, and plainly what not."""
    rows = []
    for one in solved:
        runs = {budget: of for (budget, name), of in one.runs.items() if name == DEFAULT}
        if one.instance.num_sites in TARGETS and runs:
            gap, seconds = TARGETS[one.instance.num_sites]
            missed = {f"{budget:.0%}": _missed(one, of) for budget, of in runs.items()}
            made, fastest = _seconds(one.made), min(map(_seconds, runs.values()))
            rows.append(
                [
                    f"{one.instance.num_sites:,}",
                    f"a gap of {_percent(gap)} in {seconds:g} s",
                    ", ".join(budget for budget, what in missed.items() if not what) or "none",
                    ", ".join(f"{b} ({w})" for b, w in missed.items() if w) or "none",
                    f"{_yes(made <= fastest)}: {made:.2f} s, {fastest:.2f} s",
                ]
            )
    if not rows:
        return f"## Targets\n\nNone: {DEFAULT} solved no network of a size that has one."
    heads = [
        *("weights", "target", "met at", "missed at"),
        "candidates in no longer than the fastest solve",
    ]
    return f"## Targets of {DEFAULT}\n\n{_table(heads, rows)}"


def _missed(solved: Solved, runs: Sequence[Timed[Selection]]) -> str:
    """What is missed of the target; empty where it is met."""
    most_gap, most_seconds = TARGETS[solved.instance.num_sites]
    gap, seconds = _largest_gap(runs), _seconds(runs)
    missed = [] if gap <= most_gap else [f"gap {_percent(gap)}"]
    missed += [] if seconds <= most_seconds else [f"{seconds:.1f} s"]
    return ", ".join(missed)


def _instances(solved: Sequence[Solved]) -> str:
    instances = [one.instance for one in solved]
    rows = [
        [family, *(f"{len(instance.families[family]):,}" for instance in instances)]
        for family in instances[0].families
    ]
    rows += [
        ["site sets in all", *(f"{len(set(each.members)):,}" for each in instances)],
        ["sizes of each", *(f"{each.num_sizes}" for each in instances)],
        ["**candidates**", *(f"**{len(each.members):,}**" for each in instances)],
        ["candidates made in", *(_time(one.made) for one in solved)],
    ]
    heads = ["weights", *(f"{instance.num_sites:,}" for instance in instances)]
    return (
        "## Made-up networks\n\n"
        "Stages of repeated blocks, each stage with a width and a block of its own, a quarter of "
        "the weights of a size of their own. Families of site sets overlap; each set comes in all "
        "sizes, and a weight alone also as it is, at price 0. Prices are convex in the size, with "
        "terms for what is far apart or of another role in one bank, as those of the profile "
        f"`structure`.\n\n{_table(heads, rows)}"
    )


def _section(solved: Solved) -> str:
    """A row for each budget and solver."""
    has_target = solved.instance.num_sites in TARGETS
    heads = ["budget", "solver", "time", "work", "status", "gap", "gap to the best bound"]
    heads += ["target"] if has_target else []
    rows = [
        [
            f"{budget:.0%}",
            name,
            _time(runs),
            _work(runs[0].result),
            runs[0].result.status,
            _percent(_largest_gap(runs)),
            _percent(max(_gap_to(solved.bound(budget), run.result) for run in runs)),
            *([_missed(solved, runs) or "met"] if has_target else []),
        ]
        for (budget, name), runs in solved.runs.items()
    ]
    differing = [
        f"{name} at {budget:.0%}"
        for (budget, name), runs in solved.runs.items()
        if len({run.result.chosen for run in runs}) > 1
    ]
    same = "Each repetition chose the same plans."
    if differing:
        same = f"Repetitions chose different plans: {', '.join(differing)}."
    instance = solved.instance
    title = f"## {instance.num_sites:,} weights, {len(instance.members):,} candidates"
    return f"{title}\n\n{_table(heads, rows)}\n\n{same}"


def _frontiers(solved: Sequence[Solved]) -> str:
    rows = []
    for one in solved:
        alone = [of for (_, name), of in one.runs.items() if name == DEFAULT]
        each = [sum(runs[k].seconds for runs in alone) for k in range(len(one.frontiers))]
        shares = [
            at_once.seconds / seconds for at_once, seconds in zip(one.frontiers, each, strict=True)
        ]
        together = [selection for run in one.frontiers for selection in run.result]
        rows.append(
            [
                f"{one.instance.num_sites:,}",
                _time(one.frontiers),
                f"{median(each):.3f} s",
                f"{median(shares):.0%}",
                _percent(max(map(_gap, together))),
                _percent(max(map(_largest_gap, alone))),
            ]
        )
    heads = ["weights", "at once", "one by one", "share", "largest gap at once", "one by one"]
    return f"## All budgets by {DEFAULT}, at once and one by one\n\n{_table(heads, rows)}"


def _models(planned: Sequence[Planned]) -> str:
    heads = ["budget", "plan", *STEPS, "candidates", "rounds", "status", "gap", "propose <= solve"]
    parts = [
        "## Models\n\n"
        "Described by shapes alone, on the meta device, and captured once: what `npas_fx.plan` "
        "does after capture, step by step. *refine* adds candidates to those that were proposed, "
        "in rounds; *other* is what the steps leave of the plan's time."
    ]
    for one in planned:
        inventory = one.captured.result
        rows = []
        for budget, runs in one.runs.items():
            certificate = _certificate(runs[0])
            steps = {step: median(times[step] for times in one.steps[budget]) for step in STEPS}
            rows.append(
                [
                    f"{budget:.0%}",
                    _time(runs),
                    *(f"{seconds:.3f} s" for seconds in steps.values()),
                    f"{certificate.candidates:,}",
                    f"{certificate.rounds}",
                    certificate.status,
                    _percent(max(_certificate(run).gap for run in runs)),
                    _yes(steps["propose"] <= steps["solve"]),
                ]
            )
        parts.append(
            f"### {one.name}\n\n"
            f"{inventory.num_parameters:,} parameters, {len(inventory.sites):,} weights that can "
            f"be generated; capture took {_time([one.captured])}.\n\n{_table(heads, rows)}"
        )
    return "\n\n".join(parts)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _seconds(runs: Sequence[Timed[Any]]) -> float:
    return median(run.seconds for run in runs)


def _time(runs: Sequence[Timed[Any]]) -> str:
    return f"{_seconds(runs):.3f} s (x {median(run.multiple for run in runs):.2f})"


def _gap(selection: Selection) -> float:
    return math.inf if selection.gap is None else selection.gap


def _largest_gap(runs: Sequence[Timed[Selection]]) -> float:
    return max(_gap(run.result) for run in runs)


def _gap_to(bound: float, selection: Selection) -> float:
    """How far a plan is above a bound that some solver proved."""
    if selection.objective is None:
        return math.inf
    if selection.objective <= bound:
        return 0.0
    return (selection.objective - bound) / abs(selection.objective)


def _certificate(run: Timed[Plan]) -> Certificate:
    assert run.result.certificate is not None  # it was made here, by nobody's hand
    return run.result.certificate


def _percent(gap: float) -> str:
    return "none proven" if gap == math.inf else f"{100 * gap:.4f} %"


def _work(selection: Selection) -> str:
    work = selection.work.items()
    counted = (f"{unit} {n:,.0f}" if n == int(n) else f"{unit} {n:.3f}" for unit, n in work)
    return ", ".join(counted) or "not counted"


def _yes(holds: bool) -> str:
    return "yes" if holds else "**no**"
