"""Train a network, and time its steps beside those of another."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

from quality.tasks import Batch, Recipe, Task, compute_loss

# Of the plain network and of another, in turn; the first ones do not count.
TIMED_PAIRS, WARM_UP_PAIRS = 9, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Learning rate and decay of a run.

    Attributes:
        lr: largest learning rate.
        weight_decay: of tensors with two dimensions and more.
        coefficient_lr: learning rate of coefficients, as a multiple of ``lr``.
        coefficient_decay: weight decay of coefficients.
    """

    lr: float
    weight_decay: float
    coefficient_lr: float = 1.0
    coefficient_decay: float = 0.0


def fit(
    module: nn.Module,
    task: Task,
    *,
    steps: int,
    seed: int,
    rates: Rates,
    coefficients: Collection[nn.Parameter] = (),
) -> None:
    """Train a module in place.

    Args:
        module: on the task's device.
        task: with the recipe.
        steps: of the optimizer.
        seed: of the batches.
        rates: of this run.
        coefficients: parameters with rates of their own.

    Raises:
        FloatingPointError: the loss is no longer a number.
    """
    optimizer = make_optimizer(module, task.recipe, rates, coefficients)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(steps))
    called = torch.compile(module) if task.recipe.compiles else module
    module.train()
    for step, batch in enumerate(task.batches(steps, seed)):
        loss = _step(called, batch, task.recipe, optimizer)
        if (step % 100 == 0 or step == steps - 1) and not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()} after {step} steps")
        schedule.step()


def make_optimizer(
    module: nn.Module, recipe: Recipe, rates: Rates, coefficients: Collection[nn.Parameter]
) -> torch.optim.Optimizer:
    """Make the recipe's optimizer; vectors are not decayed."""
    own = {id(parameter) for parameter in coefficients}
    rest = [parameter for parameter in module.parameters() if id(parameter) not in own]
    groups: list[dict[str, object]] = [
        {
            "params": [parameter for parameter in rest if parameter.dim() > 1],
            "weight_decay": rates.weight_decay,
        },
        {"params": [parameter for parameter in rest if parameter.dim() <= 1], "weight_decay": 0.0},
        {
            "params": list(coefficients),
            "lr": rates.lr * rates.coefficient_lr,
            "weight_decay": rates.coefficient_decay,
        },
    ]
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rates.lr, betas=(0.9, 0.99), fused=True)
    return torch.optim.SGD(groups, lr=rates.lr, momentum=0.9, nesterov=True)


def compare_step_times(module: nn.Module, plain: nn.Module, task: Task) -> float:
    """Median over pairs of the time of a step of ``module`` over that of ``plain``.

    Neither module is changed.
    """
    batch = next(iter(task.batches(1, 0)))
    steps = []
    for timed in (module, plain):
        copied = copy.deepcopy(timed).train()
        optimizer = make_optimizer(copied, task.recipe, Rates(lr=1e-6, weight_decay=0.0), ())
        called = torch.compile(copied) if task.recipe.compiles else copied
        steps.append((called, optimizer))

    def run(index: int) -> float:
        start = time.perf_counter()
        _step(steps[index][0], batch, task.recipe, steps[index][1])
        if task.recipe.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    ratios = [run(0) / run(1) for _ in range(TIMED_PAIRS + WARM_UP_PAIRS)]
    return median(ratios[WARM_UP_PAIRS:])


def _step(
    called: Callable[..., torch.Tensor],
    batch: Batch,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
) -> torch.Tensor:
    optimizer.zero_grad()
    loss = compute_loss(called, batch, recipe)
    loss.backward()  # type: ignore[no-untyped-call]
    if recipe.clip is not None:
        nn.utils.clip_grad_norm_(_trained(optimizer), recipe.clip)
    optimizer.step()
    return loss.detach()


def _trained(optimizer: torch.optim.Optimizer) -> Sequence[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _schedule(steps: int) -> Callable[[int], float]:
    warm_up = max(1, steps // 20)

    def share(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))) / 2

    return share
