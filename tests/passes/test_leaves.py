"""A module that refers to weights behind torch's back is traced, not called."""

import torch
from torch import nn


def test_a_module_that_hides_weights_is_no_leaf(check):
    class Residual(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def forward(self, x):
            return x + self.function(x)

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def run(self, x):
            return self.linear(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()
            self.outer = Residual(self.inner.run)

        def forward(self, x):
            return self.inner.run(self.outer(x))

    emitted = check(Model(), torch.randn(3, 4))
    assert "inner.linear.weight" in {name for bank in emitted.plan.banks for name in bank.sites}
