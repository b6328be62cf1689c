"""Recurrent cells become functions of their weights, bit for bit, in all their forms."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

import npas_fx
from npas_fx.passes.lower import lower


@st.composite
def cells(draw):
    kind = draw(st.sampled_from((nn.LSTMCell, nn.GRUCell, nn.RNNCell)))
    options = {"bias": draw(st.booleans())}
    if kind is nn.RNNCell:
        options["nonlinearity"] = draw(st.sampled_from(("tanh", "relu")))
    return kind(3, 4, **options, dtype=draw(st.sampled_from((torch.float32, torch.float64))))


def lowered(cell, names):
    model, graph = nn.ModuleDict({"cell": cell}), fx.Graph()
    inputs = {name: graph.placeholder(name) for name in names}
    graph.output(graph.call_module("cell", (), inputs))
    made, stays = lower(graph, model)
    assert stays == {}
    return fx.GraphModule(model, made)


@given(cells(), st.sampled_from(((), (1,), (5,))), st.booleans())
def test_lowered_equals_the_module(cell, batch, has_state):
    dtype = cell.weight_ih.dtype
    inputs = {"input": torch.randn(*batch, 3, dtype=dtype)}
    if has_state:
        state = torch.randn(2, *batch, 4, dtype=dtype).unbind()
        inputs["hx"] = state if isinstance(cell, nn.LSTMCell) else state[0]
    expected, got = cell(**inputs), lowered(cell, inputs)(**inputs)
    assert type(got) is type(expected)
    is_pair = isinstance(got, tuple)
    for ours, theirs in zip(*((r if is_pair else [r]) for r in (got, expected)), strict=True):
        assert torch.equal(ours, theirs)
    results = (sum(r).sum() if is_pair else r.sum() for r in (got, expected))
    gradients = [torch.autograd.grad(result, list(cell.parameters())) for result in results]
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_what_the_module_refuses_is_refused(kind):
    cell, value = kind(3, 4), torch.randn(2, 2, 3)
    state = torch.randn(2, 2, 2, 4)
    for inputs in ({"input": value}, {"input": value[0], "hx": state}):
        for run in (cell, lowered(cell, inputs)):
            with pytest.raises(ValueError, match="1"):
                run(**inputs)


class Decoder(nn.Module):
    """Steps over a sequence, as decoders of old do."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.second, self.head = kind(6, 8), kind(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        first = second = None
        made = []
        for step in x.unbind(1):
            first = self.first(step, first)
            second = self.second(first[0] if isinstance(first, tuple) else first, second)
            made.append(self.head(second[0] if isinstance(second, tuple) else second))
        return torch.stack(made, 1)


KINDS = pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])


@KINDS
def test_a_loop_over_steps_is_traced(kind, check):
    value = torch.randn(2, 5, 6)
    emitted = check(Decoder(kind), value, others=[(torch.randn(4, 5, 6),)])
    assert npas_fx.inspect(Decoder(kind), example_inputs=value).opaque == ()
    copied = copy.deepcopy(emitted).eval()
    assert torch.equal(copied(value), emitted.eval()(value))


@KINDS
def test_cells_have_their_kind_and_a_role(kind):
    inventory = npas_fx.inspect(Decoder(kind), example_inputs=torch.randn(2, 5, 6))
    sites = {site.name: site for site in inventory.sites}
    assert {sites[f"{c}.weight_{w}"].kind for c in ("first", "second") for w in ("ih", "hh")} == {
        "recurrent"
    }
    assert sites["head.weight"].role == "head"
    assert sites["first.weight_ih"].depth < sites["head.weight"].depth


@KINDS
def test_autocast_around_the_call_is_obeyed(kind):
    model, value = Decoder(kind), torch.randn(2, 5, 6)
    emitted = npas_fx.transform(model, 0.5, example_inputs=value)
    plain = npas_fx.materialize(emitted)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = emitted(value), plain(value)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)


@KINDS
def test_compiling_breaks_no_graph(kind):
    model, value = Decoder(kind).eval(), torch.randn(2, 5, 6)
    emitted = npas_fx.transform(model, 0.5, example_inputs=value).eval()
    compiled = torch.compile(emitted, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(value), emitted(value))
