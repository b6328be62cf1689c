"""Two linear layers and what a test of capture adds to them."""

import torch
from torch import nn

from npas_fx.passes.capture import capture


class Model(nn.Module):
    """Two linear layers, and what a test adds."""

    def __init__(self, forward=None, **attributes):
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.b = nn.Linear(6, 4)
        self._forward = forward
        for name, value in attributes.items():
            setattr(self, name, value)

    def run(self, x):
        return self.b(self.a(x).relu())

    def forward(self, x):
        return self.run(x) if self._forward is None else self._forward(self, x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.b = nn.Linear(6, 4)
        self.register_buffer("count", torch.zeros(()))

    def pre(self, x):
        return self.a(x).relu()

    def run(self, x):
        return self.b(self.pre(x))


def net(forward, **attributes):
    model = type("Model", (Net,), {"forward": forward})()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def reasons(model):
    """Name of each parameter that stays -> why."""
    return {item.name: item.reason for item in capture(model).inventory.kept}


def names(model):
    """Names of the sites."""
    return [site.name for site in capture(model).inventory.sites]


def x(*shape):
    return torch.randn(*(shape or (3, 4)))
