from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from quality import training
from quality.tasks import Recipe, Task
from quality.training import (
    Rates,
    Training,
    compare_step_times,
    fit,
    fit_together,
    make_optimizer,
)
from tiny_tasks import RECIPE, make_characters, make_cifar, make_pictures, make_text

RATES = Rates(lr=0.01, weight_decay=0.1)


class Mixed(nn.Module):
    """One tensor of each kind: a matrix, a vector, coefficients."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.full((2, 2), 2.0))
        self.vector = nn.Parameter(torch.full((2,), 2.0))
        self.coefficients = nn.Parameter(torch.full((2, 2), 2.0))


def make_module(task: Task, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return task.make(task.width, task.depth)


def train(task: Task, *, steps: int = 5, seed: int = 0, rates: Rates = RATES) -> nn.Module:
    module = make_module(task)
    fit(Training(module=module, task=task, steps=steps, seed=seed, rates=rates))
    return module


def is_same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


@pytest.fixture
def rates_seen(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """Learning rates of all groups, step by step, of what is trained in the test."""
    seen: list[list[float]] = []
    make = training.make_optimizer

    def watch(*args: object) -> torch.optim.Optimizer:
        optimizer = make(*args)
        optimizer.register_step_pre_hook(
            lambda optimizer, *_: seen.append([group["lr"] for group in optimizer.param_groups])
        )
        return optimizer

    monkeypatch.setattr(training, "make_optimizer", watch)
    return seen


@pytest.mark.parametrize("autocast", [False, True])
def test_training_learns_a_text_that_repeats(autocast: bool) -> None:
    task = make_characters(text=make_text("abcd" * 60), autocast=autocast)
    before, _ = task.score(make_module(task), "test")
    module = train(task, steps=60, rates=Rates(lr=0.03, weight_decay=0.0))
    loss, accuracy = task.score(module, "test")
    assert loss < before / 4
    assert accuracy > 0.9


def test_training_learns_pictures() -> None:
    pictures = make_pictures(10)
    shown, labels = pictures.splits["train"]
    labels = labels % 2
    bright = shown // 4 + (150 * labels).byte()[:, None, None, None]
    task = make_cifar(pictures=replace(pictures, splits={"train": (bright, labels)}), batch_size=10)
    module = train(task, steps=25, rates=Rates(lr=0.1, weight_decay=0.0))
    loss, accuracy = task.score(module, "train")
    assert loss < math.log(2) / 2
    assert accuracy == 1.0


@pytest.mark.parametrize("make", [make_characters, make_cifar])
def test_one_seed_gives_one_network(make: Callable[[], Task]) -> None:
    assert is_same(train(make(), seed=1), train(make(), seed=1))
    assert not is_same(train(make(), seed=1), train(make(), seed=2))


def test_module_is_trained_in_training_mode() -> None:
    task = make_cifar()
    module = make_module(task).eval()
    before = module.norm.running_mean.clone()
    fit(Training(module=module, task=task, steps=2, seed=0, rates=RATES))
    assert not torch.equal(module.norm.running_mean, before)


@pytest.mark.parametrize("steps", [20, 40])
def test_rate_rises_to_the_given_one_and_falls_towards_zero(
    rates_seen: list[list[float]], steps: int
) -> None:
    train(make_characters(), steps=steps)
    rates = [group[0] for group in rates_seen]
    assert len(rates) == steps
    assert max(rates) == pytest.approx(RATES.lr)
    peak = rates.index(max(rates))
    assert peak == steps // 20 - 1
    assert rates[0] == pytest.approx(RATES.lr / (steps // 20))
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < rates[-1] < 0.01 * RATES.lr
    assert rates[steps // 2] == pytest.approx(RATES.lr / 2, rel=0.1)


def test_rates_of_coefficients_stay_the_same_multiple(rates_seen: list[list[float]]) -> None:
    task = make_characters()
    module = make_module(task)
    rates = Rates(lr=0.01, weight_decay=0.0, coefficient_lr=5.0)
    fit(
        Training(
            module=module,
            task=task,
            steps=8,
            seed=0,
            rates=rates,
            coefficients=[module.tokens.weight],
        )
    )
    for *others, own in rates_seen:
        assert others == [pytest.approx(own / 5.0)] * len(others)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_matrices_and_coefficients_decay_and_vectors_do_not(optimizer: str) -> None:
    module = Mixed()
    rates = Rates(lr=0.1, weight_decay=0.5, coefficient_lr=3.0, coefficient_decay=0.2)
    step_with_gradient(module, rates, [module.coefficients], optimizer, 0.0)
    # Decay goes through the gradient of SGD and so through its momentum: 1 + 0.9 times.
    factor = 1.0 if optimizer == "adamw" else 1.9

    def share_left(parameter: Tensor) -> float:
        assert (parameter == parameter.flatten()[0]).all()
        return parameter.flatten()[0].item() / 2.0

    assert share_left(module.matrix) == pytest.approx(1 - factor * 0.1 * 0.5)
    assert share_left(module.vector) == 1.0
    assert share_left(module.coefficients) == pytest.approx(1 - factor * 0.1 * 3.0 * 0.2)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_coefficients_move_by_their_own_rate(optimizer: str) -> None:
    module = Mixed()
    rates = Rates(lr=0.01, weight_decay=0.0, coefficient_lr=5.0)
    step_with_gradient(module, rates, [module.coefficients], optimizer, 1.0)
    moved = {name: (2.0 - parameter).mean().item() for name, parameter in module.named_parameters()}
    assert moved["matrix"] == pytest.approx(moved["vector"], rel=1e-4)
    assert moved["coefficients"] == pytest.approx(5 * moved["matrix"], rel=1e-4)
    assert moved["matrix"] == pytest.approx(0.01 if optimizer == "adamw" else 0.019, rel=1e-4)


def step_with_gradient(
    module: nn.Module,
    rates: Rates,
    coefficients: list[nn.Parameter],
    optimizer: str,
    gradient: float,
) -> None:
    recipe = Recipe(steps=1, batch_size=1, optimizer=optimizer, lr=9.0, weight_decay=9.0)
    made = make_optimizer(module, recipe, rates, coefficients)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    made.step()


def test_each_parameter_is_in_one_group() -> None:
    module = make_module(make_characters())
    coefficients = [module.tokens.weight, module.norm.bias]
    made = make_optimizer(module, RECIPE, RATES, coefficients)
    parameters = [id(each) for group in made.param_groups for each in group["params"]]
    assert sorted(parameters) == sorted(map(id, module.parameters()))
    assert [id(each) for each in made.param_groups[-1]["params"]] == [*map(id, coefficients)]


def start_together(make: Callable[..., Task], device: str) -> list[Training]:
    """Three trainings of different lengths, seeds and rates; coefficients in the second."""
    trainings = []
    for number in range(3):
        task = make(device=device)
        module = make_module(task, seed=number).to(device)
        trainings.append(
            Training(
                module=module,
                task=task,
                steps=6 + 2 * number,
                seed=number,
                rates=Rates(lr=0.01 * (number + 1), weight_decay=0.1, coefficient_lr=3.0),
                coefficients=[module.head.weight] if number == 1 else (),
            )
        )
    return trainings


@pytest.mark.parametrize("make", [make_characters, make_cifar])
def test_trainings_that_take_turns_end_as_alone(make: Callable[..., Task]) -> None:
    together, alone = (start_together(make, "cpu") for _ in range(2))
    assert fit_together(together) == [None] * 3
    for one, other in zip(together, alone, strict=True):
        fit(other)
        assert is_same(one.module, other.module)


def test_one_that_diverges_stops_no_other() -> None:
    first, wild, last = start_together(make_characters, "cpu")
    wild = replace(wild, rates=Rates(lr=1e30, weight_decay=0.1))
    failures = fit_together([first, wild, last])
    assert [type(failure) for failure in failures] == [type(None), FloatingPointError, type(None)]
    (alone, *_) = start_together(make_characters, "cpu")
    fit(alone)
    assert is_same(first.module, alone.module)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("make", [make_characters, make_cifar])
def test_replayed_steps_on_a_gpu_are_those_of_a_cpu(make: Callable[..., Task]) -> None:
    on_cpu, on_gpu = (start_together(make, device) for device in ("cpu", "cuda"))
    assert fit_together(on_cpu) == fit_together(on_gpu) == [None] * 3
    for one, other in zip(on_cpu, on_gpu, strict=True):
        expected = one.module.state_dict()
        for name, tensor in other.module.state_dict().items():
            torch.testing.assert_close(tensor.cpu(), expected[name], rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("clip", [None, 0.01])
def test_gradients_are_clipped_together(clip: float | None) -> None:
    task = make_characters(optimizer="sgd", clip=clip)
    module = make_module(task)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    fit(
        Training(
            module=module,
            task=task,
            steps=1,
            seed=0,
            rates=Rates(lr=0.1, weight_decay=0.0),
            coefficients=[module.tokens.weight],
        )
    )
    moves = [p.detach() - old for p, old in zip(module.parameters(), before, strict=True)]
    length = torch.cat([move.flatten() for move in moves]).norm().item() / (0.1 * 1.9)
    if clip is None:
        assert length > 0.1
    else:
        assert length == pytest.approx(clip, rel=1e-3)


@pytest.mark.parametrize("steps", [4, 120])
def test_divergence_is_an_error_in_short_and_long_runs(steps: int) -> None:
    with pytest.raises(FloatingPointError, match="the loss is nan after"):
        train(make_characters(optimizer="sgd"), steps=steps, rates=Rates(lr=1e30, weight_decay=0.0))


@pytest.mark.parametrize("task", [make_characters(), make_cifar()], ids=["decoder", "batch norm"])
@pytest.mark.parametrize("is_training", [False, True])
def test_timing_changes_neither_module(task: Task, is_training: bool) -> None:
    modules = [make_module(task, seed).train(is_training) for seed in (0, 1)]
    before = copy.deepcopy(modules)
    assert compare_step_times(modules[0], modules[1], task) > 0
    for module, old in zip(modules, before, strict=True):
        assert is_same(module, old)
        assert module.training is is_training
        assert all(parameter.grad is None for parameter in module.parameters())


def test_network_that_waits_takes_a_multiple_of_the_time() -> None:
    class Waiting(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.03)
            made: Tensor = self.module(x)
            return made

    task = make_characters(depth=1)
    plain = make_module(task)
    assert compare_step_times(Waiting(plain), plain, task) > 1.5
    assert compare_step_times(plain, Waiting(plain), task) < 0.7


def test_steps_of_both_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_characters(depth=1)
    modules, calls = [make_module(task), make_module(task)], []
    for name, module in zip("ab", modules, strict=True):
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    clock = make_clock()
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(clock))
    assert compare_step_times(*modules, task) == 1.0
    assert calls == ["a", "b"] * (len(calls) // 2)
    assert len(calls) >= 10


def make_clock() -> Iterator[float]:
    """Each step takes a second."""
    now = 0.0
    while True:
        yield now
        now += 1.0
