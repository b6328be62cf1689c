"""Time each step of ``transform``, in seconds and as a multiple of building the model.

    python benchmarks/transform_time.py          # the tables in docs/benchmarks/transform_time.md
    python benchmarks/transform_time.py --models densenet121 --budgets 0.1 --repeats 2

Each repetition builds a model and transforms it. Steps are timed inside ``transform``, by timers
around the functions that it calls; what is left of its time is "other". Seconds are medians over
the repetitions, multiples are medians of the ratios in each repetition, so that what slows the
machine down for a while hits both sides alike. The result is verified on a batch of two pictures,
in fewer repetitions, since that takes longer than all the rest.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

# timm imports torchvision, and torchvision's wheel for CUDA cannot be imported next to a CPU build
# of torch unless the operators that it misses are declared first.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
import torchvision_ops as _before_timm  # isort: skip  # noqa: F401

import timm
import torch
from torch import Tensor, nn

import npas_fx
from machine import describe_cpu
from npas_fx import api, planning
from npas_fx.passes.emitted import EmittedModule
from npas_fx.profiles import PROFILES
from npas_fx.solvers import SOLVERS
from npas_fx.verify import verify

MODELS = ("resnet50", "vit_base_patch16_224")
BUDGETS = (0.1, 0.5, 1.0, 2.0)
THREADS = 2
MOST_SECONDS = 5.0  # that a transform may take
BATCH_SIZE = 2
# Width of the pictures to verify on; other models get those that they were made for.
WIDTHS = {"resnet50": 64}

STEPS = ("capture", "profile", "propose", "refine", "solve", "fill", "build banks", "emit")
# Where `transform` finds the functions of a step. Profile and solver are handed to it instead.
CALLED = (
    (api, "capture", "capture"),
    (planning, "propose", "propose"),
    (planning, "refine", "refine"),
    (planning, "add_near", "refine"),
    (planning, "fill", "fill"),
    (api, "build_banks", "build banks"),
    (api, "give_birth", "build banks"),
    (api, "copy_with", "emit"),
    (api, "emit_module", "emit"),
)

# What one repetition took: step -> seconds.
Times = dict[str, float]


def main() -> None:
    """Print the tables, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, help="names of timm's models")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--repeats", type=int, default=5, help="repetitions for each figure")
    parser.add_argument("--verify-repeats", type=int, default=1, help="how many of them verify")
    parser.add_argument("--write", type=Path, help="file to write the tables to, as Markdown")
    args = parser.parse_args()
    if not 1 <= args.verify_repeats <= args.repeats:
        parser.error("there must be at least one repetition, and one of them that verifies")
    if args.write is not None and not args.write.parent.is_dir():
        parser.error(f"there is no folder {args.write.parent}")  # now, not minutes later
    torch.set_num_threads(THREADS)
    parts = []
    for name in args.models:
        measured = _measure(name, args.budgets, args.repeats, args.verify_repeats)
        parts.append(_section(name, measured))
        print(f"{parts[-1]}\n", flush=True)
        if args.write is not None:  # after each model: the next one may fail
            args.write.write_text("\n\n".join([_head(args), *parts]) + "\n", encoding="utf-8")


def _measure(
    name: str, budgets: Sequence[float], repeats: int, verify_repeats: int
) -> dict[float, list[Times]]:
    """Budget -> the times of each repetition; budgets take turns."""
    _warm_up(name)
    measured: dict[float, list[Times]] = {budget: [] for budget in budgets}
    for repeat in range(repeats):
        for budget in budgets:
            with_verify = repeat < verify_repeats
            # The plain model is the same at each budget.
            with_passes = with_verify and budget == budgets[0]
            measured[budget].append(_repeat(name, budget, with_verify, with_passes))
            gc.collect()  # graphs and modules are cycles; not in the time of the next one
    return measured


def _warm_up(name: str) -> None:
    """Import what is imported when first used, and let each operation run once."""
    model = timm.create_model(name)
    npas_fx.transform(model, 0.5)
    _run(model, _draw_pictures(name, model), (True,))


def _repeat(name: str, budget: float, with_verify: bool, with_passes: bool) -> Times:
    times: Times = dict.fromkeys(STEPS, 0.0)
    model = _timed(times, "building", timm.create_model)(name)
    shared = _timed(times, "transform", _transform)(model, budget, times)
    times["other"] = times["transform"] - sum(times[step] for step in STEPS)
    pictures = _draw_pictures(name, model)
    if with_verify:
        _timed(times, "verify", verify)(shared, model, pictures)
    if with_passes:
        # What `verify` must do: both modes, for each of two modules.
        _timed(times, "passes", _run)(model, pictures, (True, True, False, False))
    return times


def _draw_pictures(name: str, model: nn.Module) -> Tensor:
    width = WIDTHS.get(name, model.default_cfg["input_size"][-1])
    return torch.randn(BATCH_SIZE, 3, width, width, generator=torch.Generator().manual_seed(0))


def _run(model: nn.Module, pictures: Tensor, modes: Sequence[bool]) -> None:
    """Go forward and backward in each mode."""
    parameters = list(model.parameters())
    for is_training in modes:
        torch.autograd.grad(model.train(is_training)(pictures).sum(), parameters)


def _transform(model: nn.Module, budget: float, times: Times) -> EmittedModule:
    with ExitStack() as stack:
        for module, name, step in CALLED:
            stack.enter_context(
                patch.object(module, name, _timed(times, step, getattr(module, name)))
            )
        return npas_fx.transform(
            model,
            budget,
            profile=_timed(times, "profile", PROFILES["structure"]),
            solver=_timed(times, "solve", SOLVERS["cp_sat"]),
        )


def _timed(times: Times, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Add what each call of the function takes to the time of a step."""

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            times[step] = times.get(step, 0.0) + time.perf_counter() - start

    return call


def _section(name: str, measured: Mapping[float, list[Times]]) -> str:
    """A table with a row for each step and a column for each budget."""
    columns = list(measured.values())
    longest = [max(times["transform"] for times in column) for column in columns]
    is_quick = [_median(column, "transform") <= MOST_SECONDS for column in columns]
    rows = [
        ("", [f"{budget:.0%}" for budget in measured]),
        ("---", ["---"] * len(columns)),
        ("building the model", [f"{_median(column, 'building'):.3f} s" for column in columns]),
        *((step, [_cell(column, step) for column in columns]) for step in (*STEPS, "other")),
        ("**transform**", [f"**{_cell(column, 'transform')}**" for column in columns]),
        (f"longest of {len(columns[0])}", [f"{seconds:.3f} s" for seconds in longest]),
        (f"transform within {MOST_SECONDS:g} s", ["yes" if is_ else "no" for is_ in is_quick]),
        ("verify", [_cell(column, "verify") for column in columns]),
    ]
    table = "\n".join(f"| {' | '.join([head, *cells])} |" for head, cells in rows)
    passes = _cell(columns[0], "passes")
    return f"## {name}\n\n{table}\n\nFour passes of the plain model: {passes}."


def _median(column: Sequence[Times], step: str) -> float:
    return median(times[step] for times in column if step in times)  # not all of them verify


def _cell(column: Sequence[Times], step: str) -> str:
    ratio = median(times[step] / times["building"] for times in column if step in times)
    return f"{_median(column, step):.3f} s (x {ratio:.2f})"


def _head(args: argparse.Namespace) -> str:
    command = shlex.join(["python", "benchmarks/transform_time.py", *sys.argv[1:]])
    torch_and_timm = f"torch {torch.__version__}, timm {timm.__version__}"
    return (
        "# What a transform takes, step by step\n\n"
        f"`{command}`\n\n"
        f"{describe_cpu()}, {os.cpu_count()} cores, {THREADS} threads; "
        f"Python {platform.python_version()}, {torch_and_timm}; medians of "
        f"{args.repeats} repetitions, budgets in turn. In brackets: as a multiple of building the "
        "model (timm, random weights) in the same repetition. Timings on a shared machine are "
        "noisy, the multiples less so than the seconds.\n\n"
        "*transform* is the whole call without example inputs, *other* what its steps leave of it. "
        f"With example inputs it also does *verify*, here on {BATCH_SIZE} pictures and measured in "
        f"{args.verify_repeats} of the repetitions: four passes forward and backward, and "
        "comparisons; below each table is what four such passes of the plain model take. Not in "
        "these figures: the first transform in a process also imports the solver."
    )


if __name__ == "__main__":
    main()
