from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quality import execute as execution
from quality.contestant import Assignment, Contestant
from quality.execute import execute
from quality.records import Result, Row, Run, write_options
from quality.tasks import Characters, Task
from quality.training import Rates, Training, fit
from tiny_tasks import make_characters, make_cifar

RUN = Run(
    study="trials",
    task="characters",
    setting="small",
    method="plain",
    budget=0.5,
    seed=3,
    steps=4,
    lr=0.02,
    weight_decay=0.1,
)
TASK = make_characters()


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Execute ``RUN`` with some fields changed, on a tiny task."""

    def read_task(
        name: str, setting: str, data_dir: Path, cache_dir: Path, device: str | None
    ) -> Task:
        assert setting == "small"
        return {"characters": TASK, "cifar": make_cifar("wide_resnet", width=8, depth=10)}[name]

    monkeypatch.setattr(execution, "read_task", read_task)

    def train(**changes: Any) -> Result:
        run = replace(RUN, **changes)
        (row,) = execute([run], tmp_path / "data", tmp_path / "cache")
        if isinstance(row, Exception):
            raise row
        assert row.run == run
        return row.result

    return train


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Splits that were scored."""
    asked = []
    score = Characters.score

    def watch(task: Characters, module: nn.Module, split: str) -> tuple[float, float]:
        asked.append(split)
        return score(task, module, split)

    monkeypatch.setattr(Characters, "score", watch)
    return asked


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Assignment]:
    """What the method ``"probe"`` was given; it trains the plain network."""
    seen = []

    def probe(assignment: Assignment) -> Contestant:
        seen.append(assignment)
        coefficients = (assignment.model.tokens.weight,)
        return Contestant(
            module=assignment.model, coefficients=coefficients, generation_flops=12, plan="[]"
        )

    monkeypatch.setattr(execution, "METHODS", {"probe": probe})
    return seen


def make_plain(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return TASK.make(TASK.width, TASK.depth)


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_result_of_the_plain_network_is_that_of_training_it(train) -> None:
    module = make_plain(3)
    rates = Rates(lr=0.02, weight_decay=0.1)
    fit(Training(module=module, task=TASK, steps=4, seed=3, rates=rates))
    result = train(reads_test=True)
    assert (result.valid_loss, result.valid_accuracy) == TASK.score(module, "valid")
    assert (result.test_loss, result.test_accuracy) == TASK.score(module, "test")
    assert result.valid_loss != result.test_loss
    assert result.parameters == count_parameters(module)
    assert (result.generation_flops, result.plan) == (0, "")


@pytest.mark.parametrize("task", ["characters", "cifar"])
def test_network_that_shares_has_the_budget_and_a_plan(train, task: str) -> None:
    num_parameters = train(task=task).parameters
    result = train(task=task, method="ours")
    assert 0.4 * num_parameters < result.parameters <= 0.5 * num_parameters
    assert result.generation_flops > 0
    assert json.loads(result.plan)
    assert "\n" not in result.plan, "a row is a line"


def test_machine_and_times_are_recorded(train) -> None:
    result = train()
    assert f", torch {torch.__version__}" in result.machine
    assert len(result.machine.split(", torch")[0]) > 2
    assert 0.1 < result.step_time < 10
    assert 0 <= result.seconds < 60


def test_seed_steps_rate_and_decay_are_those_of_the_run(train) -> None:
    loss = train().valid_loss
    assert train().valid_loss == loss
    for change in ({"seed": 4}, {"steps": 3}, {"lr": 0.03}, {"weight_decay": 10.0}):
        assert train(**change).valid_loss != loss


def test_test_set_is_read_when_asked(train, splits: list[str]) -> None:
    result = train(reads_test=False)
    assert splits == ["valid"]
    assert (result.test_loss, result.test_accuracy) == (None, None)
    splits.clear()
    assert train(reads_test=True).test_loss is not None
    assert splits == ["valid", "test"]


def test_method_is_given_the_run(train, given: list[Assignment]) -> None:
    result = train(method="probe", budget=0.3, options=write_options(by="role"))
    (assignment,) = given
    assert assignment.budget == round(0.3 * count_parameters(make_plain(3)))
    assert (assignment.seed, assignment.steps, assignment.rates.lr) == (3, 4, 0.02)
    assert assignment.task is TASK
    assert (result.generation_flops, result.plan) == (12, "[]")


def test_options_go_to_the_rates_or_to_the_method(
    train, given: list[Assignment], monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[Training] = []

    def fit_together(trainings: Sequence[Training]) -> list[None]:
        fitted.extend(trainings)
        return [None] * len(trainings)

    monkeypatch.setattr(execution, "fit_together", fit_together)
    options = write_options(by="role", coefficient_lr=5.0, coefficient_decay=0.3)
    train(method="probe", options=options)
    train(method="probe")
    assert [dict(assignment.options) for assignment in given] == [{"by": "role"}, {}]
    assert fitted[0].rates == Rates(
        lr=0.02, weight_decay=0.1, coefficient_lr=5.0, coefficient_decay=0.3
    )
    assert fitted[1].rates == Rates(lr=0.02, weight_decay=0.1)
    for training, assignment in zip(fitted, given, strict=True):
        assert training.coefficients == (assignment.model.tokens.weight,)


def test_budget_that_no_network_meets_is_an_error(train) -> None:
    with pytest.raises(ValueError, match="no network of depth 2 has 1 parameters or fewer"):
        train(method="narrower", budget=0.0005)


def test_divergence_is_an_error(train) -> None:
    with pytest.raises(FloatingPointError):
        train(lr=1e30)


def test_runs_that_go_together_are_those_that_go_alone(train, tmp_path: Path) -> None:
    runs = [
        RUN,
        replace(RUN, lr=1e30),
        replace(RUN, method="narrower", budget=0.0005),
        replace(RUN, method="ours", seed=1, steps=6),
    ]
    first, diverged, impossible, last = execute(runs, tmp_path / "data", tmp_path)
    assert isinstance(diverged, FloatingPointError)
    assert isinstance(impossible, ValueError)
    for run, row in ((runs[0], first), (runs[3], last)):
        assert isinstance(row, Row)
        assert row.run == run
        alone = train(method=run.method, seed=run.seed, steps=run.steps)
        assert row.result.valid_loss == alone.valid_loss


def test_data_are_read_once_for_each_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def read_task(
        name: str, setting: str, data_dir: Path, cache_dir: Path, device: str | None
    ) -> Task:
        read.append((name, setting, data_dir, cache_dir))
        return TASK

    monkeypatch.setattr(execution, "read_task", read_task)
    data_dir, cache_dir = tmp_path / "data", tmp_path / "cache"
    for setting in ("small", "full", "small"):
        execute([replace(RUN, steps=1, setting=setting)], data_dir, cache_dir)
    expected = [("characters", setting, data_dir, cache_dir) for setting in ("small", "full")]
    assert read == expected
