"""Roles come from the graph: small truth tables, equal under renaming."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from npas_fx.passes.capture import capture


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


def roles(model):
    return {site.name.removesuffix(".weight"): site.role for site in capture(model).inventory.sites}


@pytest.mark.parametrize("kind", TRUTH)
def test_truth_tables(kind):
    found = roles(kind())
    expected = TRUTH[kind]
    different = {name: found[name] for name in expected if found[name] != expected[name]}
    assert found.keys() == expected.keys()
    assert not different


class Renamed(nn.Module):
    """Gives children other names, under which nothing can be read off."""

    def __setattr__(self, name, value):
        is_child = isinstance(value, nn.Module)
        nn.Module.__setattr__(self, f"head_embedding_{name[::-1]}" if is_child else name, value)

    def __getattr__(self, name):
        children = vars(self)["_modules"]
        return children.get(f"head_embedding_{name[::-1]}") or nn.Module.__getattr__(self, name)


@pytest.mark.parametrize("kind", TRUTH)
def test_names_do_not_matter(kind, monkeypatch):
    plain = capture(kind()).inventory.sites
    for part in (MLP, ResidualBlock, ResidualCNN, Attention, Block, GPT):
        for name in ("__setattr__", "__getattr__"):
            monkeypatch.setattr(part, name, vars(Renamed)[name], raising=False)
    renamed = capture(kind()).inventory.sites
    assert {site.name for site in renamed}.isdisjoint(site.name for site in plain)
    assert [(s.role, s.depth, s.kind, s.shape) for s in renamed] == [
        (s.role, s.depth, s.kind, s.shape) for s in plain
    ]


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
