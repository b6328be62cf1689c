"""A lowered embedding computes what its module computes; what changes its weight stays a call."""

import pytest
import torch
from torch import fx, nn

from npas_fx.passes.lower import lower


@pytest.mark.parametrize(
    "settings", [{}, {"scale_grad_by_freq": True}, {"padding_idx": 4}, {"padding_idx": -1}], ids=str
)
def test_embedding_is_bit_equal_with_its_gradient(settings):
    model = nn.Sequential(nn.Embedding(7, 3, **settings))
    graph, stays = lower(fx.symbolic_trace(model).graph, model)
    assert stays == {}
    ids = torch.tensor([[1, 1, 1], [4, 0, 6]])
    lowered = fx.GraphModule(model, graph)
    assert torch.equal(lowered(ids), model(ids))
    gradients = [torch.autograd.grad(m(ids).sum(), model.parameters())[0] for m in (lowered, model)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_norm": 1.0}, "max_norm"),
        ({"sparse": True}, "sparse gradients"),
    ],
    ids=str,
)
def test_embedding_that_stays_a_call_says_why(settings, reason, check):
    model = nn.Sequential(nn.Embedding(7, 4, **settings), nn.Linear(4, 4))
    _, stays = lower(fx.symbolic_trace(model).graph, model)
    assert reason in stays["0"]
    if "sparse" not in settings:
        check(model, torch.tensor([[1, 1, 1], [4, 0, 6]]))
