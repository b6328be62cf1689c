"""The rules of ``transform`` on a small network: what it emits, and what stays plain."""

from __future__ import annotations

import torch
from torch import nn

from models import MODELS
from npas_fx import transform

WEIGHTS = ["stem.weight", "hidden.0.weight", "hidden.1.weight", "head.weight"]
BIASES = ["stem.bias", "hidden.0.bias", "hidden.1.bias", "head.bias"]


def make() -> nn.Module:
    return MODELS["mlp"].make()


def emit(budget=0.5, **rules) -> nn.Module:
    return transform(make(), budget, example_inputs=MODELS["mlp"].inputs(3), **rules)


def plain(shared: nn.Module) -> set[str]:
    """Names of the model's weights that are still parameters with their values."""
    before = dict(make().named_parameters())
    after = dict(shared.named_parameters())
    found = before.keys() & after.keys()
    assert all(torch.equal(before[name], after[name]) for name in found)
    return found & set(WEIGHTS)
