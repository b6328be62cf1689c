"""Transposed convolutions become functions of their weight, bit for bit, in all their forms."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

from npas_fx.passes.lower import lower
from npas_fx.passes.opaque import call_opaque

KINDS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@st.composite
def layers(draw):
    dims = draw(st.sampled_from((1, 2, 3)))
    groups, stride = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    layer = KINDS[dims - 1](
        2 * groups,
        draw(st.integers(1, 2)) * groups,
        draw(st.integers(1, 3)),
        stride=stride,
        padding=draw(st.integers(0, 1)),
        output_padding=draw(st.integers(0, stride - 1)),
        dilation=draw(st.integers(stride, 3)),
        groups=groups,
        bias=draw(st.booleans()),
    )
    return layer, torch.randn(2, 2 * groups, *(5,) * dims)


@given(layers())
def test_lowered_equals_the_module(drawn):
    layer, value = drawn
    model = nn.Sequential(layer)
    graph, stays = lower(fx.symbolic_trace(model).graph, model)
    assert stays == {}
    assert torch.equal(fx.GraphModule(model, graph)(value), layer(value))


@pytest.mark.parametrize("by_name", [False, True])
def test_an_output_size_makes_an_opaque_call(by_name):
    model = nn.Sequential(nn.ConvTranspose1d(2, 3, 3, stride=2))
    graph = fx.Graph()
    value = graph.placeholder("x")
    args, kwargs = ((value,), {"output_size": [12]}) if by_name else ((value, [12]), {})
    graph.output(graph.call_module("0", args, kwargs))
    lowered, stays = lower(graph, model)
    assert stays == {"0": "ConvTranspose1d with an output size"}
    assert any(node.target is call_opaque for node in lowered.nodes)
    x = torch.randn(1, 2, 5)
    assert torch.equal(fx.GraphModule(model, lowered)(x), model[0](x, [12]))
