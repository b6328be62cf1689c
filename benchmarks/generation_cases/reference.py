"""All weights of a model from banks, and site by site from one flat bank as the reference does.

Source of the latter: Plummer et al., Neural Parameter Allocation Search, section 3.1.1, and the
rule of its code by which a layer finds its window.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from generation_cases.banks import REFERENCE_TEMPLATES, Case, make_bank
from generation_cases.turns import Ratio, compare, take_turns
from npas_fx.generators.generator import Shapes
from npas_fx.ir import Size


class Window(NamedTuple):
    """What a site reads of the flat bank: so many templates, each as long as its weight."""

    start: int
    num_templates: int


def shapes_of(model: nn.Module) -> Shapes:
    """List the shapes of all weights in the model's order."""
    return [tuple(weight.shape) for weight in model.parameters() if weight.dim() > 1]


def windows_of_reference(shapes: Shapes) -> list[Window]:
    """Find what each site reads where all share one bank of the size of all weights.

    Shapes are visited from most common to least. Those of one window length follow one another,
    and start again where the bank ends.
    """
    bank_size = sum(map(math.prod, shapes))
    counts = Counter(shapes)
    order = sorted(range(len(shapes)), key=lambda site: -counts[shapes[site]])
    windows: dict[int, Window] = {}
    next_of: dict[int, int] = {}  # length of a window -> number of the next one
    offset = 0
    for site in order:
        numel = math.prod(shapes[site])
        number = min(bank_size // numel, REFERENCE_TEMPLATES)
        assert number, "upsampling is not reproduced"
        length = number * numel
        if length not in next_of:
            next_of[length] = math.ceil(offset / length)
            if next_of[length] >= number:
                next_of[length] = offset = 0
            else:
                offset += length
        if (next_of[length] + 1) * length > bank_size:
            next_of[length] = 0
        windows[site] = Window(next_of[length] * length, number)
        next_of[length] += 1
    return [windows[site] for site in range(len(shapes))]


def windows_of_classes(shapes: Shapes) -> list[Window]:
    """Let each site read all templates of its shape: those that our banks have."""
    starts: dict[tuple[int, ...], Window] = {}
    start = 0
    for shape, count in Counter(shapes).items():
        starts[shape] = Window(start, min(count, REFERENCE_TEMPLATES))
        start += starts[shape].num_templates * math.prod(shape)
    return [starts[shape] for shape in shapes]


class SiteBySite(nn.Module):
    """One flat bank; each weight is a sum of templates in it, times coefficients.

    Backward of each site's slice makes a tensor of the bank's size, zeros but for the slice.

    Args:
        shapes: of the weights.
        windows: what each reads. A window of one template is the weight, without a coefficient.
    """

    def __init__(self, shapes: Shapes, windows: Sequence[Window]) -> None:
        super().__init__()
        self.shapes, self.windows = shapes, windows
        self.bank = nn.Parameter(torch.randn(sum(map(math.prod, shapes))) / 50)
        self.coefficients = nn.ParameterList(
            torch.randn(window.num_templates) / math.sqrt(window.num_templates)
            for window in windows
        )

    def forward(self) -> list[Tensor]:
        """Generate all weights."""
        weights = []
        for shape, (start, number), coefficients in zip(
            self.shapes, self.windows, self.coefficients, strict=True
        ):
            templates = self.bank[start : start + number * math.prod(shape)].view(number, -1)
            if number > 1:
                templates = (coefficients[:, None] * templates).sum(0)
            weights.append(templates.view(shape))
        return weights


class InBanks(nn.Module):
    """A bank of ``wavg`` for each shape, of as many templates as weights, but of 8 at most."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.shapes = shapes
        self.banks = nn.ModuleList()
        for shape, count in Counter(shapes).items():
            size = Size(
                num_templates=min(count, REFERENCE_TEMPLATES), template_size=math.prod(shape)
            )
            case = Case(model="", shapes=(shape,) * count, generator="wavg", size=size)
            self.banks.append(make_bank(case))

    def forward(self) -> list[Tensor]:
        """Generate all weights, in the order of their shapes."""
        of_shape = {
            shape: iter(bank())
            for shape, bank in zip(Counter(self.shapes), self.banks, strict=True)
        }
        return [next(of_shape[shape]) for shape in self.shapes]


class Speed(NamedTuple):
    """CPU seconds of one way to generate all weights, and how much quicker our banks are."""

    seconds: float
    speedup: Ratio


WAYS = ("banks", "site by site", "windows of the reference")


def measure_all(shapes: Shapes, repeats: int) -> dict[str, dict[str, Speed]]:
    """Generate all weights in three ways in turn.

    Returns:
        ``"forward"`` or ``"both"``, which is with backward -> one of ``WAYS`` -> its speed.
    """
    own, by_reference = windows_of_classes(shapes), windows_of_reference(shapes)
    generators = (InBanks(shapes), SiteBySite(shapes, own), SiteBySite(shapes, by_reference))
    ways: dict[str, nn.Module] = dict(zip(WAYS, generators, strict=True))
    gradients = [torch.randn(shape) for shape in shapes]

    def step(way: nn.Module) -> None:
        torch.autograd.backward(way(), gradients)
        way.zero_grad()

    speeds = {}
    for kind, call in (("forward", nn.Module.__call__), ("both", step)):
        seconds = take_turns({name: partial(call, way) for name, way in ways.items()}, repeats)
        speeds[kind] = {
            name: Speed(median(seconds[name]), compare(seconds[name], seconds[WAYS[0]]))
            for name in WAYS
        }
    return speeds
