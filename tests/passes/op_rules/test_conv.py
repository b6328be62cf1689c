"""A lowered convolution computes what its module computes, whatever its padding."""

import warnings

import pytest
import torch
from torch import fx, nn

from npas_fx.passes.lower import lower

SETTINGS = [
    {},
    {"bias": False},
    {"padding": 2},
    {"padding": 1, "stride": 2},
    {"padding": 2, "dilation": 2},
    {"groups": 2},
    {"groups": 4, "out_channels": 8},
    {"padding": "same"},
    {"padding": "same", "dilation": 2, "kernel_size": 2},
    {"padding": "valid"},
    *({"padding": 1, "padding_mode": mode} for mode in ("circular", "reflect", "replicate")),
    {"padding": "same", "padding_mode": "circular", "kernel_size": 2},
    {"padding": 2, "padding_mode": "reflect", "stride": 2, "groups": 2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolution_is_bit_equal(rank, settings):
    torch.manual_seed(0)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    model = nn.Sequential(kind(4, **{"out_channels": 6, "kernel_size": 3, **settings}))
    graph, stays = lower(fx.symbolic_trace(model).graph, model)
    assert stays == {}
    assert not [node for node in graph.nodes if node.op == "call_module"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # even kernels with "same" are padded by a copy
        for batch in (2, 3):
            x = torch.randn(batch, 4, *(7, 6, 5)[:rank])
            assert torch.equal(fx.GraphModule(model, graph)(x), model(x))
        x = torch.randn(4, *(7, 6, 5)[:rank])  # without a batch
        assert torch.equal(fx.GraphModule(model, graph)(x), model(x))


def test_pairs_of_padding_and_stride():
    model = nn.Sequential(
        nn.Conv2d(2, 3, (3, 5), stride=(2, 1), padding=(1, 2), padding_mode="circular")
    )
    graph, _ = lower(fx.symbolic_trace(model).graph, model)
    x = torch.randn(1, 2, 8, 9)
    assert torch.equal(fx.GraphModule(model, graph)(x), model(x))
