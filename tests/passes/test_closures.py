"""A copy of a module whose hooks and lambdas hold on to it is independent of the original."""

import copy

import pytest
import torch
from torch import nn

import npas_fx
from npas_fx.passes.skeleton import clone, copy_with


class Features(nn.Module):
    """Hooks write into a dict of the module, as code that extracts features does."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(16, 2)
        self.features = {}
        for name in ("1", "3"):
            self.body.get_submodule(name).register_forward_hook(self.save(name))

    def save(self, name):
        def hook(module, args, output):
            self.features[name] = output

        return hook

    def forward(self, x):
        self.body(x)
        return self.head(torch.cat([self.features["1"], self.features["3"]], -1))


class Lambdas(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.rand(4, 4))
        method = self.twice
        self.steps = [lambda x: x @ self.scale, lambda x, own=self: own.b(x)]
        self.step = lambda x: method(self.a(x))
        outer = self.step
        self.decorated = lambda x: outer(x) + 1

    def twice(self, x):
        return 2 * x * self.scale.sum()

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return self.decorated(x)


@pytest.mark.parametrize("kind", [Features, Lambdas])
def test_a_copy_does_not_touch_the_original(kind):
    model = kind()
    copied = copy_with(model, lambda _, tensor: clone(tensor) + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    expected = kind()
    expected.load_state_dict(copied.state_dict())
    x = torch.rand(3, 4)
    assert torch.equal(copied(x), expected(x))
    assert not getattr(model, "features", {})


@pytest.mark.parametrize("emit", ["graph", "module"])
@pytest.mark.parametrize("kind", [Features, Lambdas])
def test_the_emitted_module_and_its_copies_hold_on_to_themselves(kind, emit):
    model, x = kind(), torch.rand(3, 4)
    shared = npas_fx.transform(model, 0.9, example_inputs=x, emit=emit)
    assert not getattr(model, "features", {})
    copied = copy.deepcopy(shared)
    for rows in (1, 5):
        x = torch.rand(rows, 4)
        expected = npas_fx.materialize(shared)(x)
        assert torch.allclose(shared(x), expected)
        with torch.no_grad():
            for parameter in shared.parameters():
                parameter += 0.1
        assert torch.allclose(copied(x), npas_fx.materialize(copied)(x))
        assert torch.allclose(shared(x), npas_fx.materialize(shared)(x))
