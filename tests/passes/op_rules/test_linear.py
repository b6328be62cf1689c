"""A lowered linear layer computes what its module computes."""

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from npas_fx.passes.lower import lower


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("by_name", [True, False])
def test_linear_is_bit_equal(bias, by_name):
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 5, bias=bias)

        def forward(self, x):
            return self.fc(input=x) if by_name else self.fc(x)

    model = Model()
    graph, stays = lower(fx.symbolic_trace(model).graph, model)
    assert stays == {}
    assert [node.target for node in graph.nodes if node.op == "get_attr"] == (
        ["fc.weight", "fc.bias"] if bias else ["fc.weight"]
    )
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [functional.linear]
    x = torch.randn(2, 7, 3)
    assert torch.equal(fx.GraphModule(model, graph)(x), model(x))
