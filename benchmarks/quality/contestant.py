"""What a method is given, and the network that it hands in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import npas_fx
from npas_fx.ir import Site
from quality.tasks import Task
from quality.training import Rates


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """A network to train.

    Attributes:
        module: the network.
        coefficients: parameters of it that mix others.
        generation_flops: to make all weights once.
        plan: see ``describe_plan``; empty where there is none.
    """

    module: nn.Module
    coefficients: tuple[nn.Parameter, ...] = ()
    generation_flops: int = 0
    plan: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What a method is given.

    Attributes:
        task: it makes networks of other widths and depths.
        model: the plain network.
        budget: trainable parameters, a number.
        seed: of all that is drawn.
        steps: that the network will be trained for.
        rates: that it will be trained with.
        options: of the run.
    """

    task: Task
    model: nn.Module
    budget: int
    seed: int
    steps: int
    rates: Rates
    options: Mapping[str, Any]


Method = Callable[[Assignment], Contestant]


def count_parameters(module: nn.Module) -> int:
    """Count trainable parameters, each once."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def count_others(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Count trainable parameters but those of the given names."""
    return count_parameters(model) - sum(map(math.prod, shapes.values()))


def find_matrices(model: nn.Module) -> list[Site]:
    """Weights that a layer multiplies with, and no embedding."""
    return [
        site
        for site in npas_fx.inspect(model).sites
        if len(site.shape) > 1 and site.kind in ("linear", "conv")
    ]


def make_network(given: Assignment, width: int, depth: int) -> nn.Module:
    """A plain network of the task, from the assignment's seed."""
    torch.manual_seed(given.seed)
    return given.task.make(width, depth)
