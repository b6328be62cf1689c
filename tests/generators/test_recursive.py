"""Weights are one that they share, each scaled by itself, and residuals of low rank."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from generating import (
    check_gradients,
    check_gradients_everywhere,
    check_half_precision,
    check_one_graph,
)
from npas_fx.generators import Moments
from npas_fx.generators.birth import MEAN_TOLERANCE
from npas_fx.generators.generator import num_parameters
from npas_fx.generators.recursive import Recursive
from npas_fx.generators.within import Within
from npas_fx.ir import Size

RECURSIVE = Recursive()


def matrix(shape):
    if shape[0] == 1 and len(shape) > 1:
        return matrix(shape[1:])
    return shape[0], math.prod(shape[1:])


def any_shape():
    """Linear and convolutional weights in one to three dimensions."""
    return st.lists(st.integers(1, 5), min_size=2, max_size=5).map(tuple)


@st.composite
def banks(draw):
    """Shapes, and a size that need not be worth it."""
    shape = draw(any_shape())
    numel = math.prod(shape)
    assume(1 < numel <= 120)
    size = Size(
        num_templates=1,
        template_size=numel,
        rank=draw(st.integers(1, min(matrix(shape)))),
        num_partial=draw(st.sampled_from([0, 1, numel, numel + 3])),
    )
    return (shape,) * draw(st.integers(2, 4)), size


def born(shapes, size, moments=None, seed=0):
    moments = moments or [Moments(mean=0.1 * k, std=0.5 + k) for k in range(len(shapes))]
    return RECURSIVE.birth(shapes, size, moments, torch.Generator().manual_seed(seed))


def random_tensors(shapes, size, dtype=torch.float64):
    torch.manual_seed(0)
    return {k: torch.randn_like(v).to(dtype) for k, v in born(shapes, size).items()}


def finished(tensors, shapes, size):
    """With the offsets that a bank adds."""
    weights = RECURSIVE.generate(tensors, shapes, size)
    return [w + o for w, o in zip(weights, tensors["offset"], strict=True)]


def reference(tensors, shapes, size):
    """Each weight by itself, one element after the other, in numbers of Python."""
    values = {k: v.tolist() for k, v in tensors.items()}
    weights = []
    for site, shape in enumerate(shapes):
        rows, columns = matrix(shape)
        left = values["templates_left"][site * rows : (site + 1) * rows]
        right = values["templates_right"][site * size.rank : (site + 1) * size.rank]
        flat = []
        for o in range(rows):
            for i in range(columns):
                total = values["coefficients"][site][0] * values["templates"][o][i]
                total += sum(left[o][k] * right[k][i] for k in range(size.rank))
                for index in range(o * columns + i, size.num_partial, rows * columns):
                    a = values["partial_coefficients"][site][index // (rows * columns)]
                    total += a * values["partial"][0][index]
                flat.append(values["gain"][site] * total)
        weights.append(torch.tensor(flat, dtype=torch.float64).view(shape))
    return weights


@given(banks())
def test_weights_are_what_is_shared_and_a_product(bank):
    tensors = random_tensors(*bank)
    got = RECURSIVE.generate(tensors, *bank)
    for mine, theirs in zip(got, reference(tensors, *bank), strict=True):
        torch.testing.assert_close(mine, theirs)
        assert mine.is_contiguous()


@given(banks())
def test_tensors_are_exactly_those_that_are_declared(bank):
    shapes, size = bank
    parameters, buffers = RECURSIVE.parameters(*bank), RECURSIVE.buffers(*bank)
    assert not parameters.keys() & buffers.keys()
    assert {len(shape) for shape in parameters.values()} == {2}
    drawn = born(*bank)
    assert {k: tuple(v.shape) for k, v in drawn.items()} == {
        **parameters,
        **buffers,
        "offset": (len(shapes),),
    }
    assert {v.dtype for v in drawn.values()} == {torch.float32}
    rows, columns = matrix(shapes[0])
    owned = rows * columns + len(shapes) * (size.rank * (rows + columns) + 1) + size.num_partial
    assert num_parameters(RECURSIVE, *bank) == owned
    assert owned == sum(drawn[key].numel() for key in parameters)


@given(banks())
def test_births_have_the_moments(bank):
    moments = [Moments(mean=0.1 * k, std=0.02 + k) for k in range(len(bank[0]))]
    weights = finished(born(*bank, moments), *bank)
    for wanted, weight in zip(moments, weights, strict=True):
        found = Moments.of(weight)
        assert found.std == pytest.approx(wanted.std, rel=1e-3)
        assert abs(found.mean - wanted.mean) <= 1.1 * MEAN_TOLERANCE * wanted.std


@pytest.mark.parametrize("rank", [1, 20, 60])
@pytest.mark.parametrize("shape", [(200, 200), (60, 20, 5, 5)], ids=str)
def test_residuals_vary_as_much_as_they_cost(shape, rank):
    shapes, (rows, columns) = (shape,) * 4, matrix(shape)
    size = Size(num_templates=1, template_size=rows * columns, rank=rank)
    moments = [Moments(mean=0.0, std=std) for std in (0.02, 0.05, 0.1, 0.1)]
    tensors = born(shapes, size, moments)
    assert tensors["gain"].mul(torch.tensor([5.0, 2.0, 1.0, 1.0])).sub(1.4).abs().max() < 0.2
    whole = RECURSIVE.generate(tensors, shapes, size)
    alone = {**tensors, "coefficients": torch.zeros(4, 1)}
    residual = RECURSIVE.generate(alone, shapes, size)
    own, shared = rank * (rows + columns), rows * columns
    for weight, part in zip(whole, residual, strict=True):
        found = (part.var() / weight.var()).item()
        assert found == pytest.approx(own / (own + shared), rel=0.35 if rank == 1 else 0.1)
    norms = tensors["templates_left"].norm(), tensors["templates_right"].norm()
    assert norms[0].item() == pytest.approx(norms[1].item(), rel=0.1)


@given(banks(), st.sets(st.integers(0, 3), min_size=1))
def test_constant_weights_are_exact_and_can_be_trained(bank, constants):
    shapes, size = bank
    moments = [
        Moments(mean=(0.0, 1.0, -0.3, 0.0)[k], std=0.0 if k in constants else 0.2)
        for k in range(len(shapes))
    ]
    tensors = born(*bank, moments)
    trained = {k: tensors[k].requires_grad_() for k in RECURSIVE.parameters(*bank)}
    weights = finished(tensors, *bank)
    for k, (weight, wanted) in enumerate(zip(weights, moments, strict=True)):
        if k in constants:
            assert torch.equal(weight, torch.full_like(weight, wanted.mean))
        else:
            assert Moments.of(weight).std == pytest.approx(0.2, rel=1e-3)
    torch.manual_seed(0)
    sum((weight * torch.randn_like(weight)).sum() for weight in weights).backward()
    for key in ("coefficients", "templates_left", *(["partial"] if size.num_partial else [])):
        assert trained[key].grad.ne(0).all(), key  # of constant weights too, from the first step


@given(banks())
def test_weights_have_full_rank_and_differ_by_that_of_their_residuals(bank):
    shapes, size = bank
    size = replace(size, num_partial=0)
    tensors = {k: v.double() for k, v in born(shapes, size).items()}
    full = min(matrix(shapes[0]))
    for k, weight in enumerate(RECURSIVE.generate(tensors, shapes, size)):
        rows = weight.reshape(matrix(shapes[0]))
        assert torch.linalg.matrix_rank(rows) == full
        own = rows / tensors["gain"][k] - tensors["coefficients"][k] * tensors["templates"]
        assert torch.linalg.matrix_rank(own, rtol=1e-9) == size.rank


@given(banks())
def test_gradients_are_those_of_the_formula(bank):
    check_gradients(RECURSIVE, random_tensors(*bank), *bank)


@given(banks())
def test_every_element_gets_a_gradient_at_birth(bank):
    check_gradients_everywhere(RECURSIVE, born(*bank), *bank)


EXAMPLE = ((6, 2, 3),) * 3, Size(num_templates=1, template_size=36, rank=2, num_partial=39)


def test_the_seed_decides():
    first, again, other = (born(*EXAMPLE, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    for key in ("templates", "templates_left", "templates_right", "partial_coefficients"):
        assert not torch.equal(first[key], other[key])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept(dtype):
    check_half_precision(RECURSIVE, random_tensors(*EXAMPLE), *EXAMPLE, dtype=dtype, atol=0.1)


def test_it_compiles_to_one_graph():
    check_one_graph(RECURSIVE, random_tensors(*EXAMPLE), *EXAMPLE)


def test_several_banks_generate_at_once():
    tensors = random_tensors(*EXAMPLE)
    stacked = {k: torch.stack([v, 2 * v, -v]) for k, v in tensors.items()}

    def loss(tensors):
        return sum(weight.square().sum() for weight in RECURSIVE.generate(tensors, *EXAMPLE))

    together = torch.func.vmap(torch.func.grad(loss))(stacked)
    for k in range(3):
        alone = torch.func.grad(loss)({key: v[k] for key, v in stacked.items()})
        torch.testing.assert_close({key: v[k] for key, v in together.items()}, alone)


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_one_product_makes_all_weights_and_none_is_copied():
    shapes, size = EXAMPLE[0], replace(EXAMPLE[1], num_partial=0)
    tensors = random_tensors(shapes, size)
    with Calls() as calls:
        RECURSIVE.generate(tensors, shapes, size)
    computing = [name for name in calls.names if name not in ("slice", "unsqueeze", "view")]
    assert computing == ["mul", "mul", "mul", "baddbmm", "unbind"]


def test_the_gain_scales_all_of_a_weight_so_that_layers_may_grow():
    growing, size = Within(RECURSIVE, (6, 6)), Size(num_templates=1, template_size=36, rank=2)
    shapes, moments = ((4, 6), (6, 3)), [Moments(mean=0.0, std=0.02), Moments(mean=0.5, std=1.0)]
    assert size in list(growing.propose(((6, 6),) * 4, above=False))
    tensors = growing.birth(shapes, size, moments, torch.Generator().manual_seed(0))
    for weight, wanted in zip(growing.generate(tensors, shapes, size), moments, strict=True):
        assert Moments.of(weight).std == pytest.approx(wanted.std, rel=1e-3)


@given(any_shape() | st.tuples(st.integers(1, 40), st.integers(1, 40)), st.integers(2, 6))
@example(shape=(4, 5), count=2)  # of rank 1, it would cost as much as the weights
def test_proposals_are_every_rank_that_is_worth_it(shape, count):
    shapes, total, full = (shape,) * count, count * math.prod(shape), min(matrix(shape))
    sizes = list(RECURSIVE.propose(shapes, above=False))
    assert list(RECURSIVE.propose(shapes, above=True)) == sizes

    def cost(rank):
        return math.prod(shape) + count * (rank * sum(matrix(shape)) + 1)

    ranks = [size.rank for size in sizes]
    for size in sizes:
        assert RECURSIVE.refuse(shapes, size) is None
        assert num_parameters(RECURSIVE, shapes, size) == cost(size.rank) < total
        assert size.rank < full
    assert ranks[:1] == [1] or cost(1) >= total or full == 1
    assert all(1.4 * a - 0.5 <= b <= max(a + 1, 1.4 * a + 0.5) for a, b in pairwise(ranks))
    if ranks:
        following = max(ranks[-1] + 1, int(1.4 * ranks[-1] + 0.5))
        assert cost(following) >= total or following >= full


def test_only_several_weights_of_one_shape_have_something_to_share():
    assert list(RECURSIVE.propose(((16, 16),) * 4, above=False))
    for shapes in (((16, 16),), ((16, 16), (16, 4, 4)), ((16, 16), (16, 17)), ((1, 256),) * 4):
        assert list(RECURSIVE.propose(shapes, above=True)) == []


@given(st.integers(2, 20), st.integers(2, 20), st.integers(2, 5), st.integers(0, 400), st.data())
def test_enlarging_raises_the_rank_within_the_money(rows, columns, count, money, data):
    shapes, total = ((rows, columns),) * count, count * rows * columns
    sizes = list(RECURSIVE.propose(shapes, above=False))
    if not sizes:
        return
    size = data.draw(st.sampled_from(sizes))
    before = num_parameters(RECURSIVE, shapes, size)
    larger = RECURSIVE.enlarge(shapes, size, money)
    one = count * (rows + columns)
    can_grow = one <= money and before + one < total and size.rank + 1 < min(rows, columns)
    assert (larger is not None) == can_grow
    if larger is not None:
        assert RECURSIVE.refuse(shapes, larger) is None
        assert larger == replace(size, rank=larger.rank)
        assert before < num_parameters(RECURSIVE, shapes, larger) <= before + money
        assert larger.rank - size.rank <= max(1, size.rank // 20)


def test_large_ranks_grow_by_a_twentieth():
    shapes = ((512, 512),) * 8
    size = Size(num_templates=1, template_size=512**2, rank=100, num_partial=3)
    assert RECURSIVE.enlarge(shapes, size, 10**6) == replace(size, rank=105)
    assert RECURSIVE.enlarge(shapes, size, 3 * 8 * 1024).rank == 103
    assert RECURSIVE.enlarge(shapes, size, 8 * 1024 - 1) is None
    full = replace(size, rank=512)
    assert RECURSIVE.refuse(shapes, full) is None
    assert RECURSIVE.enlarge(shapes, full, 10**9) is None


@pytest.mark.parametrize(
    ("shapes", "size", "why"),
    [
        (((4, 6),), (1, 24, 1), "two weights at least"),
        (((4, 6), (6, 4)), (1, 24, 1), "one shape, (4, 6), (6, 4) differ"),
        (((4, 6), (4, 2, 3)), (1, 24, 1), "one shape"),
        (((4, 6),) * 2, (2, 24, 1), "one template of 24 elements"),
        (((4, 6),) * 2, (0, 24, 1), "one template of 24 elements"),
        (((4, 6),) * 2, (1, 12, 1), "one template of 24 elements"),
        (((4, 6),) * 2, (1, 24, 0), "rank of its residuals is 1 to 4"),
        (((4, 6),) * 2, (1, 24, 5), "rank of its residuals is 1 to 4"),
    ],
)
def test_what_is_wrong_with_a_bank_is_said(shapes, size, why):
    count, length, rank = size
    wrong = Size(num_templates=count, template_size=length, rank=rank)
    assert why in RECURSIVE.refuse(shapes, wrong)


@given(banks())
def test_operations_are_those_of_the_products_and_of_scaling(bank):
    tensors = random_tensors(*bank)
    with FlopCounterMode(display=False) as counter:
        RECURSIVE.generate(tensors, *bank)
    scaled = sum(map(math.prod, bank[0])) + tensors["templates_left"].numel()
    assert RECURSIVE.flops(*bank) == counter.get_total_flops() + scaled


def test_it_is_described_by_all_that_it_owns():
    shapes, size = ((6, 4),) * 3, Size(num_templates=1, template_size=24, rank=2)
    assert RECURSIVE.describe(shapes, size) == ((24 + 3 * (2 * 10 + 1)) / 72, 2, 1, None)
