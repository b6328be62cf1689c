"""A layer that grows within its virtual shape keeps its elements, and its bank its tensors."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

import npas_fx
from npas_fx import NPASError, PlanError, generators
from npas_fx.banks import Bank
from npas_fx.generators import GENERATORS, Moments, Within, register_generator
from npas_fx.generators.birth import MEAN_TOLERANCE
from npas_fx.generators.generator import num_parameters
from npas_fx.generators.resized import Resized
from npas_fx.generators.stretching import RULES
from npas_fx.ir import Size
from npas_fx.verify import verify

WAVG_32 = Within(GENERATORS["wavg"], (32, 32))
SQUARES = ((4, 4), (6, 3))


@st.composite
def grown(draw):
    """A generator, the shapes of some weights, larger ones, and the size of their bank."""
    virtual = tuple(draw(st.lists(st.integers(1, 6), min_size=2, max_size=4)))
    name, count = draw(st.sampled_from(["wavg", "tied"])), draw(st.integers(1, 4))
    small, large = [], []
    for _ in range(count):
        large.append(tuple(draw(st.integers(1, most)) for most in virtual))
        small.append(tuple(draw(st.integers(1, most)) for most in large[-1]))
    longest = math.prod(virtual)
    size = Size(
        num_templates=draw(st.integers(1, 3)) if name == "wavg" else 1,
        template_size=draw(st.integers(1, longest)) if name == "wavg" else longest,
        num_partial=draw(st.integers(0, 5)),
    )
    return Within(GENERATORS[name], virtual), small, large, size


def bank_of(generator, shapes, size, parts=None, seed=0):
    """A new bank for random weights, and these."""
    torch.manual_seed(seed)
    weights = [torch.randn(shape) + k for k, shape in enumerate(shapes)]
    kind = {"dtype": torch.float32, "device": torch.device("cpu")}
    bank = Bank(generator, shapes, size, parts=parts, **kind)
    bank.birth(weights, torch.Generator().manual_seed(seed))
    if size.num_partial:
        bank.partial.data.normal_()
    return bank, weights


def prefix(weight, shape):
    return weight[tuple(slice(length) for length in shape)]


@given(grown())
def test_weights_of_one_bank_agree_where_both_have_elements(case):
    generator, small, large, size = case
    little, _ = bank_of(generator, small, size)
    big, _ = bank_of(generator, large, size, seed=1)
    big.load_state_dict(little.state_dict())
    assert [tuple(weight.shape) for weight in big()] == large
    for less, more in zip(little(), big(), strict=True):
        assert torch.equal(less, prefix(more, less.shape))
    for weight in generator.generate(little.tensors(), small, size):
        assert weight.is_contiguous()  # as plain weights are, for which torch picks its kernels


@given(grown(), st.integers(0, 9))
def test_births_differ_in_gain_and_offset_only(case, seed):
    generator, small, large, size = case
    moments = [
        Moments(mean=0.3 - k, std=0.5 + k if math.prod(shape) > 1 else 0.0)
        for k, shape in enumerate(small)
    ]
    little, big = (
        generator.birth(shapes, size, moments, torch.Generator().manual_seed(seed))
        for shapes in (small, large)
    )
    assert little.keys() == big.keys()
    for name in little.keys() - {"gain", "offset"}:
        assert torch.equal(little[name], big[name])
    same = {**big, "gain": little["gain"]}
    for less, more in zip(
        generator.generate(little, small, size), generator.generate(same, large, size), strict=True
    ):
        assert torch.equal(less, prefix(more, less.shape))


def test_gains_of_birth_differ_little_where_much_of_the_weight_is_used():
    size, moments = Size(num_templates=2, template_size=1024), [Moments(mean=0.0, std=1.0)] * 3
    gains = [
        WAVG_32.birth([(n, n)] * 3, size, moments, torch.Generator().manual_seed(0))["gain"]
        for n in (20, 28)
    ]
    torch.testing.assert_close(*gains, rtol=0.05, atol=0)


@given(grown())
def test_births_have_the_moments_of_what_is_used(case):
    generator, small, _, size = case
    bank, weights = bank_of(generator, small, size)
    if size.num_partial:
        bank.partial.data.zero_()  # as it is born
    for mine, replaced in zip(bank(), weights, strict=True):
        found, wanted = Moments.of(mine), Moments.of(replaced)
        assert found.std == pytest.approx(wanted.std, rel=1e-3)
        assert abs(found.mean - wanted.mean) <= 1.1 * MEAN_TOLERANCE * wanted.std + 1e-6


@pytest.mark.parametrize("name", ["wavg", "tied"])
def test_constant_weights_are_exact_and_can_be_trained(name):
    generator, shapes = Within(GENERATORS[name], (6, 6)), ((4, 5), (5, 4))
    size = Size(num_templates=1, template_size=36)
    values = (0.0, -0.3)
    bank, _ = bank_of(generator, shapes, size)
    bank.birth([torch.full(s, v) for s, v in zip(shapes, values, strict=True)], torch.Generator())
    assert all((w == torch.tensor(v)).all() for w, v in zip(bank(), values, strict=True))
    sum((weight * torch.randn_like(weight)).sum() for weight in bank()).backward()
    own = bank.coefficients if name == "wavg" else bank.gain
    assert own.grad.abs().min() > 0


def test_a_part_that_is_constant_gets_the_mean_only():
    generator, size = Within(Resized(RULES[0]), (64, 64)), Size(num_templates=1, template_size=16)
    assert generator.base.name == "wavg_bilinear"
    moments = [Moments(mean=0.5, std=1.0)] * 2
    shapes = [(8, 8), (40, 40)]
    tensors = generator.birth(shapes, size, moments, torch.Generator().manual_seed(0))
    weights = generator.generate(tensors, shapes, size)
    corner, most = (w + o for w, o in zip(weights, tensors["offset"], strict=True))
    torch.testing.assert_close(corner, torch.full((8, 8), 0.5))
    assert Moments.of(most).std == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("name", [name for name in GENERATORS if name != "dedicated"])
def test_weights_of_every_generator_grow(name):
    generator = Within(GENERATORS[name], (16, 12))
    small, large = [(9, 10), (16, 7), (12, 12)], [(13, 12), (16, 9), (16, 12)]
    proposed = list(generator.propose(small, above=False))
    for size in proposed or [Size(num_templates=2, template_size=50)]:  # emb saves nothing here
        assert generator.refuse(small, size) is None
        little, weights = bank_of(generator, small, size)
        big, _ = bank_of(generator, large, size, seed=1)
        big.load_state_dict(little.state_dict())
        for less, more, replaced in zip(little(), big(), weights, strict=True):
            assert torch.equal(less, prefix(more, less.shape))
            assert Moments.of(less).std == pytest.approx(Moments.of(replaced).std, rel=1e-3)


@given(grown())
def test_tensors_and_counts_are_those_of_the_virtual_weights(case):
    generator, small, large, size = case
    base, virtual = generator.base, [generator.shape] * len(small)
    for shapes in (small, large):
        assert generator.refuse(shapes, size) is None
        assert generator.parameters(shapes, size) == base.parameters(virtual, size)
        assert generator.buffers(shapes, size) == base.buffers(virtual, size)
        assert generator.describe(shapes, size) == base.describe(virtual, size)
        assert generator.flops(shapes, size) == base.flops(virtual, size)
        assert generator.enlarge(shapes, size, 99) == base.enlarge(virtual, size, 99)
        assert list(generator.propose(shapes, above=True)) == list(
            base.propose(virtual, above=True)
        )
        bank, _ = bank_of(generator, shapes, size)
        owned = sum(parameter.numel() for parameter in bank.parameters())
        assert owned == num_parameters(base, virtual, size)


def test_weights_that_do_not_fit_are_refused_and_nothing_is_proposed():
    size = Size(num_templates=1, template_size=16)
    for shape in ((33, 1), (1, 33), (32,), (2, 2, 2)):
        assert list(WAVG_32.propose([(2, 2), shape], above=True)) == []
        why = WAVG_32.refuse([(2, 2), shape], size)
        assert why == f"a weight of shape {shape} does not fit within (32, 32)"
    assert WAVG_32.refuse([(32, 32)], size) is None
    assert "1024" in WAVG_32.refuse([(2, 2)], Size(num_templates=1, template_size=1025))


def test_a_base_without_gains_is_refused():
    generator, size = (
        Within(GENERATORS["dedicated"], (2, 2)),
        Size(num_templates=1, template_size=4),
    )
    assert list(generator.propose([(1, 2)], above=True)) == []
    assert generator.refuse([(1, 2)], size) == "dedicated has no gain"


@pytest.mark.parametrize("shape", [(), (4, 0), (-1,), (4, 2.5)])
def test_shapes_have_axes_of_positive_length(shape):
    with pytest.raises(NPASError, match="give its axes"):
        Within(GENERATORS["wavg"], shape)


def test_the_name_says_base_and_shape():
    assert WAVG_32.name == "wavg_within_32x32"
    assert Within(GENERATORS["tied"], [64, 32, 3, 3]).name == "tied_within_64x32x3x3"


def test_weights_of_different_shapes_may_be_tied():
    generator, size = Within(GENERATORS["tied"], (6, 6)), Size(num_templates=1, template_size=36)
    assert list(generator.propose(SQUARES, above=False)) == [size]
    bank, _ = bank_of(generator, SQUARES, size)
    first, second = bank()
    a, b = (w - o for w, o in zip((first[:, :3], second[:4]), bank.offset, strict=True))
    torch.testing.assert_close(a / bank.gain[0], b / bank.gain[1])


def test_elements_that_no_weight_reaches_get_no_gradient():
    generator, size = Within(GENERATORS["tied"], (6, 6)), Size(num_templates=1, template_size=36)
    bank, _ = bank_of(generator, SQUARES, size)
    sum((weight * torch.randn_like(weight)).sum() for weight in bank()).backward()
    reached = bank.templates.grad.view(6, 6) != 0
    wanted = torch.zeros(6, 6, dtype=torch.bool)
    wanted[:4, :4] = wanted[:6, :3] = True
    assert torch.equal(reached, wanted)


def test_each_part_of_a_fused_weight_grows_by_itself():
    generator, size = Within(GENERATORS["wavg"], (8, 8)), Size(num_templates=2, template_size=20)
    little, _ = bank_of(generator, [(15, 5)], size, parts=[(3, 0)])
    big, _ = bank_of(generator, [(21, 7)], size, parts=[(3, 0)], seed=1)
    big.load_state_dict(little.state_dict())
    ((less,), (more,)) = little(), big()
    for mine, theirs in zip(less.chunk(3), more.chunk(3), strict=True):
        assert torch.equal(mine, theirs[:5, :5])


def mlp(hidden):
    torch.manual_seed(hidden)
    widths = (12, hidden, hidden, hidden, 6)
    layers = [nn.Linear(i, o) for i, o in itertools.pairwise(widths)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))


@pytest.fixture(scope="module")
def inputs():
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def little(inputs):
    return npas_fx.transform(mlp(20), 0.4, example_inputs=inputs, generators=[WAVG_32])


def planned(shared):
    return [bank for bank in shared.plan.banks if not bank.is_dedicated]


def test_a_network_counts_verifies_and_materializes(little, inputs):
    (bank,) = planned(little)
    assert bank.generator == "wavg_within_32x32"
    sites = len(bank.sites)
    assert bank.parameters == num_parameters(GENERATORS["wavg"], [(32, 32)] * sites, bank.size)
    model, owned = mlp(20), sum(p.numel() for p in little.parameters())
    plain = sum(p.numel() for name, p in model.named_parameters() if name not in bank.sites)
    assert owned == plain + bank.parameters == little.plan.parameters
    assert len(verify(little, model, inputs)) == 2
    own = dict(little.named_parameters())
    weights = npas_fx.weights_of(little)
    tensors = {name: weights.get(name, own.get(name)) for name, _ in model.named_parameters()}
    torch.testing.assert_close(little(inputs), functional_call(model, tensors, (inputs,)))
    assert torch.equal(npas_fx.materialize(little)(inputs), little(inputs))


def test_a_wider_network_takes_the_bank_over(little, inputs):
    wide = npas_fx.transform(
        mlp(28), 0.5, example_inputs=inputs, generators=[WAVG_32], pin=planned(little)
    )
    (bank,), (wide_bank,) = planned(little), planned(wide)
    assert bank == wide_bank
    banks = [next(m for m in net.modules() if isinstance(m, Bank)) for net in (little, wide)]
    banks[1].load_state_dict(banks[0].state_dict())
    before, after = npas_fx.weights_of(little), npas_fx.weights_of(wide)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert after[name].numel() > weight.numel()
        assert torch.equal(weight, prefix(after[name], weight.shape))


def test_saved_and_loaded_with_the_generator_given_again_or_registered(
    little, inputs, tmp_path, monkeypatch
):
    npas_fx.save(little, tmp_path)
    with pytest.raises(PlanError, match="no generator 'wavg_within_32x32'"):
        npas_fx.load(tmp_path, mlp(20))
    given = npas_fx.load(tmp_path, mlp(20), generators=[Within(GENERATORS["wavg"], (32, 32))])
    monkeypatch.setitem(generators._registered, WAVG_32.name, None)  # so that it goes afterwards
    register_generator(WAVG_32)
    for again in (given, npas_fx.load(tmp_path, mlp(20))):
        assert torch.equal(again(inputs), little(inputs))
