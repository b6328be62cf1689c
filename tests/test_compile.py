"""``torch.compile``: no more graphs than of the plain model, and the same numbers."""

from __future__ import annotations

import zoo  # isort: skip  # before timm: it makes torchvision importable

import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.models import efficientnet, hrnet, mlp_mixer, mobilenetv3
from timm.models._efficientnet_builder import decode_arch_def
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from compilation import Comparison, Counts, compare, measure
from models import GPT, MODELS, Example, TextClassifier
from npas_fx import transform
from oracle import seeded


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def in_float64(example: Example) -> Example:
    """The same model with so many digits that a step of training changes what comes out."""

    def draw(batch_size: int) -> tuple[Tensor, ...]:
        inputs = example.inputs(batch_size)
        return tuple(x.double() if x.is_floating_point() else x for x in inputs)

    return Example(lambda: example.make().double(), draw)


# Compiled with inductor. Without dropout, for which inductor draws other random numbers.
INDUCTOR = {
    "residual_cnn": MODELS["residual_cnn"],
    "gpt": Example(lambda: GPT(depth=1, dropout=0.0), MODELS["gpt"].draw),
}


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.zoo
@pytest.mark.parametrize("name", INDUCTOR)
def test_inductor(name):
    found = compare(INDUCTOR[name], backend="inductor")
    assert found.is_whole
    found.assert_no_more()


@pytest.mark.parametrize("name", [name for name in MODELS if name not in (*INDUCTOR, "lstm")])
def test_models(name):
    found = compare(in_float64(MODELS[name]))
    assert found.is_whole
    found.assert_no_more()


def _inverted() -> Any:
    return decode_arch_def([["ds_r1_k3_s2_e1_c16_se0.25"], ["ir_r2_k5_s2_e4_c24_se0.25"]])


class Branches(nn.Module):
    """An HRNet of two branches, without its large head."""

    def __init__(self) -> None:
        super().__init__()
        stages = {k: cfg for k, cfg in hrnet.cfg_cls["hrnet_w18_small"].items() if k[-1] in "234"}
        few = {"num_branches": 2, "num_blocks": (1, 1), "num_channels": (16, 32)}
        few_stages = {k: {**cfg, **few} for k, cfg in stages.items()}
        self.net = timm.create_model("hrnet_w18_small", head="", num_classes=0, **few_stages)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([y.mean((2, 3)) for y in self.net.forward_features(x)], dim=1)


# Each family with few layers: compiling takes long.
SHORT: dict[str, Callable[[], nn.Module]] = {
    "resnet18": partial(timm.create_model, "resnet18", layers=(1, 1, 1, 1)),
    "resnet50": partial(timm.create_model, "resnet50", layers=(1, 1, 1, 1)),
    "mobilenetv3_small_100": lambda: mobilenetv3.MobileNetV3(
        _inverted(), num_features=64, act_layer=nn.Hardswish
    ),
    "vit_tiny_patch16_224": partial(
        timm.create_model, "vit_tiny_patch16_224", depth=2, img_size=64
    ),
    "convnext_atto": partial(timm.create_model, "convnext_atto", depths=(1, 1, 1, 1)),
    "densenet121": partial(timm.create_model, "densenet121", block_config=(2, 1)),
    "efficientnet_b0": lambda: efficientnet.EfficientNet(
        _inverted(), num_features=64, act_layer=nn.SiLU
    ),
    "regnety_002": partial(
        timm.create_model,
        "regnety_002",
        depth=4,
        wa=100.0,
        wm=2.0,  # a block in each stage
    ),
    "swin_tiny_patch4_window7_224": partial(
        timm.create_model,
        "swin_tiny_patch4_window7_224",
        img_size=56,
        depths=(2,),  # the second block shifts its windows
        num_heads=(3,),
    ),
    "xcit_nano_12_p16_224": partial(
        timm.create_model, "xcit_nano_12_p16_224", depth=1, cls_attn_layers=1
    ),
    "hrnet_w18_small": Branches,
    "mixer_s32_224": partial(
        mlp_mixer.MlpMixer, img_size=64, patch_size=32, num_blocks=2, embed_dim=64
    ),
}


def test_every_family_has_a_short_model():
    assert SHORT.keys() == zoo.ZOO.keys()


# Others are of their kind: a bottleneck, gates, a stream of several sizes, attention.
NIGHTLY = (
    *("resnet50", "regnety_002", "hrnet_w18_small", "mobilenetv3_small_100"),
    *("xcit_nano_12_p16_224", "densenet121", "efficientnet_b0"),
    *("swin_tiny_patch4_window7_224", "convnext_atto"),
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in NIGHTLY else pytest.mark.zoo)
        for name in SHORT
    ],
)
def test_timm_with_few_layers(name):
    found = compare(in_float64(Example(SHORT[name], zoo.ZOO[name].draw)))
    assert found.is_whole
    found.assert_no_more()


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.ZOO)
def test_timm(name):
    found = compare(in_float64(zoo.ZOO[name]))
    assert found.is_whole
    found.assert_no_more()


def test_dropout_draws_anew_at_each_call_and_follows_the_mode():
    example = MODELS["mlp"]
    shared = transform(example.make(), 0.5, example_inputs=example.inputs(3))
    compiled = torch.compile(shared, fullgraph=True, backend="aot_eager")
    inputs = example.inputs(3)
    for is_training in (True, False):
        shared.train(is_training)
        one, two = (seeded(lambda: compiled(*inputs), seed) for seed in (1, 2))
        assert torch.equal(one, two) is not is_training


class Broken(nn.Module):
    """No graph can hold it: torch.compile has to break, and torch.fx keeps the call."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 1e9 else x.relu()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.activation = Broken()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.activation(self.fc(x))


class BrokenInBlocks(nn.Module):
    """Breaks two calls below its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


class ProjectedText(TextClassifier):
    """With more in front of the LSTM than a single call, which torch._dynamo would not compile."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(12, 12)

    def forward(self, text: Tensor) -> Tensor:
        x = torch.tanh(self.project(self.embedding(text)))
        output, (state, _) = self.lstm(x)
        return self.fc(state[-1] + output.mean(1))


def _vectors(batch_size: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch_size, 8),)


BROKEN = {
    "block": Example(Block, _vectors),
    "in blocks": Example(BrokenInBlocks, _vectors),
}


@pytest.mark.parametrize("name", BROKEN)
def test_where_the_plain_model_breaks_the_emitted_one_breaks_no_more(name):
    found = compare(in_float64(BROKEN[name]), budget=0.7)
    assert not found.is_whole
    found.assert_no_more()


class RunningMean(nn.Module):
    """Binds a buffer anew at each call, and a counter in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
            self.steps = self.steps + 1
        return self.b(h - self.mean)


class Rows(nn.Module):
    """Binds a buffer of another shape, so that it is called as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("rows", torch.zeros(1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.rows.shape[0] != x.shape[0]:
            self.rows = torch.arange(x.shape[0]).to(x)[:, None]
        return self.b(self.a(x) + self.rows)


@pytest.mark.parametrize("kind", [RunningMean, Rows])
def test_buffers_that_are_bound_anew_break_no_graph(kind):
    found = compare(in_float64(Example(kind, _vectors)))
    assert found.is_whole
    found.assert_no_more()


def test_what_stands_behind_a_recurrent_module_is_compiled_too():
    # In the plain model torch._dynamo compiles what comes before an LSTM and leaves the rest alone.
    found = compare(in_float64(Example(ProjectedText, MODELS["lstm"].draw)), budget=0.7)
    assert not found.is_whole
    assert found.plain == Counts(graphs=3, recompilations=2)
    assert found.emitted == Counts(graphs=6, recompilations=4)  # as often, for two parts


def test_what_comes_before_a_break_is_one_graph():
    # The plain model has one call there. torch._dynamo compiles no graph of one call; what banks do
    # makes it a longer one.
    found = compare(in_float64(MODELS["lstm"]), budget=0.6)
    assert not found.is_whole
    assert found.plain == Counts(graphs=0, recompilations=0)
    assert found.emitted == Counts(graphs=6, recompilations=4)


class Decides(nn.Module):
    """Branches on what it has computed, so that all of it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        if h.sum() > 1e9:
            h = -h
        return self.c(self.b(h).relu())


class DecidesInside(nn.Module):
    """A part of it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.inside = nn.Linear(8, 8), Decides()

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(self.a(x).relu()).sum(1)


def _compare_in_eager(
    kind: Callable[[], nn.Module], emit: str, draw: Any = _vectors, **rules: Any
) -> Comparison:
    example = in_float64(Example(kind, draw))
    found = compare(example, backend="eager", budget=0.7, emit=emit, **rules)
    assert not found.is_whole
    return found


@pytest.mark.parametrize(("emit", "num_for_banks"), [("graph", 1), ("module", 0)])
def test_where_the_model_breaks_only_its_code_and_its_banks_are_compiled(emit, num_for_banks):
    counts = []
    for module in (
        model := Decides(),
        transform(model, 0.7, example_inputs=_vectors(3), emit=emit),
    ):
        torch.compiler.reset()
        counter = CompileCounterWithBackend("eager")
        x = torch.randn(3, 8)
        torch.testing.assert_close(torch.compile(module, backend=counter)(x), module(x))
        counts.append(counter.frame_count)
    assert counts == [2, 2 + num_for_banks]


@pytest.mark.zoo
def test_a_model_that_is_called_needs_one_graph_more_for_its_banks():
    found = _compare_in_eager(Decides, "graph")
    assert found.plain == Counts(graphs=6, recompilations=4)
    assert found.emitted == Counts(graphs=8, recompilations=5)  # one with gradients, one without


@pytest.mark.zoo
def test_a_part_that_is_called_needs_no_more_graphs():
    _compare_in_eager(DecidesInside, "graph").assert_no_more()


# torch._dynamo compiles what comes between `own(…)` and the user's `forward` too: no graph, but it
# counts, once for each graph that it compiles anew of the user's code.
@pytest.mark.zoo
def test_with_the_users_class_banks_are_in_the_graphs_of_its_code():
    found = _compare_in_eager(Decides, "module")
    assert found.plain == Counts(graphs=6, recompilations=4)
    assert found.emitted == Counts(graphs=6, recompilations=6)


@pytest.mark.zoo
def test_with_the_users_class_and_a_part_that_breaks():
    found = _compare_in_eager(DecidesInside, "module")
    assert found.plain == Counts(graphs=12, recompilations=8)
    assert found.emitted == Counts(graphs=12, recompilations=14)


@pytest.mark.zoo
def test_the_weights_of_a_recurrent_module_are_one_graph():
    # It is read twice at each call; the second read makes no graph.
    rules = {"include": "lstm.*", "same_bank": [["lstm.weight*"]]}  # of the LSTM alone
    found = _compare_in_eager(ProjectedText, "module", MODELS["lstm"].draw, **rules)
    assert found.plain == Counts(graphs=3, recompilations=2)
    assert found.emitted == Counts(graphs=5, recompilations=7)


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Experts(nn.Module):
    """Each row goes to one; to find the rows breaks a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            rows = torch.where(x[:, 0] % 3 == k)[0]
            y = y.index_add(0, rows, expert(x[rows]))
        return y


# torch._dynamo gives up on a function that breaks inside a loop, and compiles the experts: one code
# for all of the plain model. Those of the user's class read other places of banks. The graph has no
# loop, so that all is compiled, between the three breaks.
@pytest.mark.zoo
@pytest.mark.parametrize(("emit", "num_graphs"), [("graph", 4), ("module", 3)])
def test_experts(emit, num_graphs):
    counts = []
    x = torch.randn(6, 8)
    x[:, 0] = torch.arange(6)
    for module in (model := Experts(), transform(model, 0.7, example_inputs=x, emit=emit)):
        torch.compiler.reset()
        counter = CompileCounterWithBackend("eager")
        torch.testing.assert_close(torch.compile(module, backend=counter)(x), module(x))
        counts.append(counter.frame_count)
    assert counts == [1, num_graphs]


class Named(nn.Module):
    """One of its arguments bears the name of a builtin that its graph calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, input: Tensor, *slice: Tensor, scale: float = 2.0) -> Tensor:
        for layer in self.layers:
            input = layer(input).relu()
        return input[:, 1:] * scale + slice[0][:, 1:]


def test_an_argument_named_like_a_builtin():
    torch.manual_seed(0)
    shared = transform(Named(), 0.6, example_inputs=(torch.randn(3, 8), torch.randn(3, 8)))
    compiled = torch.compile(shared, fullgraph=True, backend="aot_eager")
    for rows in (3, 5):
        x, y = torch.randn(2, rows, 8)
        assert torch.allclose(compiled(x, y), shared(x, y), atol=1e-6)


def test_counts_do_not_depend_on_what_was_compiled_before():
    example = MODELS["mlp"]
    model = example.make()
    first, _ = measure(model, example, fullgraph=True)
    again, _ = measure(model, example, fullgraph=True)
    assert first == again
    assert first.graphs > 0
    assert first.recompilations == first.graphs - 1
