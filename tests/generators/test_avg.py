"""Averages: which templates each tile averages, and that all of them count."""

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
from npas_fx.generators import Moments
from npas_fx.generators.avg import Average, cycle_subsets, draw_averaged, num_averaged
from npas_fx.generators.birth import MEAN_TOLERANCE
from npas_fx.generators.generator import num_parameters
from npas_fx.ir import Size

AVG = Average()
GROUPS = [
    ((8, 8),) * 4,
    ((24, 20),),
    ((16, 12), (8, 24)),
    ((24,), *((12,),) * 9),
    ((16, 3, 3, 3), (32, 16, 3, 3), (5,)),
    ((64, 64),) * 12,
]


@st.composite
def banks(draw):
    """Shapes and a size that is not refused."""
    shapes = tuple(draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 8)), min_size=1)))
    size = Size(
        num_templates=draw(st.integers(1, 8)),
        template_size=draw(st.integers(1, max(map(math.prod, shapes)))),
        num_partial=draw(st.integers(0, 12)),
    )
    assume(not AVG.refuse(shapes, size))
    return shapes, size


def born(shapes, size, seed=0, moments=None):
    moments = moments or wanted(shapes)
    return AVG.birth(shapes, size, moments, torch.Generator().manual_seed(seed))


def wanted(shapes):
    """Moments of which weights of one element have no deviation, as they cannot."""
    return [
        Moments(mean=0.1 * k, std=(0.5 + k) * (math.prod(shape) > 1))
        for k, shape in enumerate(shapes)
    ]


def finished(tensors, shapes, size):
    weights = AVG.generate(tensors, shapes, size)
    return [weight + offset for weight, offset in zip(weights, tensors["offset"], strict=True)]


def trained(tensors, shapes, size):
    """Parameters moved off their births, so that none is zero."""
    return {
        key: (tensors[key] + 0.1 * torch.randn_like(tensors[key])).requires_grad_()
        for key in AVG.parameters(shapes, size)
    }


@given(banks())
def test_a_tile_is_the_mean_of_its_templates(bank):
    shapes, size = bank
    tensors = born(shapes, size)
    tensors |= {key: torch.randn_like(tensors[key]) for key in AVG.parameters(shapes, size)}
    row = 0
    for site, weight in enumerate(AVG.generate(tensors, shapes, size)):
        for tile in weight.flatten().split(size.template_size):
            chosen = tensors["averaged"][row].nonzero()[:, 0]
            mean = tensors["templates"][chosen, : len(tile)].double().mean(0)
            expected = mean * math.sqrt(len(chosen))
            for k in range(size.partial_rows):
                more = tensors["partial"][0, k * size.template_size :][: len(tile)]
                more = more[: size.template_size].double()
                expected[: len(more)] += tensors["partial_coefficients"][row, k] * more
            expected *= tensors["gain"][site]
            torch.testing.assert_close(tile.double(), expected, rtol=1e-5, atol=1e-5)
            row += 1
        assert weight.shape == shapes[site]
    assert row == len(tensors["averaged"])


@given(banks())
def test_it_owns_what_it_declares_and_no_coefficients(bank):
    shapes, size = bank
    parameters, buffers = AVG.parameters(shapes, size), AVG.buffers(shapes, size)
    assert not parameters.keys() & buffers.keys()
    drawn = {key: tuple(tensor.shape) for key, tensor in born(shapes, size).items()}
    assert drawn == {**parameters, **buffers, "offset": (len(shapes),)}
    owned = size.num_templates * size.template_size + size.num_partial + len(shapes)
    assert num_parameters(AVG, shapes, size) == owned


@given(banks())
def test_births_have_the_moments_and_gains_near_one(bank):
    shapes, size = bank
    tensors = born(shapes, size)
    for moments, weight in zip(wanted(shapes), finished(tensors, shapes, size), strict=True):
        found = Moments.of(weight)
        assert found.std == pytest.approx(moments.std, rel=1e-3)
        assert abs(found.mean - moments.mean) <= 1.1 * MEAN_TOLERANCE * moments.std + 1e-6


def test_gains_start_near_one_however_many_are_averaged():
    shapes, size = ((64, 64),) * 2, Size(num_templates=8, template_size=100)
    assert num_averaged(82, 8) == 4
    tensors = born(shapes, size, moments=[Moments(mean=0.0, std=0.3)] * 2)
    assert all(0.8 < gain < 1.25 for gain in tensors["gain"].tolist())


@given(banks(), st.lists(st.sampled_from([0.0, 1.0, -0.3]), min_size=1))
def test_constant_weights_are_exact_and_can_be_trained(bank, values):
    shapes, size = bank
    moments = [
        Moments(mean=values[k], std=0.0) if k < len(values) else other
        for k, other in enumerate(wanted(shapes))
    ]
    tensors = born(shapes, size, moments=moments)
    gain = tensors["gain"].requires_grad_()
    weights = finished(tensors, shapes, size)
    for weight, value in zip(weights, values, strict=False):
        assert torch.equal(weight, torch.full_like(weight, value))
    (gradient,) = torch.autograd.grad(sum(w.mul(torch.randn_like(w)).sum() for w in weights), gain)
    assert gradient.abs().min() > 0


@given(st.integers(1, 400), st.integers(1, 16))
def test_no_two_tiles_average_the_same_templates_while_there_are_others(num_rows, num_templates):
    averaged = draw_averaged(num_rows, num_templates)
    number = num_averaged(num_rows, num_templates)
    different = {tuple(row.nonzero()[:, 0].tolist()) for row in averaged}
    most = max(math.comb(num_templates, m) for m in range(1, num_templates + 1))
    assert len(different) == min(num_rows, most)
    torch.testing.assert_close(averaged.norm(dim=1), torch.ones(num_rows))
    assert (averaged > 0).sum(1).eq(number).all()


@pytest.mark.parametrize(
    ("num_rows", "num_templates", "number"),
    [
        *[(1, 1, 1), (9, 1, 1), (2, 2, 1), (3, 3, 2), (6, 4, 2), (7, 4, 2)],
        *[(28, 8, 2), (29, 8, 3), (56, 8, 3), (57, 8, 4), (999, 8, 4)],
        (4, 12, 3),  # four pairs would leave four templates out
    ],
)
def test_as_few_are_averaged_as_tell_tiles_apart(num_rows, num_templates, number):
    assert num_averaged(num_rows, num_templates) == number


@given(st.integers(1, 400), st.integers(1, 16))
def test_templates_are_used_evenly(num_rows, num_templates):
    number = num_averaged(num_rows, num_templates)
    uses = draw_averaged(num_rows, num_templates).count_nonzero(0)
    assert uses.max() - uses.min() <= number
    assert uses.min() > 0 or num_rows * number < num_templates
    cycle = math.comb(num_templates, number)
    whole = torch.zeros(num_templates, dtype=torch.long)
    for _, subset in zip(range(cycle), cycle_subsets(num_templates, number), strict=False):
        whole[list(subset)] += 1
    assert whole.eq(cycle * number // num_templates).all()


@given(st.integers(1, 12), st.integers(1, 40))
def test_tiles_span_all_templates(num_templates, num_rows):
    assume(num_rows != num_templates)
    averaged = draw_averaged(num_rows, num_templates).double()
    assert torch.linalg.matrix_rank(averaged) == min(num_rows, num_templates)


@pytest.mark.parametrize(("num_templates", "tiles", "length"), [(5, 9, 12), (8, 20, 6), (3, 4, 7)])
def test_a_weight_has_the_rank_that_its_templates_allow(num_templates, tiles, length):
    shapes = ((tiles, length),) * 3
    size = Size(num_templates=num_templates, template_size=length)
    tensors = {key: tensor.double() for key, tensor in born(shapes, size).items()}
    for weight in AVG.generate(tensors, shapes, size):
        assert torch.linalg.matrix_rank(weight, rtol=1e-6) == min(num_templates, length)


@given(banks())
def test_each_element_of_each_parameter_counts(bank):
    shapes, size = bank
    torch.manual_seed(0)
    tensors = born(shapes, size)
    check_gradients_everywhere(AVG, {**tensors, **trained(tensors, shapes, size)}, shapes, size)


@given(banks())
def test_gradients_are_those_of_the_formula(bank):
    shapes, size = bank
    check_gradients(AVG, born(shapes, size), shapes, size)


@given(banks())
def test_the_seed_decides_on_templates_but_not_on_what_is_averaged(bank):
    first, again, other = (born(*bank, seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["templates"], other["templates"])
    assert torch.equal(first["averaged"], other["averaged"])


@pytest.mark.parametrize("shapes", GROUPS, ids=str)
def test_proposals_are_valid_distinct_and_below_the_weights(shapes):
    sizes = list(AVG.propose(shapes, above=True))
    total = sum(map(math.prod, shapes))
    assert sizes
    assert len(set(sizes)) == len(sizes)
    for size in sizes:
        assert AVG.refuse(shapes, size) is None
        assert size.num_templates > 1
        assert num_parameters(AVG, shapes, size) - len(shapes) <= total
    smallest = min(num_parameters(AVG, shapes, size) for size in sizes)
    assert smallest <= max(4 * math.sqrt(total), total / 2) + len(shapes)


@pytest.mark.parametrize("shapes", GROUPS, ids=str)
def test_no_proposed_tile_below_one_layer_need_be_a_copy(shapes):
    numels = [math.prod(shape) for shape in shapes]
    for size in AVG.propose(shapes, above=False):
        rows, count = size.rows(numels), size.num_templates
        if size.template_size < max(numels) and count < 16:
            assert len(draw_averaged(rows, count).unique(dim=0)) == rows


@given(banks(), st.integers(0, 200))
def test_a_larger_bank_is_valid_and_affordable(bank, money):
    shapes, size = bank
    larger = AVG.enlarge(shapes, size, money)
    if larger is None:
        return
    more = num_parameters(AVG, shapes, larger) - num_parameters(AVG, shapes, size)
    assert 0 < more <= money
    assert AVG.refuse(shapes, larger) is None


def test_banks_grow():
    shapes = ((8, 8),) * 6
    longer = AVG.enlarge(shapes, Size(num_templates=5, template_size=20), 100)
    assert longer.num_templates == 5
    assert 20 < longer.template_size <= 36
    whole = Size(num_templates=3, template_size=64)
    assert AVG.enlarge(shapes, whole, 100) == replace(whole, num_templates=4)
    assert AVG.enlarge(shapes, whole, 63) is None
    assert AVG.enlarge(shapes, replace(whole, num_templates=6), 100) is None


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (Size(num_templates=0, template_size=4), "at least one template"),
        (Size(num_templates=2, template_size=1), "equal elements"),
        # Only the tile of the large weight is as long as a template, and averages one of them.
        (Size(num_templates=2, template_size=20), "read all of 2"),
        (Size(num_templates=2, template_size=12, rank=1), "rank"),
    ],
    ids=str,
)
def test_what_is_refused(size, words):
    assert words in AVG.refuse(((24,), *((12,),) * 9), size)


def test_it_compiles_and_keeps_half_precision():
    shapes, size = ((6, 7), (5,)), Size(num_templates=3, template_size=8, num_partial=3)
    tensors = born(shapes, size)
    check_one_graph(AVG, tensors, shapes, size)
    check_half_precision(AVG, tensors, shapes, size)


def test_it_is_priced_by_what_a_tile_averages():
    shapes, size = ((8, 8),) * 5, Size(num_templates=6, template_size=20)
    mixture = AVG.describe(shapes, size)
    assert mixture.share == 120 / 320
    assert mixture.templates == num_averaged(20, 6) == 3
    assert mixture.parts == 4
    assert AVG.flops(shapes, size) == 2 * 320 * 6
