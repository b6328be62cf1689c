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


def make_both(shapes, parts, held_rows, name="wavg"):
    """A bank of fused weights, one of all their parts as weights of their own, and the weights."""
    how = {"dtype": torch.float32, "device": torch.device("cpu")}
    starts = [sum(number for number, _ in parts[:place]) for place in range(len(parts))]
    fused = Bank(GENERATORS[name], shapes, SIZE, parts=parts, held_rows=held_rows, **how)
    apart = Bank(
        GENERATORS[name],
        [tuple(part.shape) for part in cut([torch.empty(shape) for shape in shapes], parts)],
        SIZE,
        held_rows={starts[place]: row for place, row in held_rows.items()},
        **how,
    )
    random = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(shape, generator=random)
        * torch.linspace(0.5, 2, shape[axis]).view(
            [-1 if k == axis else 1 for k in range(len(shape))]
        )
        + 0.3
        for shape, (_, axis) in zip(shapes, parts, strict=True)
    ]
    fused.birth(weights, torch.Generator().manual_seed(1))
    apart.birth(cut(weights, parts), torch.Generator().manual_seed(1))
    return fused, apart, weights


def cut(weights, parts):
    return [part for w, each in zip(weights, parts, strict=True) for part in w.chunk(*each)]


WITH_FUSED = {
    "rows": (((3, 6), (6, 4), (2, 3, 4)), ((1, 0), (3, 0), (1, 0)), {}),
    "columns": (((3, 6), (4, 6), (2, 3, 4)), ((1, 0), (3, 1), (1, 0)), {}),
    "first and last": (((4, 6), (3, 4), (8, 3)), ((2, 1), (1, 0), (4, 0)), {}),
    "a held row before": (((4, 6), (6, 4), (3, 4)), ((1, 0), (3, 0), (1, 0)), {0: 2}),
    "a held row behind": (((4, 6), (6, 4), (5, 4)), ((2, 1), (3, 0), (1, 0)), {2: 0}),
    "all fused": (((4, 6), (6, 4)), ((2, 0), (2, 1)), {}),
}


@pytest.mark.parametrize("name", WITH_FUSED)
def test_a_fused_weight_is_its_parts_joined(name):
    shapes, parts, held_rows = WITH_FUSED[name]
    fused, apart, _ = make_both(*WITH_FUSED[name])
    for mine, theirs in zip(fused.tensors().values(), apart.tensors().values(), strict=True):
        assert torch.equal(mine, theirs)
    weights, separate = fused(), list(apart())
    assert [tuple(weight.shape) for weight in weights] == list(shapes)
    for weight, (number, axis) in zip(weights, parts, strict=True):
        assert torch.equal(weight, torch.cat([separate.pop(0) for _ in range(number)], axis))
    assert separate == []
    again, _, _ = make_both(shapes, parts, held_rows)
    again.load_state_dict(fused.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again(), weights, strict=True))


@pytest.mark.parametrize("name", WITH_FUSED)
def test_a_fused_weight_is_born_with_the_moments_of_its_parts_and_its_own(name):
    shapes, parts, held_rows = WITH_FUSED[name]
    fused, _, given = make_both(*WITH_FUSED[name])
    weights = list(fused())
    for place, row in held_rows.items():
        assert torch.equal(weights[place][row], given[place][row])
        free = [k for k in range(shapes[place][0]) if k != row]
        weights[place], given[place] = weights[place][free], given[place][free]
    pairs = zip([*weights, *cut(weights, parts)], [*given, *cut(given, parts)], strict=True)
    for found, wanted in ((Moments.of(a), Moments.of(b)) for a, b in pairs):
        assert found.mean == pytest.approx(wanted.mean, abs=0.05 * wanted.std)
        assert found.std == pytest.approx(wanted.std, rel=0.03)


def test_every_element_of_a_fused_weight_has_the_gradient_of_its_part():
    fused, apart, _ = make_both(*WITH_FUSED["first and last"])
    weights, parts = fused(), apart()
    factors = [torch.randn_like(weight) for weight in weights]
    cut_factors = cut(factors, WITH_FUSED["first and last"][1])
    sum((a * b).sum() for a, b in zip(weights, factors, strict=True)).backward()
    sum((a * b).sum() for a, b in zip(parts, cut_factors, strict=True)).backward()
    for mine, theirs in zip(fused.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
