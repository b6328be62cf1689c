"""Roles come from the graph: small truth tables, equal under renaming."""

import copy
from collections import defaultdict
from dataclasses import replace
from fnmatch import fnmatchcase
from random import Random
from string import ascii_lowercase

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from models import MODELS
from npas_fx.passes.capture import ModeGraph, capture
from npas_fx.passes.inventory import take_inventory
from zoo import ZOO, large_at_night


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.three(self.two(self.one(x).relu()).relu())


class ResidualBlock(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.read = nn.Conv2d(before, after, 3, padding=1)
        self.norm = nn.BatchNorm2d(after)
        self.write = nn.Conv2d(after, after, 3, padding=1)
        self.short = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x):
        return F.relu(self.norm(self.write(F.relu(self.read(x)))) + self.short(x))


class ResidualCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.same = ResidualBlock(4, 4)
        self.wide = ResidualBlock(4, 8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.depthwise(self.wide(self.same(self.stem(x))))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        return self.out(F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(8, 11)

    def forward(self, ids):
        places = torch.arange(ids.shape[1])
        return self.head(self.blocks(self.tokens(ids) + self.places(places)))


BLOCK = {
    "attention.q": "parallel_projection",
    "attention.k": "parallel_projection",
    "attention.v": "parallel_projection",
    "attention.out": "residual_writer",
    "up": "residual_reader",
    "down": "residual_writer",
}
TRUTH = {
    MLP: {"one": "stem", "two": "other", "three": "head"},
    ResidualCNN: {
        "stem": "stem",
        "same.read": "residual_reader",
        "same.write": "residual_writer",
        "wide.read": "residual_reader",
        "wide.write": "residual_writer",
        "wide.short": "shortcut",
        "depthwise": "depthwise",
        "head": "head",
    },
    GPT: {
        "tokens": "embedding",
        "places": "embedding",
        **{f"blocks.{k}.{name}": role for k in range(2) for name, role in BLOCK.items()},
        "head": "head",
    },
}


def roles(model, *inputs):
    inventory = capture(model, inputs or None).inventory
    return {site.name.removesuffix(".weight"): site.role for site in inventory.sites}


@pytest.mark.parametrize("kind", TRUTH)
def test_truth_tables(kind):
    found = roles(kind())
    expected = TRUTH[kind]
    different = {name: found[name] for name in expected if found[name] != expected[name]}
    assert found.keys() == expected.keys()
    assert not different


# Real networks: a glob of names -> the role of these weights; of several globs the first that fits.
ZOO_TRUTH = {
    "resnet18": {
        "conv1.*": "stem",
        "*.conv1.*": "residual_reader",
        "*.conv2.*": "residual_writer",
        "*.downsample.*": "shortcut",
        "fc.*": "head",
    },
    "resnet50": {
        "conv1.*": "stem",
        "*.conv1.*": "residual_reader",
        "*.conv2.*": "other",
        "*.conv3.*": "residual_writer",
        "*.downsample.*": "shortcut",
        "fc.*": "head",
    },
    "densenet121": {
        "features.conv0.*": "stem",
        "*.denselayer*.conv1.*": "residual_reader",
        "*.denselayer*.conv2.*": "residual_writer",
        "*.transition*.conv.*": "residual_writer",
        "classifier.*": "head",
    },
    "mobilenetv3_small_100": {
        "conv_stem.*": "stem",
        "*.conv_dw.*": "depthwise",
        "*.se.*": "other",
        # The first block and the first of the second stage have no shortcut around them.
        "blocks.0.0.conv_pw.*": "other",
        "blocks.1.0.conv_pw.*": "other",
        "*.conv_pw.*": "residual_reader",
        "*.conv_pwl.*": "residual_writer",
        "blocks.5.0.conv.*": "residual_reader",
        "conv_head.*": "other",
        "classifier.*": "head",
    },
    "convnext_atto": {
        "stem.0.*": "stem",
        "*.downsample.*": "residual_writer",
        "*.conv_dw.*": "depthwise",
        "*.mlp.fc1.*": "other",
        "*.mlp.fc2.*": "residual_writer",
        "head.fc.*": "head",
    },
    "vit_tiny_patch16_224": {
        "pos_embed": "embedding",
        "patch_embed.*": "stem",
        "*.attn.qkv.*": "parallel_projection",
        "*.attn.proj.*": "residual_writer",
        "*.mlp.fc1.*": "residual_reader",
        "*.mlp.fc2.*": "residual_writer",
        "head.*": "head",
    },
    "swin_tiny_patch4_window7_224": {
        "patch_embed.*": "stem",
        "*.relative_position_bias_table": "embedding",
        "*.attn.qkv.*": "parallel_projection",
        "*.attn.proj.*": "residual_writer",
        "*.mlp.fc1.*": "residual_reader",
        "*.mlp.fc2.*": "residual_writer",
        "*.downsample.*": "residual_writer",
        "head.*": "head",
    },
    "regnety_002": {
        "stem.*": "stem",
        "*.conv1.*": "residual_reader",
        "*.conv2.*": "other",
        "*.se.*": "other",
        "*.conv3.*": "residual_writer",
        "*.downsample.*": "shortcut",
        "head.*": "head",
    },
}


@pytest.mark.parametrize("name", large_at_night(ZOO_TRUTH))
def test_truth_tables_of_real_networks(name):
    with torch.device("meta"):
        inventory = capture(ZOO[name].make()).inventory
    wrong = {}
    for site in inventory.sites:
        globs = [glob for glob in ZOO_TRUTH[name] if fnmatchcase(site.name, glob)]
        if not globs or ZOO_TRUTH[name][globs[0]] != site.role:
            wrong[site.name] = site.role
    assert not wrong


def test_gpt_of_the_tests_with_tied_embeddings():
    model = MODELS["gpt"].make()
    found = {site.name: site.role for site in capture(model).inventory.sites}
    block = {
        "attn.c_attn": "parallel_projection",
        "attn.c_proj": "residual_writer",
        "c_fc": "residual_reader",
        "c_proj": "residual_writer",
    }
    assert found == {
        "transformer.wte.weight": "embedding",
        "transformer.wpe.weight": "embedding",
        **{
            f"transformer.h.{k}.{name}.weight": role
            for k in range(2)
            for name, role in block.items()
        },
    }


@pytest.mark.parametrize("name", large_at_night(["residual_cnn", "gpt", "recursive", *ZOO]))
def test_names_do_not_matter(name):
    example = MODELS.get(name) or ZOO[name]
    with torch.device("meta"):
        captured = capture(example.make())
    renamed, original_of = rename(captured)
    inventory = captured.inventory
    found = take_inventory([renamed.graph], renamed.leaves, renamed.skeleton, renamed.skeleton)
    assert {site.name for site in found.sites}.isdisjoint(site.name for site in inventory.sites)
    facts = [(original_of[s.name], s.role, s.kind, s.depth, s.shape) for s in found.sites]
    assert facts == [(s.name, s.role, s.kind, s.depth, s.shape) for s in inventory.sites]
    assert [(r.signature, tuple(original_of[p] for p in r.paths)) for r in found.repeats] == [
        (repeats.signature, repeats.paths) for repeats in inventory.repeats
    ]


def rename(captured):
    """Give every module, tensor and node of a captured model a name of random letters."""
    random = Random(0)
    letters = defaultdict(lambda: "".join(random.choices(ascii_lowercase, k=12)))
    skeleton = copy.deepcopy(captured.skeleton)
    for part in list(skeleton.modules()):
        for table in (part._modules, part._parameters, part._buffers):
            items = [(letters[id(part), key], value) for key, value in table.items()]
            table.clear()
            table.update(items)
    original_of = {}
    for kind in ("named_modules", "named_parameters", "named_buffers"):
        names = ([n for n, _ in getattr(m, kind)()] for m in (skeleton, captured.skeleton))
        original_of.update(zip(*names, strict=True))
    new_name = {old: new for new, old in original_of.items()}

    def translate(path):
        owner, _, flag = path.rpartition(".")
        return f"{new_name[owner]}.{flag}" if flag == "training" else new_name.get(path, path)

    graph = copy.deepcopy(captured.graph)
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            node.target = translate(node.target)
        node.name = letters[node]
        node.meta["nn_module_stack"] = {
            call.replace(path, new_name[path]): (new_name[path], kind)
            for call, (path, kind) in node.meta.get("nn_module_stack", {}).items()
        }
    leaves = {new_name[path]: reason for path, reason in captured.leaves.items()}
    modes = (ModeGraph(graph=graph, flags={}, leaves=leaves),)
    return replace(captured, modes=modes, skeleton=skeleton), original_of


@pytest.mark.parametrize("kind", TRUTH)
def test_depths_run_from_zero_to_one_along_the_graph(kind):
    depth = {site.name: site.depth for site in capture(kind()).inventory.sites}
    assert min(depth.values()) == 0.0
    assert max(depth.values()) == 1.0
    assert list(depth.values())[-1] == 1.0


def test_kinds():
    class Kinds(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.c = nn.Embedding(5, 4), nn.Conv1d(4, 4, 1)
            self.l, self.r = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

        def forward(self, ids):
            return self.l(self.c(self.e(ids).mT).mT) @ self.r

    assert {s.name: s.kind for s in capture(Kinds()).inventory.sites} == {
        "e.weight": "embedding",
        "c.weight": "conv",
        "l.weight": "linear",
        "r": "raw",
    }


def test_a_reshaped_weight_has_the_role_of_its_operation():
    class Reshaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.raw = nn.Parameter(torch.randn(2, 8))

        def forward(self, x):
            y = self.a(x)
            return self.b(y + torch.tanh(F.linear(y, self.raw.view(4, 4).t())))

    assert roles(Reshaped()) == {"a": "stem", "b": "head", "raw": "residual_writer"}


class Roles(nn.Module):
    """A network of named linear layers; ``body`` says what is between the first and the last."""

    def __init__(self, body, **widths):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.body = body
        for name, shape in widths.items():
            self.add_module(name, nn.Linear(*shape))

    def forward(self, x):
        return self.last(self.body(self, self.first(x)))


def roles_between(body, **widths):
    found = roles(Roles(body, **widths))
    assert found.pop("first") == "stem"
    assert found.pop("last") == "head"
    return found


def test_gate_and_up_are_parallel_apart_and_in_one_weight():
    def gated(self, x):
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        gate, up = self.both(x).chunk(2, dim=-1)
        return x + self.out(F.silu(gate) * up)

    square = (8, 8)
    shapes = {"gate": square, "up": square, "down": square, "both": (8, 16), "out": square}
    assert roles_between(gated, **shapes) == {
        "gate": "parallel_projection",
        "up": "parallel_projection",
        "down": "residual_writer",
        "both": "parallel_projection",
        "out": "residual_writer",
    }


def test_branches_that_are_summed_side_by_side():
    def both(self, x):
        y = F.layer_norm(x, (8,))
        attention = self.out(F.softmax(self.q(y) @ self.k(y).mT, -1) @ self.v(y))
        return x + attention + self.down(F.gelu(self.up(y)))

    names = ("q", "k", "v", "out", "up", "down")
    assert roles_between(both, **dict.fromkeys(names, (8, 8))) == {
        **dict.fromkeys(("q", "k", "v"), "parallel_projection"),
        "out": "residual_writer",
        "up": "residual_reader",
        "down": "residual_writer",
    }


def test_a_gate_does_not_hide_what_it_gates():
    def excited(self, x):
        y = self.write(F.relu(self.read(x)))
        return x + y * torch.sigmoid(self.expand(F.relu(self.squeeze(y.mean(-2, keepdim=True)))))

    assert roles_between(
        excited, **dict.fromkeys(("read", "write", "squeeze", "expand"), (8, 8))
    ) == {
        "read": "residual_reader",
        "write": "residual_writer",
        "squeeze": "other",
        "expand": "other",
    }


class Angles(nn.Module):
    """Cosine and sine of the angles of a rotary embedding; of ``x`` it takes the dtype only."""

    def forward(self, x, places):
        angles = places[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class LlamaBlock(nn.Module):
    """Four heads of queries; two of keys and values, which they share."""

    def __init__(self):
        super().__init__()
        self.norm, self.mlp_norm = nn.RMSNorm(16), nn.RMSNorm(16)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)
        self.o = nn.Linear(16, 16)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x, cos, sin):
        y = self.norm(x)
        batch, length, _ = y.shape
        q, k, v = (
            projection(y).view(batch, length, -1, 4).transpose(1, 2)
            for projection in (self.q, self.k, self.v)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(batch, length, 16))
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.angles = nn.Embedding(11, 16), Angles()
        self.blocks = nn.ModuleList([LlamaBlock(), LlamaBlock(), LlamaBlock()])
        self.head = nn.Linear(16, 11)

    def forward(self, ids):
        x = self.tokens(ids)
        cos, sin = self.angles(x, torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(x)


def test_angles_are_not_what_queries_and_keys_gate():
    block = {
        **dict.fromkeys(("q", "k", "v", "gate", "up"), "parallel_projection"),
        **dict.fromkeys(("o", "down"), "residual_writer"),
    }
    assert roles(Llama(), torch.randint(11, (2, 5))) == {
        "tokens": "embedding",
        **{f"blocks.{k}.{name}": role for k in range(3) for name, role in block.items()},
        "head": "head",
    }


def test_a_skip_may_be_joined_instead_of_added():
    def u_net(self, x):
        inner = self.up(F.relu(self.middle(F.relu(self.down(x)))))
        return self.fuse(torch.cat([x, inner], -1))

    shapes = {"down": (8, 4), "middle": (4, 4), "up": (4, 8), "fuse": (16, 8)}
    assert roles_between(u_net, **shapes) == {
        "down": "residual_reader",
        "middle": "other",
        "up": "residual_writer",
        "fuse": "residual_reader",
    }


def test_branches_without_a_common_start_are_no_residual_stream():
    def inception(self, x):
        return self.fuse(torch.cat([self.one(x), self.two(F.relu(self.before(x)))], -1))

    shapes = {"one": (8, 8), "before": (8, 8), "two": (8, 8), "fuse": (16, 8)}
    assert set(roles_between(inception, **shapes).values()) == {"other"}


def test_one_weight_around_the_stream_reads_and_writes_it():
    assert roles_between(lambda self, x: x + F.relu(self.only(x)), only=(8, 8)) == {
        "only": "residual_writer"
    }


def test_a_stream_within_a_branch_does_not_make_its_start_a_writer():
    def nested(self, x):
        y = F.relu(self.read(x))
        return x + self.write(y + self.inner(F.relu(y)))

    assert roles_between(nested, **dict.fromkeys(("read", "inner", "write"), (8, 8))) == {
        "read": "residual_reader",
        "inner": "residual_writer",
        "write": "residual_writer",
    }


def test_what_is_made_from_constants_is_neither_stem_nor_branch():
    def placed(self, x):
        places = self.places(torch.linspace(0, 1, 8))
        x = F.relu(self.inner(x)) + places
        return self.outer(x)

    shapes = dict.fromkeys(("places", "inner", "outer"), (8, 8))
    assert set(roles_between(placed, **shapes).values()) == {"other"}


def test_two_inputs_with_a_layer_each_are_two_stems():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fuse = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 2)

        def forward(self, x, y):
            return self.head(F.relu(self.fuse(F.relu(self.a(x) * self.b(y)))))

    assert roles(Two()) == {"a": "stem", "b": "stem", "fuse": "other", "head": "head"}


def test_weights_around_a_difference():
    assert roles_between(
        lambda self, x: x - self.noise(F.relu(self.read(x))), read=(8, 8), noise=(8, 8)
    ) == {"read": "residual_reader", "noise": "residual_writer"}


class Tables(nn.Module):
    """Positions that are added, a bias that is looked up, a class token and a scale."""

    def __init__(self):
        super().__init__()
        self.fc, self.q, self.k = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.positions = nn.Parameter(torch.randn(1, 6, 8))
        self.bias = nn.Parameter(torch.randn(11, 2))
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.scale = nn.Parameter(torch.randn(1, 1, 8))
        self.register_buffer("index", torch.arange(36).view(6, 6) % 11)

    def forward(self, x):
        y = self.fc(x)
        y = torch.cat([self.token.expand(y.shape[0], -1, -1), y], 1) + self.positions
        scores = self.q(y) @ self.k(y).mT
        return torch.softmax(scores + self.bias[self.index].sum(-1), -1) @ (y * self.scale)


def test_tables_are_embeddings_and_vectors_stay():
    inventory = capture(Tables()).inventory
    assert {site.name: (site.kind, site.role) for site in inventory.sites} == {
        "fc.weight": ("linear", "stem"),
        "q.weight": ("linear", "head"),
        "k.weight": ("linear", "head"),
        "positions": ("raw", "embedding"),
        "bias": ("raw", "embedding"),
    }
    reasons = {kept.name: kept.reason for kept in inventory.kept}
    assert reasons["token"] == reasons["scale"] == "vector"


def test_a_layer_of_one_output_is_no_vector():
    inventory = capture(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))).inventory
    assert [site.role for site in inventory.sites] == ["stem", "head"]


def test_a_frozen_layer_still_counts_as_one():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    assert roles(model) == {"2": "other", "4": "head"}


def test_modules_that_stay_calls_are_layers_too():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent, self.middle = nn.GRU(4, 8), nn.Linear(8, 8)
            self.attention, self.last = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

        def forward(self, x):
            y = self.middle(self.recurrent(x)[0])
            return y + self.attention(y, y, y)[0], self.last(y)

    found = roles(Tagger())
    assert found["middle"] == "residual_writer"
    assert found["last"] == "head"
    assert found["attention.in_proj_weight"] == found["attention.out_proj"] == "other"


class MaskedByInputs(nn.Module):
    """Adds to the scores of attention what it makes of the inputs; a branch adds to these too."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
        self.head = nn.Linear(8, 11)

    def forward(self, ids, times):
        x = self.tokens(ids)
        scores = self.q(x) @ self.k(x).mT + (ids == 0).float()[:, None] * -1e4
        x = x + self.o(scores.softmax(-1) @ self.v(x))
        times = times + self.b(self.a(times).relu())
        return self.head(x * times[..., None])


def test_a_mask_made_of_inputs_is_no_stream_but_inputs_are():
    found = roles(MaskedByInputs(), torch.randint(11, (2, 5)), torch.randn(2, 5))
    assert {found[name] for name in "qkv"} == {"parallel_projection"}
    assert found["o"] == found["b"] == "residual_writer"
    assert found["a"] != "residual_writer"
