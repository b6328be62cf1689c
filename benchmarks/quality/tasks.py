"""The tasks: what is trained on what, how long, and how it is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from npas_fx.examples.wide_resnet import WideResNet
from quality.data import Pictures, Text, read_pictures, read_text
from quality.models import CifarResNet, Decoder

Batch = tuple[Tensor, Tensor]
Drawn = tuple[Tensor, ...]

# For what is read again and again, if the user names no other place.
CACHE_DIR = Path(gettempdir()) / "npas_fx_quality"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How all networks of a task are trained.

    Attributes:
        steps: of the optimizer; a run may take others.
        batch_size: sequences or pictures in a step.
        optimizer: ``adamw`` (momenta 0.9 and 0.99) or ``sgd`` (Nesterov momentum 0.9).
        lr: largest learning rate; a linear warm-up of a twentieth of the steps leads to it, half a
            cosine away from it to zero.
        weight_decay: of tensors with two dimensions and more, coefficients aside.
        clip: largest norm of the gradient; None for any.
        autocast: whether products are computed in bfloat16.
        compiles: whether ``torch.compile`` is used.
        device: to train on.
    """

    steps: int
    batch_size: int
    optimizer: Literal["adamw", "sgd"]
    lr: float
    weight_decay: float
    clip: float | None = None
    autocast: bool = False
    compiles: bool = False
    device: str = "cpu"


class Task(Protocol):
    """A plain network and the data that it is trained on.

    Attributes:
        recipe: how it is trained.
        width: of the plain network, in the units of ``widths``.
        depth: of the plain network.
        widths: that a network of the task may have, increasing, up to ``width``.
        depths: likewise.
    """

    @property
    def recipe(self) -> Recipe: ...  # noqa: D102

    @property
    def width(self) -> int: ...  # noqa: D102

    @property
    def depth(self) -> int: ...  # noqa: D102

    @property
    def widths(self) -> Sequence[int]: ...  # noqa: D102

    @property
    def depths(self) -> Sequence[int]: ...  # noqa: D102

    def make(self, width: int, depth: int) -> nn.Module:
        """Make a plain network with the default generator of random numbers."""

    def draw(self, steps: int, seed: int) -> Iterator[Drawn]:
        """Draw on the CPU what each batch is made from; all of one shape."""

    def make_batch(self, drawn: Drawn) -> Batch:
        """Make a batch on the task's device from what was drawn, which is there too."""

    def score(self, module: nn.Module, split: str) -> tuple[float, float]:
        """Measure mean cross entropy in nats and accuracy, in eval mode."""


@dataclass(frozen=True, kw_only=True)
class Characters:
    """Say the next character of a text."""

    recipe: Recipe
    text: Text
    width: int
    depth: int
    num_heads: int
    context: int

    @property
    def widths(self) -> Sequence[int]:
        """Multiples of the number of heads."""
        return range(self.num_heads, self.width + 1, self.num_heads)

    @property
    def depths(self) -> Sequence[int]:
        """Numbers of blocks."""
        return range(1, self.depth + 1)

    def make(self, width: int, depth: int) -> nn.Module:
        """Make a decoder."""
        return Decoder(
            self.text.num_tokens,
            width=width,
            depth=depth,
            num_heads=self.num_heads,
            context=self.context,
        )

    @cached_property
    def _train(self) -> Tensor:
        return self.text.splits["train"].to(self.recipe.device)

    def draw(self, steps: int, seed: int) -> Iterator[Drawn]:
        """Draw random places in the training text."""
        random = torch.Generator().manual_seed(seed)
        last = len(self._train) - self.context
        for _ in range(steps):
            yield (torch.randint(last, (self.recipe.batch_size, 1), generator=random),)

    def make_batch(self, drawn: Drawn) -> Batch:
        """Cut out the pieces that start there."""
        (starts,) = drawn
        pieces = self._train[starts + torch.arange(self.context + 1, device=starts.device)]
        return pieces[:, :-1], pieces[:, 1:]

    def score(self, module: nn.Module, split: str) -> tuple[float, float]:
        """Read the whole split in pieces that follow each other, each without what came before."""
        numbers = self.text.splits[split].to(self.recipe.device)
        count = (len(numbers) - 1) // self.context
        inputs = numbers[: count * self.context].view(count, -1)
        wanted = numbers[1 : count * self.context + 1].view(count, -1)
        size = 4 * self.recipe.batch_size
        pairs = zip(torch.split(inputs, size), torch.split(wanted, size), strict=True)
        return _score(module, pairs, self.recipe)


@dataclass(frozen=True, kw_only=True)
class Cifar:
    """Say which of ten things a picture shows."""

    recipe: Recipe
    pictures: Pictures
    network: Literal["wide_resnet", "resnet"]
    width: int
    depth: int

    @property
    def widths(self) -> Sequence[int]:
        """Channels of the first stage; those of a wide one in quarters."""
        one_channel = WIDTH_UNIT // 16 if self.network == "wide_resnet" else 1
        return range(one_channel, self.width + 1)

    @property
    def depths(self) -> Sequence[int]:
        """Numbers of layers."""
        return range(10 if self.network == "wide_resnet" else 8, self.depth + 1, 6)

    def make(self, width: int, depth: int) -> nn.Module:
        """Make a residual network whose memory lies as convolutions like it."""
        made: nn.Module
        if self.network == "wide_resnet":
            made = WideResNet(depth, width / WIDTH_UNIT)
        else:
            made = CifarResNet(depth, width)
        made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return made

    @cached_property
    def _train(self) -> tuple[Tensor, Tensor]:
        """Pictures with a rim of 4 pixels, and labels."""
        pictures, labels = (
            tensor.to(self.recipe.device) for tensor in self.pictures.splits["train"]
        )
        return functional.pad(pictures, (4, 4, 4, 4)), labels

    def draw(self, steps: int, seed: int) -> Iterator[Drawn]:
        """Draw pictures epoch by epoch, shifts by up to 4 pixels, and which to mirror."""
        random = torch.Generator().manual_seed(seed)
        size = self.recipe.batch_size
        order = torch.empty(0, dtype=torch.long)
        for _ in range(steps):
            if len(order) < size:
                order = torch.randperm(len(self._train[1]), generator=random)
            chosen, order = order[:size], order[size:]
            shift = torch.randint(9, (2, size, 1), generator=random)
            yield chosen, shift, torch.rand(size, 1, generator=random) < 0.5

    def make_batch(self, drawn: Drawn) -> Batch:
        """Cut the shifted, perhaps mirrored pictures out of the padded ones."""
        chosen, shift, is_mirrored = drawn
        padded, labels = self._train
        rows = torch.arange(32, device=padded.device)
        columns = torch.where(is_mirrored, rows.flip(0), rows) + shift[1]
        cut = padded[chosen[:, None, None], :, (rows + shift[0])[:, :, None], columns[:, None]]
        return self._normalize(cut.permute(0, 3, 1, 2)), labels[chosen]

    def score(self, module: nn.Module, split: str) -> tuple[float, float]:
        """Look at all pictures of the split as they are."""
        pictures, labels = self.pictures.splits[split]
        size = 4 * self.recipe.batch_size
        pairs = (
            (self._normalize(part.to(self.recipe.device)), wanted.to(self.recipe.device))
            for part, wanted in zip(
                torch.split(pictures, size), torch.split(labels, size), strict=True
            )
        )
        return _score(module, pairs, self.recipe)

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        mean, std = (
            moment.to(self.recipe.device) for moment in (self.pictures.mean, self.pictures.std)
        )
        return mean[:, None, None], std[:, None, None]

    def _normalize(self, pictures: Tensor) -> Tensor:
        mean, std = self._moments
        scaled = (pictures.float() / 255 - mean) / std
        return scaled.contiguous(memory_format=torch.channels_last)


# Of a wide residual network: its width in Cifar.width for each 16 channels of its first stage.
WIDTH_UNIT = 64


def iterate_batches(task: Task, steps: int, seed: int) -> Iterator[Batch]:
    """Draw and make batches to train on, one by one."""
    for drawn in task.draw(steps, seed):
        yield task.make_batch(tuple(tensor.to(task.recipe.device) for tensor in drawn))


def compute_loss(module: Callable[..., Tensor], batch: Batch, recipe: Recipe) -> Tensor:
    """Mean cross entropy in nats of what ``module`` says about a batch."""
    inputs, wanted = batch
    with torch.autocast(torch.device(recipe.device).type, torch.bfloat16, enabled=recipe.autocast):
        logits = module(inputs)
    return functional.cross_entropy(logits.float().flatten(0, -2), wanted.flatten())


def read_task(
    name: str, setting: str, data_dir: Path, cache_dir: Path, device: str | None = None
) -> Task:
    """Make a task of a setting, on its recipe's device or another.

    Raises:
        KeyError: there is no such task or setting.
        DataError: its data is not there.
    """
    chosen = dict(_SETTINGS[name][setting])
    if device is not None:
        chosen["recipe"] = replace(chosen["recipe"], device=device)
    if name == "characters":
        return Characters(text=read_text(data_dir), **chosen)
    pictures = read_pictures(data_dir, cache_dir, num_train=_NUM_TRAIN.get(setting))
    return Cifar(pictures=pictures, **chosen)


def find_recipe(name: str, setting: str) -> Recipe:
    """How networks of a task are trained in a setting."""
    recipe: Recipe = _SETTINGS[name][setting]["recipe"]
    return recipe


_ADAMW = Recipe(
    steps=1000,
    batch_size=16,
    optimizer="adamw",
    lr=6e-3,
    weight_decay=0.1,
    clip=1.0,
    autocast=True,
)
_FULL_ADAMW = replace(_ADAMW, steps=5000, batch_size=64, lr=1e-3, compiles=True, device="cuda")
_SGD = Recipe(steps=780, batch_size=128, optimizer="sgd", lr=0.1, weight_decay=5e-4, autocast=True)
_FULL_SGD = replace(_SGD, steps=35_000, compiles=True, device="cuda")

# Task -> setting -> what its class takes beside the data.
_SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "characters": {
        "small": {"width": 128, "depth": 8, "num_heads": 4, "context": 64, "recipe": _ADAMW},
        "full": {"width": 384, "depth": 6, "num_heads": 6, "context": 256, "recipe": _FULL_ADAMW},
    },
    "cifar": {
        "small": {"network": "wide_resnet", "width": 64, "depth": 16, "recipe": _SGD},
        "wide": {"network": "wide_resnet", "width": 256, "depth": 16, "recipe": _FULL_SGD},
        "resnet": {"network": "resnet", "width": 16, "depth": 20, "recipe": _FULL_SGD},
    },
}
_NUM_TRAIN = {"small": 10_000}  # training pictures; all of them in the other settings


@torch.no_grad()
def _score(module: nn.Module, pairs: Iterator[Batch], recipe: Recipe) -> tuple[float, float]:
    was_training = module.training
    module.eval()
    loss, hits, count = 0.0, 0, 0
    device = torch.device(recipe.device).type
    for inputs, wanted in pairs:
        with torch.autocast(device, torch.bfloat16, enabled=recipe.autocast):
            logits = module(inputs)
        logits, wanted = logits.float().flatten(0, -2), wanted.flatten()
        loss += functional.cross_entropy(logits, wanted, reduction="sum").item()
        hits += int((logits.argmax(-1) == wanted).sum())
        count += len(wanted)
    module.train(was_training)
    return loss / count, hits / count
