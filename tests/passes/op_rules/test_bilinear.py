"""A lowered bilinear module computes what the module computes."""

import pytest
import torch
from torch import nn

import npas_fx


class Scorer(nn.Module):
    def __init__(self, *sizes, bias=True):
        super().__init__()
        self.score, self.head = nn.Bilinear(*sizes, bias=bias), nn.Linear(sizes[2], 4)

    def forward(self, x, y):
        return self.head(self.score(x, input2=y))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3,), (2, 3), ()], ids=str)
def test_bilinear_is_as_the_module(bias, shape, check):
    values = torch.randn(*shape, 5), torch.randn(*shape, 6)
    others = [(torch.randn(4, *shape[1:], 5), torch.randn(4, *shape[1:], 6))] if shape else []
    check(Scorer(5, 6, 4, bias=bias), *values, others=others)
    check(Scorer(5, 6, 4, bias=bias).double(), *(value.double() for value in values))


def test_bilinear_weights_are_sites_that_no_call_applies():
    model = Scorer(5, 6, 4)
    inventory = npas_fx.inspect(model, example_inputs=(torch.randn(2, 5), torch.randn(2, 6)))
    assert inventory.opaque == ()
    site = inventory.sites[0]
    assert (site.name, site.kind, site.shape) == ("score.weight", "linear", (4, 5, 6))


def test_autocast_around_the_call_is_obeyed():
    model, values = Scorer(5, 6, 4), (torch.randn(2, 5), torch.randn(2, 6))
    emitted = npas_fx.transform(model, 1.0, example_inputs=values)
    plain = npas_fx.materialize(emitted)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = emitted(*values), plain(*values)
    assert got.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(got, expected)
