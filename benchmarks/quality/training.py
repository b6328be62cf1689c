"""Train a network, and time its steps beside those of another."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

from quality.tasks import Batch, Recipe, Task, compute_loss, iterate_batches

# Of the plain network and of another, in turn; the first ones do not count.
TIMED_PAIRS, WARM_UP_PAIRS = 9, 2
# Before a CUDA graph is captured, so that all that is made once is there.
_WARM_UP_STEPS = 3


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


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is trained, on what, and how.

    Attributes:
        module: trained in place; on the task's device.
        task: with the recipe.
        steps: of the optimizer.
        seed: of the batches.
        rates: of this run.
        coefficients: parameters with rates of their own.
    """

    module: nn.Module
    task: Task
    steps: int
    seed: int
    rates: Rates
    coefficients: Collection[nn.Parameter] = ()


def fit(training: Training) -> None:
    """Train a module in place.

    Raises:
        FloatingPointError: the loss is no longer a number.
    """
    (failure,) = fit_together([training])
    if failure is not None:
        raise failure


def fit_together(trainings: Sequence[Training]) -> list[FloatingPointError | None]:
    """Train several modules, a step of each in turn; a GPU works on them at the same time.

    Returns:
        For each what ended it before its last step, or None.
    """
    failures: list[FloatingPointError | None] = [None] * len(trainings)
    going = {index: take_steps(training) for index, training in enumerate(trainings)}
    while going:
        for index, steps in list(going.items()):
            try:
                next(steps)
            except StopIteration:
                del going[index]
            except FloatingPointError as err:
                failures[index] = err
                del going[index]
    return failures


def take_steps(training: Training) -> Iterator[None]:
    """Train one step each time that the next element is asked for.

    Raises:
        FloatingPointError: the loss is no longer a number.
    """
    on_gpu = torch.device(training.task.recipe.device).type == "cuda"
    return _replay_steps(training) if on_gpu else _take_steps(training)


def _take_steps(training: Training) -> Iterator[None]:
    module, task, rates = training.module, training.task, training.rates
    optimizer = make_optimizer(module, task.recipe, rates, training.coefficients)
    largest = [group["lr"] for group in optimizer.param_groups]
    share = _schedule(training.steps)
    called = torch.compile(module) if task.recipe.compiles else module
    module.train()
    for step, batch in enumerate(iterate_batches(task, training.steps, training.seed)):
        for group, lr in zip(optimizer.param_groups, largest, strict=True):
            group["lr"] = lr * share(step)
        loss = _step(called, batch, task.recipe, optimizer)
        if step % 100 == 0 or step == training.steps - 1:
            _check(loss, step)
        yield


def _replay_steps(training: Training) -> Iterator[None]:
    """Take steps that are replays of one CUDA graph: networks as small as ours wait for launches.

    Batches and rates of all steps are on the device beforehand, and the graph counts its replays,
    so the CPU has nothing else to do.
    """
    module, task = training.module, training.task
    device = torch.device(task.recipe.device)
    drawn = zip(*task.draw(training.steps, training.seed), strict=True)
    columns = [torch.stack(column).to(device) for column in drawn]
    share = _schedule(training.steps)
    shares = torch.tensor([share(step) for step in range(training.steps)], device=device)
    optimizer = make_optimizer(module, task.recipe, training.rates, training.coefficients)
    largest = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], device=device)
    called = torch.compile(module) if task.recipe.compiles else module
    module.train()
    number = torch.zeros(1, dtype=torch.long, device=device)

    def take_step() -> torch.Tensor:
        for group, lr in zip(optimizer.param_groups, largest, strict=True):
            group["lr"].copy_(shares[number].squeeze(0) * lr)
        batch = task.make_batch(tuple(column[number].squeeze(0) for column in columns))
        loss = _step(called, batch, task.recipe, optimizer)
        number.add_(1)
        return loss

    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    tensors = [*module.parameters(), *module.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_STEPS):
            take_step()
            number.zero_()
    with torch.cuda.graph(graph, stream=stream):
        loss = take_step()
    with torch.cuda.stream(stream), torch.no_grad():
        number.zero_()
        for tensor, saved in zip(tensors, before, strict=True):
            tensor.copy_(saved)
        for state in optimizer.state.values():
            for tensor in state.values():  # momenta, and the number of steps
                tensor.zero_()
    for _ in range(training.steps):
        with torch.cuda.stream(stream):
            graph.replay()
        yield
    stream.synchronize()
    _check(loss, training.steps)


def _check(loss: torch.Tensor, step: int) -> None:
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"the loss is {loss.item()} after {step} steps")


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
    on_gpu = torch.device(recipe.device).type == "cuda"
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(
            groups, lr=rates.lr, betas=(0.9, 0.99), fused=True, capturable=on_gpu
        )
    return torch.optim.SGD(groups, lr=rates.lr, momentum=0.9, nesterov=True, fused=on_gpu)


def compare_step_times(module: nn.Module, plain: nn.Module, task: Task) -> float:
    """Median over pairs of the time of a step of ``module`` over that of ``plain``.

    Neither module is changed.
    """
    batch = next(iterate_batches(task, 1, 0))
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
