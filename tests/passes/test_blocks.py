"""Repeated blocks: the same operations on weights of the same shapes, whatever their names."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from models import MODELS
from npas_fx.ir import Repeats
from npas_fx.passes.capture import capture
from zoo import ZOO, large_at_night


class Block(nn.Module):
    """A residual block; ``forward`` is handed in, so that blocks can differ in it."""

    def __init__(self, body, width=8, dropout=0.0, **layers):
        super().__init__()
        self.body = body
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.body(self, x)


def plain(block, x):
    return x + block.dropout(block.down(functional.gelu(block.up(block.norm(x)))))


def find(*blocks: nn.Module) -> list[tuple[str, ...]]:
    return [repeats.paths for repeats in repeats_of(nn.Sequential(*blocks))]


def repeats_of(model: nn.Module) -> tuple[Repeats, ...]:
    return capture(model).inventory.repeats


def test_equal_blocks_are_found_with_weights_in_matching_order():
    model = nn.Sequential(nn.Linear(4, 8), *(Block(plain, dropout=0.1 * k) for k in range(3)))
    (repeats,) = repeats_of(model)
    assert repeats.paths == ("1", "2", "3")
    assert repeats.sites == tuple((f"{k}.up.weight", f"{k}.down.weight") for k in (1, 2, 3))


class Other(nn.Module):
    """What ``Block`` computes, under another class and other names, made in another order."""

    def __init__(self, width=8):
        super().__init__()
        self.q = nn.Linear(2 * width, width)
        self.z = nn.Dropout(0.5)
        self.a = nn.Linear(width, 2 * width)
        self.first = nn.LayerNorm(width)

    def forward(self, embedding):
        head = self.a(self.first(embedding))
        return embedding + self.z(self.q(functional.gelu(head)))


def test_names_classes_and_the_order_of_layers_do_not_matter():
    (repeats,) = repeats_of(nn.Sequential(Block(plain), Other()))
    assert repeats.paths == ("0", "1")
    assert repeats.sites == (("0.up.weight", "0.down.weight"), ("1.a.weight", "1.q.weight"))


def other_activation(block, x):
    return x + block.dropout(block.down(functional.relu(block.up(block.norm(x)))))


def difference(block, x):
    return x - block.dropout(block.down(functional.gelu(block.up(block.norm(x)))))


def no_residual(block, x):
    return block.dropout(block.down(functional.gelu(block.up(block.norm(x)))))


def reversed_difference(block, x):
    return block.dropout(block.down(functional.gelu(block.up(block.norm(x))))) - x


def norm_shared(block, x):
    y = block.norm(x)
    return block.down(functional.gelu(block.up(y))) + y


def norm_twice(block, x):
    return block.down(functional.gelu(block.up(block.norm(x)))) + block.norm(x)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (plain, other_activation),
        (plain, difference),
        (plain, no_residual),
        (difference, reversed_difference),
        (norm_shared, norm_twice),
    ],
)
def test_blocks_that_compute_something_else_are_others(one, two):
    assert find(Block(one), Block(two)) == []
    assert find(Block(one), Block(two), Block(two)) == [("1", "2")]


def test_shapes_dtypes_and_strides_matter():
    assert find(Block(plain, 8), Block(plain, 8), nn.Linear(8, 12), Block(plain, 12)) == [
        ("0", "1")
    ]
    assert find(Block(plain), Block(plain).double()) == []

    class Conv(nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3, **options), nn.BatchNorm2d(4)

        def forward(self, x):
            return torch.relu(self.norm(self.conv(x)))

    assert find(Conv(), Conv(stride=2), Conv(padding=1), Conv(dilation=2), Conv(groups=2)) == []
    assert find(Conv(stride=2), Conv(), Conv(stride=2)) == [("0", "2")]


def test_only_the_largest_blocks_are_listed():
    def group():
        return nn.Sequential(Block(plain), Block(other_activation))

    assert find(group(), group()) == [("0", "1")]
    # Outside of the groups the same block occurs once more, but alone.
    assert find(group(), group(), Block(plain)) == [("0", "1")]
    assert find(group(), group(), Block(plain), Block(plain)) == [("0", "1"), ("2", "3")]


def test_a_container_of_one_block_is_not_a_block_of_its_own():
    assert find(nn.Sequential(Block(plain))) == []
    assert find(nn.Sequential(Block(plain)), Block(plain)) == [("0.0", "1")]


def test_a_block_that_is_called_often_is_one():
    assert repeats_of(MODELS["recursive"].make()) == ()


def test_layers_alone_are_no_blocks():
    assert find(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)) == []


class Flat(nn.Module):
    """Residual blocks without modules of their own, between a first and a last layer."""

    def __init__(self, depth=4, width=8, inner=12):
        super().__init__()
        self.first, self.last = nn.Linear(4, width), nn.Linear(width, 3)
        self.ups = nn.ModuleList(nn.Linear(width, inner) for _ in range(depth))
        self.downs = nn.ModuleList(nn.Linear(inner, width) for _ in range(depth))

    def forward(self, x, mask):
        x = self.first(x).relu()
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + mask * down(functional.gelu(up(functional.layer_norm(x, x.shape[-1:]))))
        return self.last(x)


def test_blocks_without_modules_of_their_own():
    (repeats,) = repeats_of(Flat())
    assert repeats.paths == tuple(f"ups.{k} … downs.{k}" for k in range(4))
    assert repeats.sites == tuple((f"ups.{k}.weight", f"downs.{k}.weight") for k in range(4))
    assert repeats_of(Flat(depth=1)) == ()


@pytest.mark.parametrize(
    "name", large_at_night(["resnet50", "vit_tiny_patch16_224", "convnext_atto"])
)
def test_a_flattened_network_has_the_blocks_that_it_had(name):
    with torch.device("meta"):
        model = ZOO[name].make()
    flat = repeats_of(torch.fx.symbolic_trace(model))
    assert [repeats.sites for repeats in flat] == [repeats.sites for repeats in repeats_of(model)]


def test_branches_side_by_side_are_no_stretch_in_a_row():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))

        def forward(self, x):
            pairs = zip(self.layers[::2], self.layers[1::2], strict=True)
            return torch.stack([one(torch.tanh(other(x))) for one, other in pairs])

    assert repeats_of(Wide()) == ()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", [("layer1.0", "layer1.1")]),
        (
            "resnet50",
            [
                ("layer1.1", "layer1.2"),
                ("layer2.1", "layer2.2", "layer2.3"),
                tuple(f"layer3.{k}" for k in range(1, 6)),
                ("layer4.1", "layer4.2"),
            ],
        ),
        ("vit_tiny_patch16_224", [tuple(f"blocks.{k}" for k in range(12))]),
        ("mixer_s32_224", [tuple(f"blocks.{k}" for k in range(8))]),
        (
            "convnext_atto",
            [tuple(f"stages.{k}.blocks.{i}" for i in range(n)) for k, n in enumerate((2, 2, 6, 2))],
        ),
        ("mobilenetv3_small_100", [("blocks.2.1", "blocks.2.2"), ("blocks.4.1", "blocks.4.2")]),
        ("densenet121", []),  # each layer reads more channels than the one before
    ],
)
def test_blocks_of_real_networks(name, expected):
    with torch.device("meta"):
        model = ZOO[name].make()
    assert [repeats.paths for repeats in repeats_of(model)] == expected


def test_opaque_calls_of_other_settings_are_other_blocks():
    class Block(nn.Module):
        def __init__(self, heads):
            super().__init__()
            self.attention, self.fc = nn.MultiheadAttention(8, heads), nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(self.attention(x, x, x)[0])

    for heads, number in (((2, 2), 1), ((2, 4), 0)):
        captured = capture(nn.Sequential(*map(Block, heads)))
        assert len(captured.inventory.repeats) == number
