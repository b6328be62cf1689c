"""Types of traced values are those of real ones, and are found in one pass over the graph."""

import torch
from torch import nn

import npas_fx


class Residual(nn.Module):
    """Each value is used twice, and no module is called in between."""

    def __init__(self, num_layers):
        super().__init__()
        self.weights = nn.ParameterList(
            nn.Parameter(0.1 * torch.randn(4, 4)) for _ in range(num_layers)
        )

    def forward(self, x):
        for weight in self.weights:
            x = x + x @ weight
        return x.tanh()


def test_a_type_is_found_once_for_each_value(check):
    # With a search anew for each use, 60 layers would take 2 ** 60 steps.
    inventory = npas_fx.inspect(Residual(60), example_inputs=torch.randn(2, 4))
    assert not inventory.opaque
    check(Residual(8), torch.randn(2, 4))


class Long(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.first(x)
        for _ in range(1200):
            x = x * 0.999
        return self.second(x.tanh())


def test_a_chain_may_be_longer_than_python_recurses():
    assert not npas_fx.inspect(Long(), example_inputs=torch.randn(2, 4)).opaque


class Gets(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, batch):
        y = self.fc(batch["x"])
        mask = batch.get("mask")
        return y if mask is None else y * mask


def test_what_a_method_of_a_dict_gives_is_no_tensor_for_sure(check):
    x = torch.randn(2, 4)
    for batch in ({"x": x}, {"x": x, "mask": None}, {"x": x, "mask": torch.rand(2, 4)}):
        assert not npas_fx.inspect(Gets(), example_inputs=(batch,)).opaque
        check(Gets(), batch)
