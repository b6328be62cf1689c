"""Carry out runs: make the networks, train them, measure them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from machine import describe_cpu
from quality.contestant import Assignment, Contestant, count_parameters
from quality.methods import METHODS
from quality.records import Result, Row, Run
from quality.tasks import Task, read_task
from quality.training import Rates, Training, compare_step_times, fit_together

_T = TypeVar("_T")

_RATES = ("coefficient_lr", "coefficient_decay")


def execute(
    runs: Sequence[Run], data_dir: Path, cache_dir: Path, device: str | None = None
) -> list[Row | Exception]:
    """Train what runs say, at the same time for a GPU that one does not fill, and measure it.

    Args:
        runs: what to train.
        data_dir: holds the data of their tasks.
        cache_dir: for decoded pictures.
        device: another than the recipe's.

    Returns:
        For each a row or what made it fail: ``DataError`` where the task's data is not there,
        ``ValueError`` where the method has no network for the budget, ``FloatingPointError`` where
        the training diverges.
    """
    start = time.perf_counter()
    prepared = [_attempt(_prepare, run, data_dir, cache_dir, device) for run in runs]
    ready = [each for each in prepared if isinstance(each, _Prepared)]
    failures = iter(fit_together([each.training for each in ready]))
    rows: list[Row | Exception] = []
    for each in prepared:
        if isinstance(each, Exception):
            rows.append(each)
        else:
            failure = next(failures)
            rows.append(_attempt(_measure, each, start) if failure is None else failure)
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """A run whose network is made and not trained yet."""

    run: Run
    contestant: Contestant
    training: Training
    step_time: float


def _attempt(function: Callable[..., _T], *args: Any) -> _T | Exception:
    try:
        return function(*args)
    except Exception as err:  # a run that fails must not cost the other runs
        return err


def _prepare(run: Run, data_dir: Path, cache_dir: Path, device: str | None) -> _Prepared:
    task = _read_task(run.task, run.setting, data_dir, cache_dir, device)
    torch.manual_seed(run.seed)
    plain = task.make(task.width, task.depth)
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
    return _Prepared(
        run=run,
        contestant=contestant,
        training=Training(
            module=module,
            task=task,
            steps=run.steps,
            seed=run.seed,
            rates=rates,
            coefficients=contestant.coefficients,
        ),
        step_time=compare_step_times(module, plain.to(task.recipe.device), task),
    )


def _measure(prepared: _Prepared, start: float) -> Row:
    run, task, module = prepared.run, prepared.training.task, prepared.training.module
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
            generation_flops=prepared.contestant.generation_flops,
            step_time=round(prepared.step_time, 3),
            plan=prepared.contestant.plan,
            machine=f"{_describe_device(task.recipe.device)}, torch {torch.__version__}",
            seconds=round(time.perf_counter() - start, 1),
        ),
    )


@lru_cache(maxsize=4)  # decoding and normalising take longer than a short run
def _read_task(
    name: str, setting: str, data_dir: Path, cache_dir: Path, device: str | None
) -> Task:
    return read_task(name, setting, data_dir, cache_dir, device)


def _describe_device(device: str) -> str:
    return describe_cpu() if device == "cpu" else torch.cuda.get_device_name()
