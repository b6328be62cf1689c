"""Tasks of networks as small as they get, with made-up data, for methods that make networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from quality.contestant import Assignment, count_parameters
from quality.data import Pictures, Text
from quality.tasks import Characters, Cifar, Recipe, Task
from quality.training import Rates

NUM_TOKENS = 11
STEPS = 20


def make_characters(num_heads: int = 4) -> Characters:
    """10,219 parameters in 3 blocks; as many widths as heads fit into 16."""
    random = torch.Generator().manual_seed(0)
    numbers = torch.randint(NUM_TOKENS, (200,), generator=random)
    return Characters(
        recipe=Recipe(steps=STEPS, batch_size=4, optimizer="adamw", lr=1e-3, weight_decay=0.1),
        text=Text(num_tokens=NUM_TOKENS, splits=dict.fromkeys(("train", "valid", "test"), numbers)),
        width=16,
        depth=3,
        num_heads=num_heads,
        context=8,
    )


def make_pictures() -> Cifar:
    """A wide residual network of 10 layers and 4, 8 and 16 channels, with batch norm."""
    random = torch.Generator().manual_seed(0)
    shown = torch.randint(256, (16, 3, 32, 32), generator=random, dtype=torch.uint8)
    labels = torch.randint(10, (16,), generator=random)
    return Cifar(
        recipe=Recipe(steps=STEPS, batch_size=4, optimizer="sgd", lr=0.1, weight_decay=5e-4),
        pictures=Pictures(
            splits=dict.fromkeys(("train", "valid", "test"), (shown, labels)),
            mean=torch.full((3,), 0.5),
            std=torch.full((3,), 0.25),
        ),
        network="wide_resnet",
        width=16,
        depth=10,
    )


TASKS: Mapping[str, Task] = {"characters": make_characters(), "pictures": make_pictures()}


def make_model(task: Task, seed: int = 0) -> nn.Module:
    """The task's plain network."""
    torch.manual_seed(seed)
    return task.make(task.width, task.depth)


def assign(task: Task, model: nn.Module, share: float, seed: int = 0, **options: Any) -> Assignment:
    """An assignment with a budget of ``share`` of the plain network's parameters."""
    return Assignment(
        task=task,
        model=model,
        budget=round(share * count_parameters(model)),
        seed=seed,
        steps=STEPS,
        rates=Rates(lr=task.recipe.lr, weight_decay=task.recipe.weight_decay),
        options=options,
    )
