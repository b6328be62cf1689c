"""A bank owns the tensors of its generator and generates the same weights wherever it goes."""

import copy

import pytest
import torch

from npas_fx.banks import Bank
from npas_fx.generators import GENERATORS, Moments
from npas_fx.generators.generator import num_parameters
from npas_fx.ir import Size

SHAPES = ((4, 6), (3, 6), (2, 3, 4))
SIZE = Size(num_templates=3, template_size=12, num_partial=5)


def make(name="wavg", shapes=SHAPES, size=SIZE, dtype=torch.float32, mean=0.0, seed=0):
    bank = Bank(GENERATORS[name], shapes, size, dtype=dtype, device=torch.device("cpu"))
    random = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=random) for shape in shapes]
    weights = [
        (weight - weight.mean()) / weight.std(correction=0) * (0.5 + k) + mean
        for k, weight in enumerate(drawn)
    ]
    bank.birth(weights, random)
    return bank


def test_a_held_row_keeps_its_value_and_gets_no_gradient():
    weights = [torch.randn(shape) for shape in SHAPES]
    bank = Bank(
        GENERATORS["wavg"],
        SHAPES,
        SIZE,
        dtype=torch.float32,
        device=torch.device("cpu"),
        held_rows={1: 2},
    )
    bank.birth(weights, torch.Generator().manual_seed(0))
    _, generated, _ = bank()
    assert torch.equal(generated[2], weights[1][2])
    free, wanted = Moments.of(generated[:2]), Moments.of(weights[1][:2])
    assert free.mean == pytest.approx(wanted.mean, abs=0.03 * wanted.std)
    assert free.std == pytest.approx(wanted.std, rel=0.03)
    gradients = torch.autograd.grad(generated[2].sum(), bank.parameters(), allow_unused=True)
    assert not any(gradient.any() for gradient in gradients if gradient is not None)
    assert "held_row_1" in bank.state_dict()


@pytest.mark.parametrize("name", ["wavg", "tied"])
def test_counts_shapes_and_names(name):
    shapes = ((4, 6),) * 3 if name == "tied" else SHAPES
    size = Size(num_templates=1, template_size=24, num_partial=5) if name == "tied" else SIZE
    bank = make(name, shapes, size)
    owned = sum(parameter.numel() for parameter in bank.parameters())
    assert owned == num_parameters(GENERATORS[name], shapes, size)
    assert [tuple(weight.shape) for weight in bank()] == list(shapes)
    assert all(parameter.requires_grad for parameter in bank.parameters())
    assert set(bank.state_dict()) == set(bank.tensors())
    assert name in str(bank)


@pytest.mark.parametrize("mean", [0.0, 2.0])
def test_state_dict_round_trip_keeps_the_offset(mean):
    bank, other = make(mean=mean), make(mean=5.0 - mean, seed=1)
    assert list(bank.offset_sites) == bank.offset.nonzero().flatten().tolist()
    assert len(bank.offset_sites) == 3 or mean == 0
    other.load_state_dict(bank.state_dict())
    assert other.offset_sites == bank.offset_sites
    for mine, theirs in zip(other(), bank(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_bank_without_offsets_knows_it():
    bank = make()
    bank.load_state_dict({**bank.state_dict(), "offset": torch.zeros(3)})
    assert bank.offset_sites == ()
    before = bank()
    bank.load_state_dict({**bank.state_dict(), "offset": torch.ones(3)})
    assert bank.offset_sites == (0, 1, 2)
    for a, b in zip(bank(), before, strict=True):
        torch.testing.assert_close(a, b + 1)


def test_the_seed_decides_and_the_global_one_does_not():
    state = torch.get_rng_state()
    first = make()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again, other = make(), make(seed=1)
    assert torch.equal(first.templates, again.templates)
    assert not torch.equal(first.templates, other.templates)


def test_autocast_does_not_touch_the_weights():
    bank = make()
    plain = bank()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = bank()
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    for a, b in zip(plain, mixed, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    bank = make(dtype=dtype)
    weights = bank()
    assert {weight.dtype for weight in weights} == {dtype}
    for k, weight in enumerate(weights):
        assert Moments.of(weight).std == pytest.approx(0.5 + k, rel=0.05)


def test_copies_and_moves():
    bank = make()
    copied = copy.deepcopy(bank)
    assert all(torch.equal(a, b) for a, b in zip(copied(), bank(), strict=True))
    assert copied.double()()[0].dtype == torch.float64


def test_every_tensor_gets_a_gradient():
    bank = make(mean=1.0)
    with torch.no_grad():
        bank.partial.normal_()
    sum((weight * torch.randn_like(weight)).sum() for weight in bank()).backward()
    assert all(parameter.grad.abs().min() > 0 for parameter in bank.parameters())
