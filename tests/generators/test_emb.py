"""Layer embeddings: coefficients follow from a few numbers of each weight."""

import math
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given

from generating import (
    check_gradients,
    check_gradients_everywhere,
    check_half_precision,
    check_one_graph,
)
from npas_fx.errors import NPASError
from npas_fx.generators import Moments
from npas_fx.generators.birth import MEAN_TOLERANCE
from npas_fx.generators.emb import MOST_COST, LayerEmbedding
from npas_fx.generators.generator import num_parameters
from npas_fx.generators.wavg import WeightedAverage
from npas_fx.ir import Size

EMB = LayerEmbedding()
WAVG = WeightedAverage()
GROUPS = [
    ((8, 12),) * 4,
    ((16, 12),) * 20,
    ((32, 16), (16, 32), (64, 8), (8, 64)) * 3,
    ((16, 3, 3, 3), (32, 16, 3, 3), (64, 32, 3, 3)),
]


@st.composite
def banks(draw):
    """A generator, shapes and a size that is not refused."""
    shape = st.tuples(st.integers(1, 6), st.integers(2, 8))
    shapes = tuple(draw(st.lists(shape, min_size=2, max_size=8)))
    size = Size(
        num_templates=draw(st.integers(1, 6)),
        template_size=draw(st.integers(1, max(map(math.prod, shapes)))),
        num_partial=draw(st.integers(0, 12)),
    )
    emb = LayerEmbedding(draw(st.sampled_from([1, 2, 3, 24])))
    assume(not emb.refuse(shapes, size))
    return emb, shapes, size


def wanted(shapes):
    return [Moments(mean=0.1 * k, std=0.5 + k) for k in range(len(shapes))]


def born(emb, shapes, size, seed=0, moments=None):
    random = torch.Generator().manual_seed(seed)
    return emb.birth(shapes, size, moments or wanted(shapes), random)


def finished(emb, tensors, shapes, size):
    weights = emb.generate(tensors, shapes, size)
    return [weight + offset for weight, offset in zip(weights, tensors["offset"], strict=True)]


def moved(emb, tensors, shapes, size):
    """Parameters off their births, so that none is zero."""
    torch.manual_seed(0)
    return {
        key: (tensors[key] + torch.randn_like(tensors[key])).requires_grad_()
        for key in emb.parameters(shapes, size)
    }


@given(banks())
def test_tiles_are_mixed_by_the_map_of_their_place(bank):
    emb, shapes, size = bank
    tensors = born(*bank)
    tensors |= {key: value.detach() for key, value in moved(emb, tensors, shapes, size).items()}
    row, count = 0, size.num_templates
    for site, weight in enumerate(emb.generate(tensors, shapes, size)):
        for place, tile in enumerate(weight.flatten().split(size.template_size)):
            matrix = tensors["projections"][place * count : (place + 1) * count].double()
            mixed = matrix @ tensors["embeddings"][site].double() + tensors["biases"][place]
            expected = mixed @ tensors["templates"][:, : len(tile)].double()
            for k in range(size.partial_rows):
                more = tensors["partial"][0, k * size.template_size :][: len(tile)]
                more = more[: size.template_size].double()
                expected[: len(more)] += tensors["partial_coefficients"][row, k] * more
            expected *= tensors["gain"][site]
            torch.testing.assert_close(tile.double(), expected, rtol=1e-4, atol=1e-4)
            row += 1
        assert weight.shape == shapes[site]


@given(banks())
def test_it_owns_what_it_declares(bank):
    emb, shapes, size = bank
    parameters, buffers = emb.parameters(shapes, size), emb.buffers(shapes, size)
    assert not parameters.keys() & buffers.keys()
    drawn = {key: tuple(tensor.shape) for key, tensor in born(*bank).items()}
    assert drawn == {**parameters, **buffers, "offset": (len(shapes),)}
    count, width = size.num_templates, min(emb.width, size.num_templates)
    tiles = math.ceil(max(map(math.prod, shapes)) / size.template_size)
    owned = count * size.template_size + size.num_partial
    owned += len(shapes) * width + tiles * count * (width + 1)
    assert num_parameters(emb, shapes, size) == owned
    assert all(len(shape) == 2 for shape in parameters.values())


@given(banks())
def test_births_have_the_moments(bank):
    emb, shapes, size = bank
    weights = finished(emb, born(*bank), shapes, size)
    for moments, weight in zip(wanted(shapes), weights, strict=True):
        found = Moments.of(weight)
        assert found.std == pytest.approx(moments.std, rel=1e-3)
        assert abs(found.mean - moments.mean) <= 1.1 * MEAN_TOLERANCE * moments.std + 1e-6


def test_coefficients_start_with_norm_one_in_expectation():
    shapes, size = ((40, 50),) * 30, Size(num_templates=8, template_size=20)
    tensors = born(EMB, shapes, size, moments=[Moments(mean=0.0, std=0.1)] * 30)
    maps = tensors["projections"].view(100, 8, 8)
    rows = torch.einsum("jkd,sd->sjk", maps, tensors["embeddings"])
    assert rows.square().sum(2).mean() == pytest.approx(1, rel=0.1)
    assert all(0.8 < gain < 1.25 for gain in tensors["gain"].tolist())
    assert not tensors["biases"].any()


@given(banks(), st.lists(st.sampled_from([0.0, 1.0, -0.3]), min_size=1))
def test_constant_weights_are_exact_and_can_be_trained(bank, values):
    emb, shapes, size = bank
    moments = [
        Moments(mean=values[k], std=0.0) if k < len(values) else other
        for k, other in enumerate(wanted(shapes))
    ]
    tensors = born(*bank, moments=moments)
    embeddings = tensors["embeddings"].requires_grad_()
    weights = finished(emb, tensors, shapes, size)
    for weight, value in zip(weights, values, strict=False):
        assert torch.equal(weight, torch.full_like(weight, value))
    total = sum((weight * torch.randn_like(weight)).sum() for weight in weights)
    assert torch.autograd.grad(total, embeddings)[0].ne(0).all()


@given(banks())
def test_each_element_of_each_parameter_counts(bank):
    generator, shapes, size = bank
    tensors = born(*bank)
    tensors |= moved(generator, tensors, shapes, size)
    check_gradients_everywhere(generator, tensors, shapes, size)


@given(banks())
def test_gradients_are_those_of_the_formula(bank):
    generator, shapes, size = bank
    check_gradients(generator, born(*bank), shapes, size)


@given(banks())
def test_the_seed_decides(bank):
    first, again, other = (born(*bank, seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    for key in ("templates", "embeddings", "projections"):
        assert not torch.equal(first[key], other[key])


@pytest.mark.parametrize("width", [1, 3, 24])
def test_coefficients_of_all_weights_lie_in_as_many_dimensions_as_embeddings_have(width):
    shapes = ((12, 10),) * 30
    size = Size(num_templates=6, template_size=10)
    emb = LayerEmbedding(width)
    tensors = {key: tensor.double() for key, tensor in born(emb, shapes, size).items()}
    weights = torch.stack([weight.flatten() for weight in emb.generate(tensors, shapes, size)])
    assert torch.linalg.matrix_rank(weights, rtol=1e-6) == min(width, 6)


def test_a_weight_has_the_rank_that_its_templates_allow():
    shapes, size = ((12, 10),) * 3, Size(num_templates=6, template_size=10)
    tensors = {key: tensor.double() for key, tensor in born(EMB, shapes, size).items()}
    for weight in EMB.generate(tensors, shapes, size):
        assert torch.linalg.matrix_rank(weight, rtol=1e-6) == 6


@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize("shapes", GROUPS, ids=str)
def test_proposals_are_valid_and_cost_little_more_than_those_of_wavg(shapes, above):
    sizes = list(EMB.propose(shapes, above=above))
    assert sizes
    assert len(set(sizes)) == len(sizes)
    for size in sizes:
        assert EMB.refuse(shapes, size) is None
        assert size.num_templates > 1
        dearer = num_parameters(EMB, shapes, size) / num_parameters(WAVG, shapes, size)
        assert dearer <= MOST_COST


def test_many_weights_of_many_tiles_are_cheaper_than_with_wavg():
    shapes, size = ((64, 64),) * 20, Size(num_templates=4, template_size=64)
    wavg = num_parameters(WAVG, shapes, size) - 4 * 64
    assert wavg == 20 * 64 * 4
    assert num_parameters(EMB, shapes, size) - 4 * 64 == 20 * 4 + 64 * 4 * 5 < wavg


@given(banks(), st.integers(0, 200))
def test_a_larger_bank_is_valid_and_affordable(bank, money):
    emb, shapes, size = bank
    larger = emb.enlarge(shapes, size, money)
    if larger is None:
        return
    assert larger != size
    assert num_parameters(emb, shapes, larger) - num_parameters(emb, shapes, size) <= money
    assert emb.refuse(shapes, larger) is None


def test_banks_grow():
    shapes = ((8, 8),) * 6
    longer = EMB.enlarge(shapes, Size(num_templates=4, template_size=20), 100)
    assert longer.num_templates == 4
    assert 20 < longer.template_size <= 36
    # One more template of 64 elements makes maps 4 x 4, and an embedding one longer.
    whole = Size(num_templates=3, template_size=64)
    cost = 64 + 6 + (4 * 4 - 3 * 3) + 1
    assert EMB.enlarge(shapes, whole, cost) == replace(whole, num_templates=4)
    assert EMB.enlarge(shapes, whole, cost - 1) is None


def test_what_is_refused():
    two, size = ((4, 6),) * 2, Size(num_templates=2, template_size=12)
    assert EMB.refuse(two, size) is None
    assert "two weights" in EMB.refuse(two[:1], size)
    assert not list(EMB.propose(two[:1], above=True))
    assert "1 to 24 elements" in EMB.refuse(two, replace(size, template_size=25))
    assert "rank" in EMB.refuse(two, replace(size, rank=1))
    with pytest.raises(NPASError, match="width=0"):
        LayerEmbedding(0)


def test_it_compiles_and_keeps_half_precision():
    shapes, size = ((6, 7), (5,)), Size(num_templates=3, template_size=8, num_partial=3)
    tensors = born(EMB, shapes, size)
    check_one_graph(EMB, tensors, shapes, size)
    check_half_precision(EMB, tensors, shapes, size, atol=0.1)


def test_its_computation_counts_the_maps():
    shapes, size = ((8, 8), (4, 5)), Size(num_templates=4, template_size=16, num_partial=3)
    assert EMB.flops(shapes, size) == 2 * 84 * (4 + 1) + 2 * 2 * (4 * 4) * 4
    assert EMB.describe(shapes, size) == (64 / 84, 4, 3, None)
