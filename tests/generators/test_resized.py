"""Stretched weights: each rule is its formula, reads all of the bank, and has the rank it says."""

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
from npas_fx.generators.birth import MEAN_TOLERANCE
from npas_fx.generators.generator import num_parameters
from npas_fx.generators.resized import Resized
from npas_fx.generators.stretching import RULES, small_image
from npas_fx.ir import Size
from npas_fx.ir.matrix import as_matrix

ALL = {rule.name: Resized(rule) for rule in RULES}
NAMES = list(ALL)
GROUPS = [
    ((8, 12),) * 4,
    ((24, 20),),
    ((16, 3, 3, 3), (32, 16, 3, 3), (64, 32, 1, 1), (5,)),
    ((1, 40), (40, 1), (30,)),
    ((7, 13), (13, 7)) * 3,
]


@st.composite
def banks(draw, names=NAMES):
    """A generator, shapes and a size that is not refused."""
    resized = ALL[draw(st.sampled_from(names))]
    side = st.integers(1, 9)
    shape = st.tuples(side, side) | st.tuples(side, side, st.integers(1, 3)) | st.tuples(side)
    shapes = draw(st.lists(shape.filter(lambda s: math.prod(s) > 1), min_size=1, max_size=4))
    largest = max(map(math.prod, shapes))
    sizes = [Size(num_templates=1, template_size=length) for length in range(2, largest)]
    sizes = [size for size in sizes if not resized.refuse(shapes, size)]
    assume(sizes)
    size = replace(
        draw(st.sampled_from(sizes)),
        num_templates=draw(st.integers(1, 4)),
        num_partial=draw(st.integers(0, 12)),
    )
    return resized, tuple(shapes), size


def wanted(shapes):
    return [Moments(mean=0.1 * k, std=0.5 + k) for k in range(len(shapes))]


def born(resized, shapes, size, seed=0, moments=None):
    random = torch.Generator().manual_seed(seed)
    return resized.birth(shapes, size, moments or wanted(shapes), random)


def finished(resized, tensors, shapes, size):
    weights = resized.generate(tensors, shapes, size)
    return [weight + offset for weight, offset in zip(weights, tensors["offset"], strict=True)]


def moved(resized, tensors, shapes, size):
    """Parameters off their births, so that none is zero."""
    torch.manual_seed(0)
    return {
        key: (tensors[key] + 0.5 * torch.randn_like(tensors[key])).requires_grad_()
        for key in resized.parameters(shapes, size)
    }


def tiles_of(numel, length):
    """First and last element of each."""
    return [(start, min(start + length, numel)) for start in range(0, numel, length)]


def learned_rows(name, numel, length):
    if numel <= length:
        return 0
    if name == "mask":
        behind = tiles_of(numel, length)[1:]
        return sum(stop - start >= min(9, length) for start, stop in behind)
    return len(tiles_of(numel, math.ceil(length / 2))) if name == "upsample" else 0


def interpolate(small, shape):
    """Bilinear, with the centres of the corner pixels half a pixel inside the image."""
    rows, columns = as_matrix(shape)
    height, width = small_image(shape, len(small))

    def spots(place, large, few):
        at = max(0.0, (place + 0.5) * few / large - 0.5)
        first = int(at)
        second = min(first + 1, few - 1)
        return (first, 1 - (at - first)), (second, at - first)

    return [
        sum(
            float(small[i * width + j]) * share_i * share_j
            for i, share_i in spots(row, rows, height)
            for j, share_j in spots(column, columns, width)
        )
        for row in range(rows)
        for column in range(columns)
    ]


def stretch(name, small, shape, learned):
    """Element by element, by the formulas of the docs."""
    numel, length = math.prod(shape), len(small)
    if name == "bilinear":
        return interpolate(small, shape)
    flat, half = [], math.ceil(length / 2)
    stride = next(s for s in range(max(1, length // 8), length) if math.gcd(s, length) == 1)
    for element in range(numel):
        tile, place = divmod(element, length)
        if name == "repeat":
            flat.append(small[place])
        elif name == "slide":
            flat.append(small[(place + tile * stride) % length])
        elif name == "mask":
            mask = min(tile, len(learned))
            factor = learned[mask - 1, place % min(9, length)] if mask else 1.0
            flat.append(factor * small[place])
        else:
            chunk, place = divmod(element, half)
            first, second = learned[chunk]
            flat.append(first * small[place] + second * small[length - half + place])
    return [float(value) for value in flat]


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_weights_are_those_of_the_rule(name, data):
    resized, shapes, size = bank = data.draw(banks([name]))
    tensors = born(*bank)
    tensors |= {key: value.detach() for key, value in moved(resized, tensors, shapes, size).items()}
    weights = resized.generate(tensors, shapes, size)
    row, tile, length = 0, 0, size.template_size
    for site, (shape, weight) in enumerate(zip(shapes, weights, strict=True)):
        numel = math.prod(shape)
        small = (tensors["coefficients"][site].double() @ tensors["templates"].double()).float()
        rows = learned_rows(name, numel, length)
        learned = tensors[resized.rule.learned][row : row + rows] if rows else []
        row += rows
        flat = small[:numel].tolist() if numel <= length else stretch(name, small, shape, learned)
        expected = torch.tensor(flat, dtype=torch.float64)
        for start, stop in tiles_of(numel, length):
            for k in range(size.partial_rows):
                more = tensors["partial"][0, k * length :][: min(length, stop - start)].double()
                addend = tensors["partial_coefficients"][tile, k] * more
                expected[start : start + len(more)] += addend
            tile += 1
        expected *= tensors["gain"][site]
        assert weight.shape == shape
        torch.testing.assert_close(weight.double().flatten(), expected, rtol=1e-4, atol=1e-4)
    assert row == len(tensors.get(resized.rule.learned, []))


@given(banks())
def test_it_owns_what_it_declares(bank):
    resized, shapes, size = bank
    parameters, buffers = resized.parameters(shapes, size), resized.buffers(shapes, size)
    assert not parameters.keys() & buffers.keys()
    drawn = {key: tuple(tensor.shape) for key, tensor in born(*bank).items()}
    assert drawn == {**parameters, **buffers, "offset": (len(shapes),)}
    rule, length = resized.rule.name, size.template_size
    rows = sum(learned_rows(rule, math.prod(shape), length) for shape in shapes)
    owned = size.num_templates * (length + len(shapes)) + size.num_partial
    owned += rows * {"mask": min(9, length), "upsample": 2}.get(rule, 0)
    assert num_parameters(resized, shapes, size) == owned
    assert all(len(shape) == 2 and math.prod(shape) for shape in parameters.values())


@given(banks())
def test_births_have_the_moments(bank):
    resized, shapes, size = bank
    weights = finished(resized, born(*bank), shapes, size)
    for moments, weight in zip(wanted(shapes), weights, strict=True):
        found = Moments.of(weight)
        assert found.std == pytest.approx(moments.std, rel=1e-3)
        assert abs(found.mean - moments.mean) <= 1.1 * MEAN_TOLERANCE * moments.std + 1e-6


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"bilinear"}))
def test_gains_start_near_one(name):
    shapes = ((32, 50),) * 3
    moments = [Moments(mean=0.0, std=0.1)] * 3
    tensors = born(ALL[name], shapes, Size(num_templates=2, template_size=400), moments=moments)
    assert all(0.8 < gain < 1.25 for gain in tensors["gain"].tolist())


@given(banks(), st.lists(st.sampled_from([0.0, 1.0, -0.3]), min_size=1))
def test_constant_weights_are_exact_and_can_be_trained(bank, values):
    resized, shapes, size = bank
    moments = [
        Moments(mean=values[k], std=0.0) if k < len(values) else other
        for k, other in enumerate(wanted(shapes))
    ]
    tensors = born(*bank, moments=moments)
    coefficients = tensors["coefficients"].requires_grad_()
    weights = finished(resized, tensors, shapes, size)
    for weight, value in zip(weights, values, strict=False):
        assert torch.equal(weight, torch.full_like(weight, value))
    total = sum((weight * torch.randn_like(weight)).sum() for weight in weights)
    assert torch.autograd.grad(total, coefficients)[0].ne(0).all()


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
    resized = bank[0]
    first, again, other = (born(*bank, seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["templates"], other["templates"])
    if resized.rule.learned in first:
        assert not torch.equal(first[resized.rule.learned], other[resized.rule.learned])


def rank(resized, shape, length):
    size = Size(num_templates=3, template_size=length)
    tensors = {key: tensor.double() for key, tensor in born(resized, (shape,), size).items()}
    (weight,) = resized.generate(tensors, (shape,), size)
    return torch.linalg.matrix_rank(weight.view(as_matrix(shape)), rtol=1e-6).item()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(12, 12), (24, 18), (16, 9), (9, 4, 4), (20, 27)], ids=str)
def test_no_weight_has_a_higher_rank_than_the_rule_says(name, shape):
    resized, (rows, columns) = ALL[name], as_matrix(shape)
    for length in range(2, rows * columns, 7):
        if resized.refuse((shape,), Size(num_templates=3, template_size=length)):
            continue
        found, most = rank(resized, shape, length), resized.rule.rank(shape, length)
        assert found <= most <= min(shape[0], math.prod(shape[1:]))
        is_aligned = columns % length == 0 or length % columns == 0
        if is_aligned or name not in ("slide", "upsample"):
            assert found == most, length


@pytest.mark.parametrize(
    ("name", "length", "expected"),
    [
        ("bilinear", 96, 8),  # an image of 8 x 12
        ("repeat", 96, 4),  # rows 1, 5, 9, … are copies
        ("repeat", 8, 1),
        ("repeat", 95, 16),  # rows start in 95 places
        ("mask", 96, 16),
        ("mask", 24, 9),
        ("slide", 96, 16),
        ("slide", 8, 8),
        ("upsample", 96, 4),
        ("upsample", 48, 2),
        ("upsample", 24, 4),
    ],
)
def test_ranks_of_a_16_by_24_weight(name, length, expected):
    assert rank(ALL[name], (16, 24), length) == expected
    size = Size(num_templates=1, template_size=length)
    assert ALL[name].describe(((16, 24), (3, 3)), size).rank == expected


def test_repeated_rows_are_copies_and_slid_windows_are_not():
    shape, length = (16, 24), 24
    size = Size(num_templates=1, template_size=length)
    copies, windows = (
        ALL[name].generate(born(ALL[name], (shape,), size), (shape,), size)[0]
        for name in ("repeat", "slide")
    )
    assert torch.equal(copies, copies[:1].expand(shape))
    assert len(windows.unique(dim=0)) == 16
    assert windows.sort(dim=1)[0].allclose(windows.sort(dim=1)[0][:1].expand(shape))


@given(st.integers(1, 60), st.integers(1, 60), st.data())
def test_small_images_fit_and_have_about_the_proportions_of_the_weight(rows, columns, data):
    assume(rows * columns > 2)
    length = data.draw(st.integers(2, rows * columns - 1))
    rows, columns = as_matrix((rows, columns))
    height, width = small_image((rows, columns), length)
    assert 1 <= height <= rows
    assert 1 <= width <= columns
    assert length - height < height * width <= length
    exact = math.sqrt(length * rows / columns)
    assert abs(height - min(exact, length)) <= max(1, exact / 4) + 0.5


def test_leading_axes_of_length_one_are_no_rows():
    assert as_matrix((1, 6, 4)) == (6, 4)
    assert as_matrix((6, 1, 4)) == (6, 4)
    assert as_matrix((1, 1)) == (1, 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shapes", GROUPS, ids=str)
def test_proposals_are_valid_distinct_and_below_the_weights(name, shapes):
    resized, numels = ALL[name], [math.prod(shape) for shape in shapes]
    sizes = list(resized.propose(shapes, above=True))
    assert sizes
    assert len(set(sizes)) == len(sizes)
    for size in sizes:
        assert resized.refuse(shapes, size) is None
        assert num_parameters(resized, shapes, size) < sum(numels)
        assert size.num_templates == 1 or size.num_templates < len(shapes)
        assert size.template_size <= max(numels) // 2
    assert min(size.template_size for size in sizes) < 32


@pytest.mark.parametrize("name", NAMES)
def test_proposed_lengths_are_out_of_step_with_rows_where_that_makes_a_higher_rank(name):
    shape = (64, 64)
    (size,) = [s for s in ALL[name].propose((shape,), above=False) if 490 < s.template_size <= 512]
    assert rank(ALL[name], shape, size.template_size) >= (22 if name == "bilinear" else 63)


@given(banks(), st.integers(0, 60))
def test_a_larger_bank_is_valid_and_affordable(bank, money):
    resized, shapes, size = bank
    larger = resized.enlarge(shapes, size, money)
    if larger is None:
        return
    assert larger.template_size > size.template_size
    assert num_parameters(resized, shapes, larger) - num_parameters(resized, shapes, size) <= money
    assert resized.refuse(shapes, larger) is None


@pytest.mark.parametrize("name", NAMES)
def test_templates_grow_by_a_twentieth_where_that_is_valid(name):
    size = Size(num_templates=2, template_size=400)
    longer = ALL[name].enlarge(((32, 50),) * 3, size, 10_000)
    assert size.template_size < longer.template_size <= 420
    assert longer.template_size == 420 or name == "bilinear"
    assert ALL[name].enlarge(((32, 50),) * 3, size, 1) is None


def test_what_is_refused():
    shapes, size = ((6, 8), (3, 4)), Size(num_templates=2, template_size=12)
    for resized in ALL.values():
        assert resized.refuse(shapes, size) is None
        for length in (1, 48):
            assert "2 to 47 elements" in resized.refuse(shapes, replace(size, template_size=length))
        assert "at least one" in resized.refuse(shapes, replace(size, num_templates=0))
        assert "rank" in resized.refuse(shapes, replace(size, rank=1))
    # 43 is prime, so an image of so many elements is a line.
    prime = replace(size, template_size=43)
    assert "use 42" in ALL["bilinear"].refuse(shapes, prime)
    assert ALL["bilinear"].refuse(shapes, replace(size, template_size=42)) is None
    # A smaller weight that is as long reads all of it.
    assert ALL["bilinear"].refuse((*shapes, (43,)), prime) is None


@pytest.mark.parametrize("name", NAMES)
def test_it_compiles_and_keeps_half_precision(name):
    shapes, resized = ((16, 12), (8, 4, 3), (5,)), ALL[name]
    size = Size(num_templates=2, template_size=36, num_partial=3)
    assert resized.refuse(shapes, size) is None
    tensors = born(resized, shapes, size)
    check_one_graph(resized, tensors, shapes, size)
    check_half_precision(resized, tensors, shapes, size, atol=0.1)


def test_its_computation_counts_what_is_stretched():
    shapes, size = ((8, 8), (3, 4)), Size(num_templates=2, template_size=16, num_partial=3)
    mixed = 2 * 2 * 2 * 16 + 2 * 76
    extra = {name: resized.flops(shapes, size) - mixed for name, resized in ALL.items()}
    assert extra == {"repeat": 0, "slide": 0, "mask": 64, "upsample": 192, "bilinear": 448}
    assert ALL["mask"].describe(shapes, size)[:3] == (32 / 76, 2, 1)
