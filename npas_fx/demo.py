"""The demo: a small network trained plain, transformed and narrower, side by side."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from npas_fx.api import load, materialize, param_groups, save, transform
from npas_fx.examples.residual_cnn import ResidualCNN
from npas_fx.ir import Plan
from npas_fx.passes.emitted import EmittedModule, emission_of

WIDTH = 64
BATCH_SIZE = 64
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05
SMALL, LARGE = 25, 150  # budgets, in percent of the plain network
# Rounds in which each network takes one timed step; the first ones warm up and do not count.
TIMED_ROUNDS, WARM_UP_ROUNDS = 40, 5
# Of the largest output: a materialized network multiplies the same numbers, but torch may choose
# another convolution for weights that lie elsewhere in memory.
TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Digits:
    """Pictures ``(N, 1, 8, 8)`` with values from 0 to 1, and their labels ``(N,)``."""

    train_pictures: Tensor
    train_labels: Tensor
    test_pictures: Tensor
    test_labels: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """A network to train; ``budget`` is in parameters, None where it has none to fit."""

    name: str
    network: nn.Module
    budget: int | None = None

    @property
    def parameters(self) -> int:
        """Trainable parameters, each counted once."""
        return count_parameters(self.network)

    @property
    def plan(self) -> Plan | None:
        """None where the network is not transformed."""
        if isinstance(self.network, EmittedModule):
            return emission_of(self.network).plan
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What the demo found out about one network.

    Attributes:
        name: of the network.
        parameters: trainable ones, each counted once.
        budget: that it has to fit, in parameters; None for the plain network.
        accuracy: share of the test pictures that it gets right.
        step_time: of a training step, as a multiple of the plain network's.
        plan: None where the network is not transformed.
    """

    name: str
    parameters: int
    budget: int | None
    accuracy: float
    step_time: float
    plan: Plan | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """How a transformed network compares with its materialized and its reloaded self.

    Attributes:
        name: of the network.
        folder: that it was saved to.
        has_same_predictions: whether the materialized one says the same for all test pictures.
        difference: largest difference of an output of these two, as a share of the largest output.
        is_reloaded_equal: whether the network read back from the folder gives the same bits.
    """

    name: str
    folder: Path
    has_same_predictions: bool
    difference: float
    is_reloaded_equal: bool

    @property
    def is_passed(self) -> bool:
        """Whether all is as it should be."""
        is_close = self.difference <= TOLERANCE
        return self.has_same_predictions and is_close and self.is_reloaded_equal

    def __str__(self) -> str:
        predictions = "the same predictions" if self.has_same_predictions else "OTHER PREDICTIONS"
        outputs = "equal" if self.difference <= TOLERANCE else "NOT EQUAL"
        reloaded = "the same outputs" if self.is_reloaded_equal else "OTHER OUTPUTS"
        return (
            f"{self.name}: materialized, it gives {predictions}; outputs are {outputs} within "
            f"{TOLERANCE:g} of the largest (difference {self.difference:.1g})\n"
            f"  plan and weights are in {self.folder}; loaded back, they give {reloaded}"
        )


def run_demo(
    folder: Path, *, steps: int, seed: int, console: Console | None = None
) -> tuple[tuple[Row, ...], tuple[Check, ...]]:
    """Train four networks for the same steps, compare them, and save the transformed ones.

    Args:
        folder: gets one folder for each transformed network.
        steps: training steps of each network.
        seed: of the first weights, the banks and the order of the pictures.
        console: to print on; by default the standard output.

    Raises:
        ModuleNotFoundError: scikit-learn, which the pictures come with, is not installed.
        OSError: the folder cannot be made.
    """
    console = Console() if console is None else console
    digits = load_digits()
    folder.mkdir(parents=True, exist_ok=True)  # fails before the training, not after it
    contestants = make_contestants(seed)
    _, small, *_ = contestants
    console.print(f"{small.plan}\n", markup=False, highlight=False, soft_wrap=True)
    with _one_thread():
        step_times = compare_step_times([each.network for each in contestants], digits)
        train_all(contestants, digits, steps, seed, console)
    rows = tuple(
        Row(
            name=each.name,
            parameters=each.parameters,
            budget=each.budget,
            accuracy=measure_accuracy(each.network, digits),
            step_time=step_time,
            plan=each.plan,
        )
        for each, step_time in zip(contestants, step_times, strict=True)
    )
    checks = tuple(
        check_network(each.name, each.network, folder / f"budget-{each.budget}", digits)
        for each in contestants
        if isinstance(each.network, EmittedModule)
    )
    console.print(make_table(rows))
    num_test = len(digits.test_labels)
    note = f"one seed ({seed}); one of {num_test} test pictures is {1 / num_test:.2%} of accuracy"
    for line in (note, *map(str, checks)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return rows, checks


def load_digits() -> Digits:
    """Load scikit-learn's digits, one half to train on and one to test on, always the same."""
    from sklearn import datasets, model_selection  # an extra; the rest of the package lacks it

    given = datasets.load_digits()
    split = model_selection.train_test_split(
        given.images, given.target, test_size=0.5, random_state=0, stratify=given.target
    )
    train_pictures, test_pictures, train_labels, test_labels = map(torch.from_numpy, split)
    return Digits(
        train_pictures=train_pictures.float().unsqueeze(1) / 16,
        train_labels=train_labels,
        test_pictures=test_pictures.float().unsqueeze(1) / 16,
        test_labels=test_labels,
    )


def make_contestants(seed: int) -> tuple[Contestant, ...]:
    """Make the plain network, the two transformed ones and the narrower plain one."""
    plain = make_network(WIDTH, seed)
    example = torch.zeros(2, 1, 8, 8)
    small, large = (
        transform(plain, f"{percent}%", example_inputs=example, seed=seed)
        for percent in (SMALL, LARGE)
    )
    small_budget, large_budget = (emission_of(each).plan.budget.amount for each in (small, large))
    width = find_width(small_budget)
    return (
        Contestant(name="plain", network=plain),
        Contestant(name=f"shared, {SMALL} %", network=small, budget=small_budget),
        Contestant(name=f"shared, {LARGE} %", network=large, budget=large_budget),
        Contestant(
            name=f"plain, width {width}", network=make_network(width, seed), budget=small_budget
        ),
    )


def make_network(width: int, seed: int) -> ResidualCNN:
    """Make a plain network with weights of its own; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResidualCNN(width)


def find_width(budget: int) -> int:
    """Find the largest width whose network has at most ``budget`` parameters."""
    width = 4
    with torch.device("meta"):
        while count_parameters(ResidualCNN(width + 1)) <= budget:
            width += 1
    return width


def count_parameters(network: nn.Module) -> int:
    """Count the trainable parameters, each once."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def make_optimizer(network: nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer that all networks are trained with."""
    if isinstance(network, EmittedModule):
        groups = param_groups(network, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        return torch.optim.AdamW(groups)
    return torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def take_step(
    network: nn.Module, optimizer: torch.optim.Optimizer, pictures: Tensor, labels: Tensor
) -> None:
    """Train on one batch."""
    optimizer.zero_grad()
    loss = functional.cross_entropy(network(pictures), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def compare_step_times(networks: Sequence[nn.Module], digits: Digits) -> list[float]:
    """Time a training step of each network, as a multiple of the first one's.

    All take one step in each round, so that whatever else the machine does hits all of them; of
    the ratios in each round the median counts. Copies are timed: the networks stay as they are.
    """
    copies = [copy.deepcopy(network).train() for network in networks]
    optimizers = [make_optimizer(network) for network in copies]
    pictures, labels = digits.train_pictures[:BATCH_SIZE], digits.train_labels[:BATCH_SIZE]
    rounds: list[list[float]] = []
    for _ in range(WARM_UP_ROUNDS + TIMED_ROUNDS):
        seconds = []
        for network, optimizer in zip(copies, optimizers, strict=True):
            start = time.perf_counter()
            take_step(network, optimizer, pictures, labels)
            seconds.append(time.perf_counter() - start)
        rounds.append([each / seconds[0] for each in seconds])
    return [statistics.median(ratios) for ratios in zip(*rounds[WARM_UP_ROUNDS:], strict=True)]


def train_all(
    contestants: Sequence[Contestant], digits: Digits, steps: int, seed: int, console: Console
) -> None:
    """Train one network after the other, with a progress bar each."""
    num_train = len(digits.train_labels)
    console.print(
        f"{num_train} pictures to train on, {steps} steps of {BATCH_SIZE} for each network",
        highlight=False,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        tasks = [progress.add_task(each.name, total=steps) for each in contestants]
        for task, each in zip(tasks, contestants, strict=True):
            for _ in train(each.network, digits, steps, seed):
                progress.advance(task)


@contextmanager
def _one_thread() -> Iterator[None]:
    # A second thread saves a network this small a third of its time where both cores are free
    # (22 -> 15 ms a step); where other programs run, the two wait for each other (a demo of 4
    # minutes in place of 1).
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def train(network: nn.Module, digits: Digits, steps: int, seed: int) -> Iterator[None]:
    """Train a network, the learning rate falling along a cosine; yields after each step."""
    network.train()
    optimizer = make_optimizer(network)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for batch in _batches(len(digits.train_labels), steps, seed):
        take_step(network, optimizer, digits.train_pictures[batch], digits.train_labels[batch])
        schedule.step()
        yield


def _batches(num_pictures: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Indices of full batches, shuffled anew each time that the pictures are used up."""
    random = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < BATCH_SIZE:
            order = torch.randperm(num_pictures, generator=random)
        batch, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
        yield batch


def predict(network: nn.Module, digits: Digits) -> Tensor:
    """Logits ``(N, 10)`` for the test pictures, in eval mode."""
    with torch.no_grad():
        logits: Tensor = network.eval()(digits.test_pictures)
    return logits


def measure_accuracy(network: nn.Module, digits: Digits) -> float:
    """Share of the test pictures that a network gets right."""
    hits = predict(network, digits).argmax(dim=1) == digits.test_labels
    return hits.float().mean().item()


def check_network(name: str, shared: EmittedModule, folder: Path, digits: Digits) -> Check:
    """Save a transformed network, load it back, materialize it, and compare what all three say."""
    save(shared, folder)
    with torch.device("meta"):
        architecture = ResidualCNN()
    reloaded = load(folder, architecture)
    logits = predict(shared, digits)
    plain_logits = predict(materialize(shared), digits)
    return Check(
        name=name,
        folder=folder,
        has_same_predictions=torch.equal(logits.argmax(dim=1), plain_logits.argmax(dim=1)),
        difference=((logits - plain_logits).abs().max() / logits.abs().max()).item(),
        is_reloaded_equal=torch.equal(logits, predict(reloaded, digits)),
    )


def make_table(rows: Sequence[Row]) -> Table:
    """Lay out what was found out about the networks."""
    table = Table()
    table.add_column("network")
    for header in ("parameters", "budget\nused", "test\naccuracy", "step time\nvs. plain"):
        table.add_column(header, justify="right")
    table.add_column("certificate\ngap", justify="right")
    for row in rows:
        certificate = row.plan.certificate if row.plan else None
        table.add_row(
            row.name,
            f"{row.parameters:,}",
            f"{row.parameters / row.budget:.2%}" if row.budget else "",
            f"{row.accuracy:.2%}",
            f"x {row.step_time:.2f}",
            f"{certificate.gap:.2%}" if certificate else "",
        )
    return table
