"""Weights are low-rank: coefficients of their own, times rows or columns that all share."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from generating import (
    check_gradients,
    check_gradients_everywhere,
    check_half_precision,
    check_one_graph,
)
from npas_fx.generators import Moments
from npas_fx.generators.basis import Basis
from npas_fx.generators.birth import MEAN_TOLERANCE
from npas_fx.generators.generator import num_parameters
from npas_fx.ir import Size

BASIS = Basis()


def matrix(shape):
    if shape[0] == 1 and len(shape) > 1:
        return matrix(shape[1:])
    return shape[0], math.prod(shape[1:])


def total_of(shapes):
    return sum(map(math.prod, shapes))


def sides(most):
    return st.integers(1, most)


def of_as_many_columns():
    """Linear and convolutional weights in one to three dimensions, columns alike."""

    def shapes_of(pair):
        (a, b), rows = pair
        kernels = [(a * b,), (a, b), (b, a, 1), (1, a, 1, b), (a, 1, b)]
        return tuple((row, *kernels[k % len(kernels)]) for k, row in enumerate(rows))

    columns = st.tuples(sides(4), sides(4))
    return st.tuples(columns, st.lists(sides(7), min_size=1, max_size=4)).map(shapes_of)


def of_as_many_rows():
    tails = st.lists(sides(4), min_size=1, max_size=4).filter(lambda tail: math.prod(tail) <= 36)
    return st.tuples(sides(7), st.lists(tails, min_size=1, max_size=4)).map(
        lambda pair: tuple((pair[0], *tail) for tail in pair[1])
    )


@st.composite
def banks(draw):
    """Shapes of weights that are no single elements, and a size that need not be worth it."""
    axis = draw(st.integers(0, 1))
    shapes = draw(of_as_many_columns() if axis else of_as_many_rows())
    if draw(st.booleans()):
        shapes = ((1, *shapes[0]), *shapes[1:])
    dimension = matrix(shapes[0])[axis]
    assume(all(matrix(shape)[axis] == dimension for shape in shapes))
    assume(all(math.prod(shape) > 1 for shape in shapes))
    size = Size(
        num_templates=draw(st.integers(1, dimension)),
        template_size=dimension,
        num_partial=draw(st.sampled_from([0, 1, dimension, dimension + 3])),
    )
    return shapes, size


def is_transposed(shapes, size):
    return any(matrix(shape)[1] != size.template_size for shape in shapes)


def born(shapes, size, moments=None, seed=0):
    moments = moments or [Moments(mean=0.1 * k, std=0.5 + k) for k in range(len(shapes))]
    return BASIS.birth(shapes, size, moments, torch.Generator().manual_seed(seed))


def random_tensors(shapes, size, dtype=torch.float64):
    torch.manual_seed(0)
    return {k: torch.randn_like(v).to(dtype) for k, v in born(shapes, size).items()}


def finished(tensors, shapes, size):
    """With the offsets that a bank adds."""
    weights = BASIS.generate(tensors, shapes, size)
    return [w + o for w, o in zip(weights, tensors["offset"], strict=True)]


def reference(tensors, shapes, size):
    """Each weight by itself, one element after the other, in numbers of Python."""
    values = {k: v.tolist() for k, v in tensors.items()}
    first, weights = 0, []
    for site, shape in enumerate(shapes):
        rows, columns = matrix(shape)
        flat = []
        for o in range(rows):
            for i in range(columns):
                line, place = (i, o) if is_transposed(shapes, size) else (o, i)
                own = values["coefficients"][first + line]
                total = sum(a * t[place] for a, t in zip(own, values["templates"], strict=True))
                for k in range(size.partial_rows):
                    index = k * size.template_size + place
                    if index < size.num_partial:
                        a = values["partial_coefficients"][first + line][k]
                        total += a * values["partial"][0][index]
                flat.append(values["gain"][site] * total)
        weights.append(torch.tensor(flat, dtype=torch.float64).view(shape))
        first += rows * columns // size.template_size
    return weights


@given(banks())
@example((((4, 4), (3, 4)), Size(num_templates=2, template_size=4)))
@example((((4, 4), (4, 3)), Size(num_templates=2, template_size=4)))
@example((((4, 4), (4, 4)), Size(num_templates=2, template_size=4)))
def test_weights_are_coefficients_times_basis(bank):
    tensors = random_tensors(*bank)
    for mine, theirs in zip(BASIS.generate(tensors, *bank), reference(tensors, *bank), strict=True):
        torch.testing.assert_close(mine, theirs)
        assert mine.is_contiguous()


def test_columns_or_rows_may_be_shared():
    tall, wide = ((6, 4), (3, 4)), ((4, 6), (4, 3))
    size = Size(num_templates=2, template_size=4)
    tensors = random_tensors(tall, size)
    for up, across in zip(
        BASIS.generate(tensors, tall, size), BASIS.generate(tensors, wide, size), strict=True
    ):
        assert torch.equal(up.T, across)


@given(banks())
def test_tensors_are_exactly_those_that_are_declared(bank):
    shapes, size = bank
    parameters, buffers = BASIS.parameters(*bank), BASIS.buffers(*bank)
    assert not parameters.keys() & buffers.keys()
    drawn = born(*bank)
    assert {k: tuple(v.shape) for k, v in drawn.items()} == {
        **parameters,
        **buffers,
        "offset": (len(shapes),),
    }
    assert {v.dtype for v in drawn.values()} == {torch.float32}
    lines = total_of(shapes) // size.template_size
    owned = size.num_templates * (size.template_size + lines) + size.num_partial
    assert num_parameters(BASIS, *bank) == owned == sum(drawn[key].numel() for key in parameters)


@given(banks())
def test_births_have_the_moments(bank):
    moments = [Moments(mean=0.1 * k, std=0.02 + k) for k in range(len(bank[0]))]
    weights = finished(born(*bank, moments), *bank)
    for wanted, weight in zip(moments, weights, strict=True):
        found = Moments.of(weight)
        assert found.std == pytest.approx(wanted.std, rel=1e-3)
        assert abs(found.mean - wanted.mean) <= 1.1 * MEAN_TOLERANCE * wanted.std


@given(banks())
def test_coefficients_start_with_norm_one_and_orthonormal_where_they_can(bank):
    _, size = bank
    rows = born(*bank)["coefficients"]
    if len(rows) <= size.num_templates:
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), atol=1e-5, rtol=0)
    elif size.num_templates > 1:
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))
    else:
        assert len(set(rows.flatten().tolist())) == len(rows)


@given(banks(), st.sets(st.integers(0, 3), min_size=1))
def test_constant_weights_are_exact_and_can_be_trained(bank, constants):
    moments = [
        Moments(mean=(0.0, 1.0, -0.3, 0.0)[k], std=0.0 if k in constants else 0.2)
        for k in range(len(bank[0]))
    ]
    tensors = born(*bank, moments)
    tensors["coefficients"].requires_grad_()
    weights = finished(tensors, *bank)
    for k, (weight, wanted) in enumerate(zip(weights, moments, strict=True)):
        if k in constants:
            assert torch.equal(weight, torch.full_like(weight, wanted.mean))
        else:
            assert Moments.of(weight).std == pytest.approx(0.2, rel=1e-3)
    sum((weight * torch.randn_like(weight)).sum() for weight in weights).backward()
    assert tensors["coefficients"].grad.ne(0).all()


@given(banks())
def test_weights_have_the_rank_of_the_basis_and_share_its_span(bank):
    shapes, size = bank
    size = Size(num_templates=size.num_templates, template_size=size.template_size)
    tensors = {k: v.double() for k, v in born(shapes, size).items()}
    weights = [
        weight.reshape(matrix(shape))
        for weight, shape in zip(BASIS.generate(tensors, shapes, size), shapes, strict=True)
    ]
    for weight in weights:
        assert torch.linalg.matrix_rank(weight) == min(size.num_templates, *weight.shape)
    together = torch.cat(weights, dim=1 if is_transposed(shapes, size) else 0)
    assert torch.linalg.matrix_rank(together) == min(size.num_templates, *together.shape)


@given(banks())
def test_gradients_are_those_of_the_formula(bank):
    check_gradients(BASIS, random_tensors(*bank), *bank)


@given(banks())
def test_every_element_gets_a_gradient_at_birth(bank):
    check_gradients_everywhere(BASIS, born(*bank), *bank)


def test_the_seed_decides():
    bank = ((6, 5), (4, 5)), Size(num_templates=2, template_size=5, num_partial=3)
    first, again, other = (born(*bank, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    for key in ("templates", "coefficients", "partial_coefficients"):
        assert not torch.equal(first[key], other[key])


EXAMPLES = [
    (((6, 5), (4, 5, 1)), Size(num_templates=2, template_size=5, num_partial=7)),
    (((6, 5), (6, 2, 3)), Size(num_templates=2, template_size=6, num_partial=7)),
]


@pytest.mark.parametrize("bank", EXAMPLES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept(bank, dtype):
    check_half_precision(BASIS, random_tensors(*bank), *bank, dtype=dtype)


@pytest.mark.parametrize("bank", EXAMPLES, ids=str)
def test_it_compiles_to_one_graph(bank):
    check_one_graph(BASIS, random_tensors(*bank), *bank)


@pytest.mark.parametrize("bank", EXAMPLES, ids=str)
def test_several_banks_generate_at_once(bank):
    tensors = random_tensors(*bank)
    stacked = {k: torch.stack([v, 2 * v, -v]) for k, v in tensors.items()}

    def loss(tensors):
        return sum(weight.square().sum() for weight in BASIS.generate(tensors, *bank))

    together = torch.func.vmap(torch.func.grad(loss))(stacked)
    for k in range(3):
        alone = torch.func.grad(loss)({key: v[k] for key, v in stacked.items()})
        torch.testing.assert_close({key: v[k] for key, v in together.items()}, alone)


def any_shapes():
    shape = st.lists(sides(12), min_size=1, max_size=4).map(tuple)
    return (
        st.lists(shape, min_size=1, max_size=4).map(tuple)
        | st.tuples(shape, st.integers(1, 5)).map(lambda pair: (pair[0],) * pair[1])
        | of_as_many_columns()
        | of_as_many_rows()
    )


@given(any_shapes())
def test_proposals_are_every_rank_that_is_worth_it(shapes):
    sizes, total = list(BASIS.propose(shapes, above=False)), total_of(shapes)
    assert list(BASIS.propose(shapes, above=True)) == sizes
    by_dimension = {}
    for size in sizes:
        assert BASIS.refuse(shapes, size) is None
        by_dimension.setdefault(size.template_size, []).append(size)
    rows, columns = (set(dimension) for dimension in zip(*map(matrix, shapes), strict=True))
    expected = {dimension for each in (rows, columns) if len(each) == 1 for dimension in each}
    if 1 in rows | columns:
        expected = set()
    elif len(shapes) == 1:
        expected = columns  # rows would be the same factors
    for dimension in expected:
        cost_of_one = dimension + total // dimension
        ranks = [size.num_templates for size in by_dimension.pop(dimension, [])]
        if cost_of_one > total:
            assert not ranks
            continue
        assert ranks[0] == 1
        assert all(1.3 * a - 0.5 <= b <= max(a + 1, 1.3 * a + 0.5) for a, b in pairwise(ranks))
        assert all(
            num_parameters(BASIS, shapes, Size(num_templates=r, template_size=dimension))
            == r * cost_of_one
            <= total
            for r in ranks
        )
        assert max(ranks[-1] + 1, 1.3 * ranks[-1] + 0.5) * cost_of_one > total
        assert ranks[-1] < dimension
    assert not by_dimension


@pytest.mark.parametrize(
    "shapes",
    [((1, 64), (32, 64), (32, 8, 8)), ((64, 1), (64, 32)), ((1, 8),) * 4, ((9,),)],
    ids=str,
)
def test_single_rows_and_columns_have_no_rank_to_lower(shapes):
    assert list(BASIS.propose(shapes, above=True)) == []


def test_one_weight_is_a_product_of_two_factors():
    sizes = list(BASIS.propose(((64, 8, 3, 3),), above=False))
    assert {size.template_size for size in sizes} == {72}
    assert num_parameters(BASIS, ((64, 8, 3, 3),), sizes[0]) == 64 + 72


@given(any_shapes(), st.integers(0, 400), st.data())
def test_enlarging_raises_the_rank_within_the_money(shapes, money, data):
    sizes = list(BASIS.propose(shapes, above=False))
    if not sizes:
        return
    size, total = data.draw(st.sampled_from(sizes)), total_of(shapes)
    before = num_parameters(BASIS, shapes, size)
    larger = BASIS.enlarge(shapes, size, money)
    cost_of_one = before // size.num_templates
    can_grow = cost_of_one <= money and before + cost_of_one <= total
    assert (larger is not None) == can_grow
    if larger is not None:
        assert BASIS.refuse(shapes, larger) is None
        assert larger.template_size == size.template_size
        assert before < num_parameters(BASIS, shapes, larger) <= min(before + money, total)
        step = larger.num_templates - size.num_templates
        assert step <= max(1, size.num_templates // 20)


def test_large_ranks_grow_by_a_twentieth():
    shapes, size = ((512, 512),) * 4, Size(num_templates=100, template_size=512, num_partial=3)
    larger = BASIS.enlarge(shapes, size, 10**6)
    assert larger == Size(num_templates=105, template_size=512, num_partial=3)
    assert BASIS.enlarge(shapes, size, 3 * 5 * 512).num_templates == 103
    assert BASIS.enlarge(shapes, size, 5 * 512 - 1) is None
    full = Size(num_templates=512, template_size=512)
    assert BASIS.refuse(shapes, full) is None
    assert BASIS.enlarge(shapes, full, 10**9) is None


@pytest.mark.parametrize(
    ("shapes", "size", "why"),
    [
        (((4, 6), (5, 7)), (2, 6, 0), "agree in rows or in columns; 4 x 6, 5 x 7 do not"),
        (((4, 6), (5, 2, 3)), (2, 4, 0), "template_size is 6, the rows or columns"),
        (((4, 6), (4, 2, 3)), (2, 5, 0), "template_size is 6 or 4, the rows or columns"),
        (((4, 4), (4, 4)), (2, 16, 0), "template_size is 4, the rows or columns"),
        (((4, 6), (5, 6)), (7, 6, 0), "1 to 6 templates, a rank that"),
        (((4, 6), (5, 6)), (0, 6, 0), "1 to 6 templates, a rank that"),
        (((4, 6), (5, 6)), (2, 6, 1), "its rank is num_templates"),
    ],
)
def test_what_is_wrong_with_a_bank_is_said(shapes, size, why):
    count, length, rank = size
    wrong = Size(num_templates=count, template_size=length, rank=rank)
    assert why in BASIS.refuse(shapes, wrong)


@given(banks())
def test_operations_are_those_of_the_products(bank):
    tensors = random_tensors(*bank)
    with FlopCounterMode(display=False) as counter:
        BASIS.generate(tensors, *bank)
    assert BASIS.flops(*bank) == counter.get_total_flops()


def test_it_is_described_by_all_that_it_owns():
    shapes, size = ((6, 4), (10, 4)), Size(num_templates=2, template_size=4)
    assert BASIS.describe(shapes, size) == ((2 * 4 + 16 * 2) / 64, 2, 1, 2)
    partial = Size(num_templates=2, template_size=4, num_partial=5)
    assert BASIS.describe(shapes, partial) == ((2 * 4 + 16 * 2 + 5) / 64, 2, 1, 4)
