"""A weight that is several in one is seen as such, and generated in its parts."""

from __future__ import annotations

import torchvision_ops as _before_timm  # isort: skip  # noqa: F401

from operator import getitem

import pytest
import timm
import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn
from torchvision.models import VisionTransformer

import npas_fx
from comparison import emit
from npas_fx.banks import Bank
from npas_fx.generators import Moments
from npas_fx.generators.birth import MEAN_TOLERANCE
from npas_fx.passes.capture import capture
from npas_fx.passes.emitted import emission_of
from npas_fx.passes.fused import find_fused
from oracle import generated
from zoo import ZOO, large_at_night

WIDTH = 24  # of what is cut


class Cut(nn.Module):
    """A joint projection; ``body`` says what happens to it, given the input that it had."""

    def __init__(self, body, width=WIDTH, **attributes):
        super().__init__()
        self.first, self.joint = nn.Linear(4, 16), nn.Linear(16, width)
        self.last = nn.Linear(8, 16)
        self.body = body
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.body(self, self.first(x))


def find_parts(model, *inputs, calls=()):
    """Name of each weight that is fused -> number and axis of its parts."""
    inventory = capture(model, inputs or None, calls=calls).inventory
    return {s.name: (s.num_parts, s.parts_axis) for s in inventory.sites if s.num_parts > 1}


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def of_timm(self, x):
    batch, length, _ = x.shape
    y = self.joint(x).reshape(batch, length, 3, 2, 4)
    return attend(*y.permute(2, 0, 3, 1, 4).unbind(0))


def of_first_timm(self, x):
    batch, length, width = x.shape
    y = self.joint(x).reshape(batch, length, 3, 4, width // 8).permute(2, 0, 3, 1, 4)
    return attend(y[0], y[1], y[2])


def of_swin(self, x):
    batch, length, _ = x.shape
    y = self.joint(x).reshape(batch, length, 3, 2, -1)
    return attend(*y.permute(2, 0, 3, 1, 4).unbind(0))


def of_torch(self, x):
    y = self.joint(x).unflatten(-1, (3, 8)).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
    return attend(y[0], y[1], y[2])


def by_size_before_the_norm(self, x):
    batch, length, _ = x.shape
    y = self.joint(self.dropout(self.norm(x))).view(batch, length, 3, 8)
    return attend(y.select(2, 0), y.select(2, 1), y[:, :, 2])


def by_size_of_the_outputs(self, x):
    y = self.joint(x)
    batch, length, width = y.shape
    return attend(*y.view(batch, length, 3, width // 3).unbind(2))


def by_size_of_a_picture(self, x):
    x = x.mT.unflatten(-1, (2, 3))
    batch, channels, height, width = x.shape
    y = self.joint(x.flatten(2).transpose(1, 2))
    return attend(*y.view(batch, height * width, 3, channels // 2).unbind(2))


def in_two_steps(self, x):
    q, rest = self.joint(x).split([8, 16], dim=-1)
    return attend(q, *rest.chunk(2, dim=-1))


def with_positions(self, x):
    return attend(*(self.positions + self.joint(x)).chunk(3, dim=-1))


def by_places(self, x):
    y = self.joint(x)
    return attend(y[..., :8], y[..., 8:16], y.narrow(-1, 16, 8))


def then_in_halves(self, x):
    q, k, v = self.joint(x).chunk(3, dim=-1)
    q, k = ((t * torch.cat([-t[..., 4:], t[..., :4]], -1)) for t in (q, k))
    return attend(q, k, v)


def along_a_numbered_axis(self, x):
    batch, length, _ = x.size()
    q, k, v = self.joint(x).chunk(3, dim=2)  # of values of four axes, these were no q, k and v:
    return attend(*(t.view(batch, length, 2, 4).transpose(1, 2) for t in (q, k, v)))


def in_place(self, x):
    q, k, v = self.joint(x).chunk(3, dim=-1)
    q *= 0.5
    return attend(q, k, v)


def gated(self, x):
    gate, up = self.joint(x).chunk(2, dim=-1)
    return F.silu(gate) * up


def of_four(self, x):
    a, b, c, d = self.joint(x).chunk(4, dim=-1)
    return a * b + c * d


FUSED = {
    "chunk": (3, lambda self, x: attend(*self.joint(x).chunk(3, dim=-1))),
    "function": (3, lambda self, x: attend(*torch.chunk(self.joint(x), 3, dim=-1))),
    "split": (3, lambda self, x: attend(*self.joint(x).split(8, dim=-1))),
    "split by sizes": (3, lambda self, x: attend(*self.joint(x).split([8, 8, 8], dim=-1))),
    "tensor_split": (3, lambda self, x: attend(*self.joint(x).tensor_split(3, -1))),
    "unflatten": (3, lambda self, x: attend(*self.joint(x).unflatten(-1, (3, 8)).unbind(-2))),
    "dropout": (3, lambda self, x: attend(*self.dropout(self.joint(x)).chunk(3, dim=-1))),
    "timm": (3, of_timm),
    "timm, as it was": (3, of_first_timm),
    "swin": (3, of_swin),
    "torch": (3, of_torch),
    "sizes before the norm": (3, by_size_before_the_norm),
    "sizes of the outputs": (3, by_size_of_the_outputs),
    "sizes of a picture": (3, by_size_of_a_picture),
    "table of positions": (3, with_positions),
    "two steps": (3, in_two_steps),
    "places": (3, by_places),
    "halves of the parts": (3, then_in_halves),
    "numbered axis": (3, along_a_numbered_axis),
    "changed in place": (3, in_place),
    "gate and up": (2, gated),
    "four": (4, of_four),
}


@pytest.mark.parametrize("name", FUSED)
def test_equal_stretches_of_the_outputs_are_parts(name):
    number, body = FUSED[name]
    model = Cut(body, norm=nn.LayerNorm(16), dropout=nn.Dropout(0.1))
    model.positions = nn.Parameter(torch.randn(6, WIDTH))
    assert find_parts(model, torch.randn(2, 6, 4)) == {"joint.weight": (number, 0)}


class Products(nn.Module):
    """A joint projection by a matrix that holds an input in each row."""

    def __init__(self, body):
        super().__init__()
        self.matrix, self.bias = nn.Parameter(torch.randn(16, 24)), nn.Parameter(torch.randn(24))
        self.body = body

    def forward(self, x):
        return attend(*self.body(self, x).chunk(3, dim=-1))


def as_in_gpt2(self, x):
    return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.matrix).view(
        (*x.size()[:-1], self.matrix.shape[1])
    )


@pytest.mark.parametrize(
    ("body", "axis"),
    [
        (lambda self, x: x @ self.matrix, 1),
        (lambda self, x: x @ self.matrix + self.bias, 1),
        (lambda self, x: self.bias + torch.matmul(x, self.matrix), 1),
        (as_in_gpt2, 1),
        (lambda self, x: F.linear(input=x, weight=self.matrix), 0),
    ],
)
def test_parts_lie_along_the_outputs(body, axis):
    model, x = Products(body), torch.randn(2, 6, 16)
    if axis == 0:
        model.matrix = nn.Parameter(model.matrix.detach().mT.clone())
    assert find_parts(model, x) == {"matrix": (3, axis)}


def of_megatron(self, x):
    batch, length, _ = x.shape
    y = self.joint(x).reshape(batch, length, 2, 12)
    return attend(*y.transpose(1, 2).chunk(3, dim=-1))


def of_bloom(self, x):
    batch, length, _ = x.shape
    y = self.joint(x).view(batch, length, 2, 3, 4)
    return attend(y[..., 0, :], y[..., 1, :], y[..., 2, :])


def one_left_out(self, x):
    q, k, _ = self.joint(x).chunk(3, dim=-1)
    return attend(q, k, k)


def one_left_out_by_number(self, x):
    q, k = (self.joint(x).unflatten(-1, (3, 8))[..., k, :] for k in (0, 2))
    return attend(q, k, k)


def used_whole_too(self, x):
    y = self.joint(x)
    return attend(*y.chunk(3, dim=-1)) + y.sum()


def used_by_two(self, x):
    y = self.joint(x)
    return attend(*y.chunk(3, dim=-1)) + y[..., :16].sum()


def of_turned_halves(self, x):
    y = self.joint(x)
    one, two = y.chunk(2, dim=-1)
    return y * torch.cat([-two, one], -1).repeat(1, 1, 1)


def over_the_sequence(self, x):
    one, two = self.joint(x).chunk(2, dim=-2)
    return one * two


def mixed_with_the_sequence(self, x):
    batch, length, _ = x.shape
    y = self.joint(x).reshape(batch, 3, length, 8)
    return attend(*y.unbind(1))


def every_third(self, x):
    return attend(*self.joint(x).unflatten(-1, (8, 3)).unbind(-1))


def not_cut(self, x):
    return torch.relu(self.joint(x))


def after_an_activation(self, x):  # what is cut are no outputs of the weight
    one, two = torch.relu(self.joint(x)).chunk(2, dim=-1)
    return one * two


def normed_as_one(self, x):
    q, k, v = self.joint_norm(self.joint(x)).chunk(3, dim=-1)
    return attend(q, k, v)


def after_a_sum(self, x):  # as the gates of a cell that is written by hand
    i, f, g, o = (self.joint(x) + self.other(x)).chunk(4, dim=-1)
    return i * f + g * o


def of_convolution(self, x):
    return attend(*self.conv(x.mT).chunk(3, dim=1))


WHOLE = {
    "heads first": of_megatron,
    "heads first, by number": of_bloom,
    "unequal": lambda self, x: attend(*self.joint(x).split([4, 4, 16], dim=-1)[:2], x[..., :4]),
    "uneven": lambda self, x: [t.sum() for t in self.joint(x).split(10, dim=-1)],
    "one left out": one_left_out,
    "one left out, by number": one_left_out_by_number,
    "whole too": used_whole_too,
    "two at once": used_by_two,
    "turned": of_turned_halves,
    "sequence": over_the_sequence,
    "mixed with the sequence": mixed_with_the_sequence,
    "every third": every_third,
    "six": lambda self, x: [t.sum() for t in self.joint(x).chunk(6, dim=-1)],
    "not cut": not_cut,
    "activation": after_an_activation,
    "norm": normed_as_one,
    "sum": after_a_sum,
    "convolution": of_convolution,
    "handed on": lambda self, x: torch.stack(self.joint(x).chunk(3, dim=-1)),
    "returned": lambda self, x: self.joint(x).chunk(3, dim=-1),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_cut_otherwise_is_whole(name):
    further = {"other": nn.Linear(16, WIDTH), "conv": nn.Conv1d(16, WIDTH, 1)}
    model = Cut(WHOLE[name], joint_norm=nn.LayerNorm(WIDTH), **further)
    assert find_parts(model, torch.randn(2, 6, 4)) == {}


def test_parts_are_four_at_most():
    model = Cut(lambda self, x: [t.sum() for t in self.joint(x).chunk(5, dim=-1)], width=10)
    assert find_parts(model, torch.randn(2, 6, 4)) == {}


def test_one_row_is_no_weight():
    model = Cut(FUSED["chunk"][1], width=3)
    assert find_parts(model, torch.randn(2, 6, 4)) == {}


@pytest.mark.parametrize("name", ["gate and up", "numbered axis", "four", "torch"])
def test_no_example_is_needed(name):
    number, body = FUSED[name]
    assert find_parts(Cut(body)) == {"joint.weight": (number, 0)}


@pytest.mark.parametrize("axis", [1, 2])
def test_what_a_numbered_axis_is_may_stay_open(axis):
    def chunk(self, x):  # along the features of rows or of sequences, or along a sequence
        one, two = self.joint(x).chunk(2, dim=axis)
        return one * two

    assert find_parts(Cut(chunk)) == {}


def of_rows(self, x):
    q, k, v = self.joint(x).view(x.shape[0], 3, 8).unbind(1)
    return q * k * v


def of_pictures(self, x):
    batch, height, width, _ = x.shape
    return attend(*self.joint(x).view(batch, height * width, 3, 2, 4).unbind(2))


@pytest.mark.parametrize(("body", "shape"), [(of_rows, (2, 4)), (of_pictures, (2, 3, 5, 4))])
def test_values_may_have_any_number_of_axes(body, shape):
    assert find_parts(Cut(body), torch.randn(shape)) == {"joint.weight": (3, 0)}


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        (lambda self, x: F.linear(self.matrix, x), (24, 24)),
        (lambda self, x: self.matrix @ x.mT, (24, 24)),
        (lambda self, x: x @ self.matrix, (24, 24, 24)),
        (lambda self, x: F.linear(x, self.matrix * 2), (24, 24)),
    ],
    ids=["input", "left", "one for each", "scaled"],
)
def test_other_uses_of_a_matrix_are_none_of_a_fused_one(body, shape):
    model = Products(body)
    model.matrix = nn.Parameter(torch.randn(shape))
    assert find_parts(model, torch.randn(24, 24)) == {}


def test_gates_of_recurrent_layers_stay_whole():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.gru, self.cell = nn.LSTM(8, 8), nn.GRU(8, 8), nn.GRUCell(8, 8)

        def forward(self, x):
            return self.cell(self.gru(self.lstm(x)[0])[0][0])

    assert find_parts(Recurrent(), torch.randn(5, 2, 8)) == {}


class Twice(nn.Module):
    """One weight, tied or called again, in two places."""

    def __init__(self, one, two, is_tied):
        super().__init__()
        self.first, self.second = nn.Linear(16, WIDTH), nn.Linear(16, WIDTH)
        if is_tied:
            self.second.weight = self.first.weight
        else:
            self.second = self.first
        self.cuts = one, two

    def forward(self, x):
        one, two = self.cuts
        return one(self.first(x)) + two(self.second(x))


def thirds(y):
    q, k, v = y.chunk(3, dim=-1)
    return attend(q, k, v).sum()


def split_in_thirds(y):
    q, k, v = y.split(8, dim=-1)
    return attend(q, k, v).sum()


def halves(y):
    one, two = y.chunk(2, dim=-1)
    return (one * two).sum()


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (thirds, {"first.weight": (3, 0)}),
        (split_in_thirds, {"first.weight": (3, 0)}),
        (halves, {}),
        (lambda y: y.sum(), {}),
    ],
    ids=["same", "alike", "halves", "whole"],
)
def test_all_uses_have_to_agree(is_tied, other, expected):
    assert find_parts(Twice(thirds, other, is_tied)) == expected
    assert find_parts(Twice(other, thirds, is_tied)) == expected


def test_a_table_that_is_looked_up_is_whole():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(WIDTH, 16)
            self.held = nn.Embedding(WIDTH, 16, padding_idx=0)
            self.joint = nn.Linear(16, WIDTH, bias=False)
            self.joint.weight = self.table.weight

        def forward(self, ids):
            q, k, v = self.joint(self.table(ids) + self.held(ids)).chunk(3, dim=-1)
            return attend(q, k, v)

    assert find_parts(Tied()) == {}


def test_looking_runs_no_code_of_others_and_draws_nothing():
    ran, skeleton = [], nn.Linear(16, WIDTH, device="meta")

    def cut_after(*steps):
        graph = fx.Graph()
        x, weight = graph.placeholder("x"), graph.get_attr("weight")
        rows = graph.call_method("size", (x, 0))
        for step in steps:
            x = step(graph, x)
        y = graph.call_function(F.linear, (x, weight))
        parts = graph.call_method("unbind", (graph.call_method("view", (y, rows, 3, 8)), 1))
        graph.output(tuple(graph.call_function(getitem, (parts, k)) for k in range(3)))
        return find_fused({"weight": [weight]}, skeleton)

    def code_of_others(graph, x):
        return graph.call_function(lambda x: ran.append(x) or x, (x,))

    def draw(graph, x):
        return graph.call_function(torch.mul, (x, graph.call_function(torch.rand, (16,))))

    state = torch.get_rng_state()
    assert cut_after() == {"weight": (3, 0)}
    assert cut_after(code_of_others) == cut_after(draw) == {}
    assert torch.equal(torch.get_rng_state(), state)
    assert ran == []


class Attention(nn.Module):
    def __init__(self, other=None, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.other = nn.Linear(8, 24)
        if other is not None:
            self.other.weight = self.attention.in_proj_weight
        self.body = other

    def forward(self, x):
        y = self.attention(x, x, x, need_weights=False)[0]
        return y if self.body is None else y + self.body(self.other(y))


@pytest.mark.parametrize("calls", [(), ("attention",)])
def test_attention_of_torch_projects_q_k_and_v_by_one_weight(calls):
    assert find_parts(Attention(), calls=calls) == {"attention.in_proj_weight": (3, 0)}
    assert find_parts(Attention(thirds), calls=calls) == {"attention.in_proj_weight": (3, 0)}
    assert find_parts(Attention(lambda y: y.sum(-1, keepdim=True)), calls=calls) == {}
    assert find_parts(Attention(kdim=8, vdim=6), calls=calls) == {}


def test_attention_in_what_is_called_as_a_whole():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    assert "" in capture(layer).leaves
    assert find_parts(layer) == {"self_attn.in_proj_weight": (3, 0)}


def test_a_name_says_nothing():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_proj_weight = nn.Parameter(torch.randn(24, 8))
            self.qkv, self.c_attn = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x):
            return self.c_attn(self.qkv(F.linear(x, self.in_proj_weight)).relu())

    assert find_parts(Named()) == {}
    assert find_parts(nn.Sequential(Named()), calls=("0",)) == {}


class Separate(nn.Module):
    """Query, key and value by weights of their own; and a gate."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        batch, length, _ = x.shape
        heads = (
            part(x).view(batch, length, 2, 8).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        x = x + self.out(attend(*heads).transpose(1, 2).reshape(batch, length, 16))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class GatedMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 16)
        self.up = nn.ModuleList(nn.Linear(16, 64) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(32, 16) for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        for up, down in zip(self.up, self.down, strict=True):
            gate, value = up(x).chunk(2, dim=-1)
            x = x + down(F.silu(gate) * value)
        return x


def make_gpt2():
    config = transformers.GPT2Config(
        **{"vocab_size": 48, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2},
        **{"bos_token_id": 0, "eos_token_id": 0, "use_cache": False},
    )
    return transformers.GPT2LMHeadModel(config)


# Name -> the model, its inputs, the end of the names of all weights that are fused, their parts.
REAL = {
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
        lambda: torch.randn(2, 5, 16),
        ("in_proj_weight", 3, 0, 1),
    ),
    "vit of torchvision": (
        lambda: VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=5),
        lambda: torch.randn(2, 3, 16, 16),
        ("in_proj_weight", 3, 0, 2),
    ),
    "vit of timm": (
        lambda: timm.models.VisionTransformer(16, 8, embed_dim=16, depth=2, num_heads=2),
        lambda: torch.randn(2, 3, 16, 16),
        ("qkv.weight", 3, 0, 2),
    ),
    "gpt2": (make_gpt2, lambda: torch.randint(48, (2, 7)), ("c_attn.weight", 3, 1, 2)),
    "gated": (GatedMLP, lambda: torch.randn(3, 6), ("weight", 2, 0, 3)),
    "separate": (Separate, lambda: torch.randn(2, 5, 16), ("", 0, 0, 0)),
}


@pytest.mark.parametrize("name", REAL)
def test_real_models_are_generated_in_parts(name):
    make, draw, (end, number, axis, count) = REAL[name]
    torch.manual_seed(0)
    model, x = make().eval(), draw()
    inventory = capture(model, x).inventory
    fused = [site for site in inventory.sites if site.num_parts > 1]
    assert all(site.name.endswith(end) for site in fused)
    assert [(site.num_parts, site.parts_axis) for site in fused] == [(number, axis)] * count
    shared = npas_fx.transform(model, 0.4, example_inputs=x, solver="greedy")
    plain = npas_fx.materialize(shared)
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert [w.shape for w in plain.state_dict().values()] == [
        w.shape for w in model.state_dict().values()
    ]


@pytest.mark.parametrize(
    ("name", "fused"),
    large_at_night(
        [
            ("vit_tiny_patch16_224", "qkv.weight"),
            ("swin_tiny_patch4_window7_224", "qkv.weight"),
            ("xcit_nano_12_p16_224", "qkv.weight"),
            ("mixer_s32_224", None),
            ("resnet18", None),
        ]
    ),
)
def test_networks_of_timm(name, fused):
    with torch.device("meta"):
        inventory = capture(ZOO[name].make()).inventory
    for site in inventory.sites:
        is_fused = fused is not None and site.name.endswith(fused)
        assert (site.num_parts, site.parts_axis) == (3 if is_fused else 1, 0), site.name


class Stack(nn.Module):
    """Joint projections, each an input wide matrix or its transpose, and plain ones."""

    def __init__(self, kinds, width):
        super().__init__()
        self.stem = nn.Linear(5, width)
        self.kinds = kinds
        self.weights = nn.ParameterList()
        for number, axis in kinds:
            shape = (number * width, width) if axis == 0 else (width, number * width)
            scale = torch.linspace(0.5, 2.0, number).repeat_interleave(width)
            weight = torch.randn(shape) * (scale[:, None] if axis == 0 else scale) + 0.1
            self.weights.append(nn.Parameter(weight))

    def forward(self, x):
        x = self.stem(x)
        for (number, axis), weight in zip(self.kinds, self.weights, strict=True):
            y = F.linear(x, weight) if axis == 0 else x @ weight
            parts = y.split(y.shape[-1] // number, dim=-1) if number > 1 else (y,)
            x = x + torch.stack([torch.tanh(parts[k]) for k in range(number)]).prod(0)
        return x


@given(
    kinds=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 1)), min_size=2, max_size=5),
    width=st.integers(4, 9),
    budget=st.sampled_from([0.3, 0.5, 0.7]),
)
def test_emitted_weights_are_parts_generated_apart_and_joined(kinds, width, budget):
    torch.manual_seed(0)
    model, x = Stack(kinds, width), torch.randn(4, 5)
    found = find_parts(model, x)
    assert found == {
        f"weights.{k}": (number, axis) for k, (number, axis) in enumerate(kinds) if number > 1
    }
    shared = emit(model, budget, x, generators=["dedicated", "wavg"], verify=True)
    emission, plan = emission_of(shared), npas_fx.plan_of(shared)
    weights = generated(shared, plan)
    for name, (bank, place) in emission.bank_of.items():
        original, parts = model.get_parameter(name), found.get(name, (1, 0))
        names = sites_of(plan, bank)
        apart = generate_apart(
            shared.get_submodule(f"{emission.banks}.{bank}"),
            [model.get_parameter(each) for each in names],
            [found.get(each, (1, 0)) for each in names],
        )
        assert torch.equal(weights[name], apart[place])
        assert_moments(weights[name], original)
        for part, wanted in zip(weights[name].chunk(*parts), original.chunk(*parts), strict=True):
            assert_moments(part, wanted)
    plain = npas_fx.materialize(shared)
    assert plain.state_dict().keys() == model.state_dict().keys()


def assert_moments(weight, original):
    found, wanted = Moments.of(weight), Moments.of(original)
    assert abs(found.mean - wanted.mean) <= 1.1 * MEAN_TOLERANCE * wanted.std
    assert found.std == pytest.approx(wanted.std, rel=0.01)


def sites_of(plan, bank):
    shared = [each for each in plan.banks if not each.is_dedicated]
    return shared[int(bank.removeprefix("bank"))].sites


def generate_apart(bank, weights, parts):
    """Generate all parts as weights of their own, and join them."""
    cuts = [weight.chunk(*each) for weight, each in zip(weights, parts, strict=True)]
    shapes = [tuple(part.shape) for cut in cuts for part in cut]
    apart = Bank(bank.generator, shapes, bank.size, dtype=torch.float32, device="cpu")
    apart.load_state_dict(bank.state_dict())
    made = iter(apart())
    return [
        torch.cat([next(made) for _ in cut], axis)
        for cut, (_, axis) in zip(cuts, parts, strict=True)
    ]
