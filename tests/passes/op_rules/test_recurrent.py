"""Recurrent modules become functions of their weights, bit for bit, in all their forms."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import npas_fx
from npas_fx.passes.lower import lower


@st.composite
def modules(draw):
    kind = draw(st.sampled_from((nn.LSTM, nn.GRU, nn.RNN)))
    options = {
        "num_layers": draw(st.integers(1, 2)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
    }
    if options["num_layers"] > 1:
        options["dropout"] = draw(st.sampled_from((0.0, 0.5)))
    if kind is nn.LSTM:
        options["proj_size"] = draw(st.sampled_from((0, 2)))
    if kind is nn.RNN:
        options["nonlinearity"] = draw(st.sampled_from(("tanh", "relu")))
    return kind(3, 4, **options)


def states(module, batch):
    rows = module.num_layers * (2 if module.bidirectional else 1)
    shape = (rows, batch) if batch else (rows,)
    first = torch.randn(*shape, module.proj_size or 4)
    return (first, torch.randn(*shape, 4)) if isinstance(module, nn.LSTM) else first


def flat(value):
    if isinstance(value, PackedSequence):
        return [value.data, value.batch_sizes]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in flat(item)]
    return [value]


@given(
    modules(),
    st.sampled_from(("batch", "single", "packed", "packed and sorted")),
    st.booleans(),
    st.booleans(),
)
def test_lowered_equals_the_module(module, form, has_state, is_training):
    module.train(is_training)
    value = torch.randn(4, 3) if form == "single" else torch.randn(5, 5, 3)
    if form.startswith("packed"):
        is_sorted = form == "packed and sorted"
        lengths = torch.tensor([5, 4, 2, 2, 1] if is_sorted else [2, 5, 1, 4, 2])
        value = pack_padded_sequence(value, lengths, module.batch_first, enforce_sorted=is_sorted)
    args = (value, states(module, 0 if form == "single" else 5)) if has_state else (value,)
    model = nn.ModuleDict({"part": module})
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in ("x", "state")[: len(args)]]
    graph.output(graph.call_module("part", tuple(inputs)))
    lowered, stays = lower(graph, model)
    assert stays == {}
    torch.manual_seed(0)
    expected = module(*args)
    torch.manual_seed(0)
    got = fx.GraphModule(model, lowered)(*args)
    assert isinstance(got[0], PackedSequence) == form.startswith("packed")
    assert type(got[1]) is type(expected[1])
    for ours, theirs in zip(flat(got), flat(expected), strict=True):
        assert torch.equal(ours, theirs)


class Tagger(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.recurrent = kind(6, 8, num_layers=2, dropout=0.4, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.recurrent(x)[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_the_flag_of_the_module_itself_decides_on_dropout(kind):
    model, value = Tagger(kind), torch.randn(2, 5, 6)
    emitted = npas_fx.transform(model, 0.4, example_inputs=value)
    recurrent_part = emitted.get_submodule("recurrent")
    emitted.train()
    assert not torch.equal(emitted(value), emitted(value))
    recurrent_part.eval()
    assert torch.equal(emitted(value), emitted(value))


def test_recurrent_weights_have_their_kind_and_a_role():
    sites = {site.name: site for site in npas_fx.inspect(Tagger()).sites}
    assert sites["recurrent.weight_hh_l1"].kind == "recurrent"
    assert sites["head.weight"].role == "head"
    assert sites["recurrent.weight_ih_l0"].depth < sites["head.weight"].depth


def test_compiling_breaks_where_the_module_does():
    model, value = Tagger().eval(), torch.randn(2, 5, 6)
    emitted = npas_fx.transform(model, 0.4, example_inputs=value).eval()
    compiled = torch.compile(copy.deepcopy(emitted), backend="aot_eager")
    torch.testing.assert_close(compiled(value), emitted(value))
