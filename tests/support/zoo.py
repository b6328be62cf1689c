"""Twelve families of timm, whole, with random weights and small pictures."""

from __future__ import annotations

import torchvision_ops as _before_timm  # isort: skip  # noqa: F401

from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from models import Example

# Name of the model -> width of its square pictures.
SIZES = {
    "resnet18": 48,
    "resnet50": 48,
    "mobilenetv3_small_100": 64,
    "vit_tiny_patch16_224": 64,
    "convnext_atto": 64,
    "densenet121": 48,
    "efficientnet_b0": 48,
    "regnety_002": 64,
    "swin_tiny_patch4_window7_224": 56,
    "xcit_nano_12_p16_224": 64,
    "hrnet_w18_small": 64,
    "mixer_s32_224": 64,
}
# Those that take longest to capture.
LARGE = {*SIZES} - {"resnet18", "mobilenetv3_small_100", "vit_tiny_patch16_224", "convnext_atto"}
FIXED_SIZE = ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s32_224")


def make(name: str) -> nn.Module:
    """Build a model for pictures of its size, with random weights."""
    size = {"img_size": SIZES[name]} if name in FIXED_SIZE else {}
    return timm.create_model(name, pretrained=False, **size)


def draw(name: str, batch_size: int) -> tuple[Tensor]:
    """Draw a batch of pictures."""
    return (torch.randn(batch_size, 3, SIZES[name], SIZES[name]),)


ZOO = {name: Example(partial(make, name), partial(draw, name)) for name in SIZES}


def large_at_night(names: Iterable[Any]) -> list[Any]:
    """Mark large networks as slow, among names or tuples that start with one."""
    marked = []
    for given in names:
        values = given if isinstance(given, tuple) else (given,)
        marks = [pytest.mark.slow] if values[0] in LARGE else []
        marked.append(pytest.param(*values, marks=marks))
    return marked
