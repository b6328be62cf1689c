"""Carry out one run: make the network, train it, measure it."""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path

import torch

from machine import describe_cpu
from quality.contestant import Assignment, count_parameters
from quality.methods import METHODS
from quality.records import Result, Row, Run
from quality.tasks import Task, read_task
from quality.training import Rates, compare_step_times, fit

_RATES = ("coefficient_lr", "coefficient_decay")


def execute(run: Run, data_dir: Path, cache_dir: Path) -> Row:
    """Train what a run says and measure it.

    Raises:
        DataError: the task's data is not there.
        ValueError: the method has no network for this budget.
        FloatingPointError: the training diverges.
    """
    start = time.perf_counter()
    task = _read_task(run.task, run.setting, data_dir, cache_dir)
    torch.manual_seed(run.seed)
    plain = task.make(task.width, task.depth).to(task.recipe.device)
    options = run.option
    own_rates = {name: options.pop(name) for name in _RATES if name in options}
    rates = Rates(lr=run.lr, weight_decay=run.weight_decay, **own_rates)
    contestant = METHODS[run.method](
        Assignment(
            task=task,
            model=plain,
            budget=round(run.budget * count_parameters(plain)),
            seed=run.seed,
            steps=run.steps,
            rates=rates,
            options=options,
        )
    )
    module = contestant.module.to(task.recipe.device)
    step_time = compare_step_times(module, plain, task)
    fit(
        module,
        task,
        steps=run.steps,
        seed=run.seed,
        rates=rates,
        coefficients=contestant.coefficients,
    )
    valid_loss, valid_accuracy = task.score(module, "valid")
    test_loss, test_accuracy = task.score(module, "test") if run.reads_test else (None, None)
    return Row(
        run=run,
        result=Result(
            parameters=count_parameters(module),
            valid_loss=valid_loss,
            valid_accuracy=valid_accuracy,
            test_loss=test_loss,
            test_accuracy=test_accuracy,
            generation_flops=contestant.generation_flops,
            step_time=round(step_time, 3),
            plan=contestant.plan,
            machine=f"{_describe_device(task.recipe.device)}, torch {torch.__version__}",
            seconds=round(time.perf_counter() - start, 1),
        ),
    )


@lru_cache(maxsize=4)  # decoding and normalising take longer than a short run
def _read_task(name: str, setting: str, data_dir: Path, cache_dir: Path) -> Task:
    return read_task(name, setting, data_dir, cache_dir)


def _describe_device(device: str) -> str:
    return describe_cpu() if device == "cpu" else torch.cuda.get_device_name()
