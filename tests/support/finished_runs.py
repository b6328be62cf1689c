"""Made-up rows of training results."""

from __future__ import annotations

from typing import Any

from quality.records import Result, Row, Run


def make_row(
    method: str,
    budget: float,
    seed: int,
    figure: float,
    *,
    study: str = "results",
    task: str = "char-mixer",
    setting: str = "small",
    valid: float | None = None,
    has_test: bool = True,
    steps: int = 1200,
    lr: float = 0.1,
    weight_decay: float = 0.0,
    options: str = "{}",
    parameters: int | None = None,
    generation_flops: int = 0,
    step_time: float = 1.0,
    machine: str = "a machine, torch 2.13.0",
) -> Row:
    """One run whose losses and accuracies on the test set are ``figure``, on validation ``valid``.

    ``valid`` is ``figure`` where it is not given, and the plain network has 1,000 parameters.
    """
    valid = figure if valid is None else valid
    test = figure if has_test else None
    return Row(
        run=Run(
            study=study,
            task=task,
            setting=setting,
            method=method,
            budget=budget,
            seed=seed,
            steps=steps,
            lr=lr,
            weight_decay=weight_decay,
            options=options,
            reads_test=has_test,
        ),
        result=Result(
            parameters=round(1000 * budget) if parameters is None else parameters,
            valid_loss=valid,
            valid_accuracy=valid,
            test_loss=test,
            test_accuracy=test,
            generation_flops=generation_flops,
            step_time=step_time,
            plan="",
            machine=machine,
            seconds=1.0,
        ),
    )


def make_cell(method: str, budget: float, figures: list[float], **others: Any) -> list[Row]:
    """One row for each figure, with the seeds 0, 1, …."""
    return [make_row(method, budget, seed, each, **others) for seed, each in enumerate(figures)]
