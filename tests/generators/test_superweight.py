"""SuperWeights: each element comes from the part that exactly its weights have in common."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from generating import check_gradients
from npas_fx.banks.bank import Bank
from npas_fx.generators import Moments
from npas_fx.generators.birth import MEAN_TOLERANCE
from npas_fx.generators.generator import num_parameters
from npas_fx.generators.superweight import MAX_TEMPLATES, SuperWeight
from npas_fx.ir import Size

OWN, SHARED = SuperWeight(), SuperWeight(shares_coefficients=True)
MODES = [OWN, SHARED]
GROUPS = [
    ((3, 4),) * 3,
    ((4, 2), (16, 8), (8, 4), (16, 8)),
    ((16, 4), (4, 16), (8, 32)),  # (256, 64), (64, 256), (128, 512) of a bottleneck
    ((4, 3, 3, 3), (8, 4, 1, 1), (6, 5), (3, 4, 5), (7,), (6, 5)),
    ((2, 3),),
    ((8, 16, 3), (16, 8, 3), (24, 4, 2, 2), (5, 9)),
]
MIXED = GROUPS[3]
SHAPES = st.lists(
    st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple), min_size=1, max_size=5
).map(tuple)


def box(shape):
    return (*shape, 1, 1)[0], (*shape, 1, 1)[1], math.prod(shape[2:])


def users_of(shapes):
    """Element of the union of all boxes -> the weights that have it, one element at a time."""
    users = {}
    for k, shape in enumerate(shapes):
        for element in itertools.product(*map(range, box(shape))):
            users.setdefault(element, []).append(k)
    return {element: tuple(found) for element, found in users.items()}


def floor(shapes):
    return len(set(users_of(shapes).values()))


def sized(shapes, number, partial=0):
    largest = max(map(math.prod, shapes))
    return Size(num_templates=number, template_size=largest, num_partial=partial)


def every_bank():
    for generator, shapes in itertools.product(MODES, GROUPS):
        least, largest = floor(shapes), max(map(math.prod, shapes))
        for more, partial in ((0, 0), (1, 1), (least, largest), (3 * least, largest + 3)):
            yield generator, shapes, sized(shapes, least + more, partial)


def name_bank(value):
    return value.name if isinstance(value, SuperWeight) else str(value).replace(" ", "")


BANKS = list(every_bank())
EVERY_BANK = pytest.mark.parametrize(("generator", "shapes", "size"), BANKS, ids=name_bank)
EACH_MODE = pytest.mark.parametrize("generator", MODES, ids=name_bank)


def born(generator, shapes, size, seed=0, moments=None):
    moments = moments or [Moments(mean=0.1 * k, std=0.5 + k) for k in range(len(shapes))]
    return generator.birth(shapes, size, moments, torch.Generator().manual_seed(seed))


def noise(generator, shapes, size):
    """Values for all tensors of a bank that have nothing to do with how it is born."""
    torch.manual_seed(0)
    return {name: torch.randn_like(value) for name, value in born(generator, shapes, size).items()}


def finished(tensors, weights):
    """With the offsets that a bank adds."""
    return [w + o for w, o in zip(weights, tensors["offset"], strict=True)]


def pieces_of(shapes):
    """Elements and number of users of each SuperWeight, as the declared tensors have them."""
    owned, count = OWN.parameters(shapes, sized(shapes, floor(shapes))), floor(shapes)
    return [(owned[f"templates_{p}"][1], owned[f"coefficients_{p}"][0]) for p in range(count)]


def counts_of(generator, shapes, size):
    owned = generator.parameters(shapes, size)
    return tuple(owned[f"templates_{p}"][0] for p in range(floor(shapes)))


def origins(shapes):
    """For each weight, as ``(O, I, T)``: number of the template element that is at each place.

    It numbers the elements of one template of each SuperWeight, those of the first one first, and
    lets the generator put the numbers into weights.
    """
    numels = [numel for numel, _ in pieces_of(shapes)]
    numbers = torch.arange(sum(numels), dtype=torch.float64).split(numels)
    tensors = {"gain": torch.ones(len(shapes), dtype=torch.float64)}
    for p, (number, (_, users)) in enumerate(zip(numbers, pieces_of(shapes), strict=True)):
        tensors[f"templates_{p}"] = number[None]
        tensors[f"coefficients_{p}"] = torch.ones(users, 1, dtype=torch.float64)
    weights = OWN.generate(tensors, shapes, sized(shapes, floor(shapes)))
    return [w.long().view(box(shape)) for w, shape in zip(weights, shapes, strict=True)]


def reference(generator, tensors, shapes, size):
    """Each element of each weight by itself, in float64."""
    numels = [numel for numel, _ in pieces_of(shapes)]
    place_of = [(p, index) for p, numel in enumerate(numels) for index in range(numel)]
    users = users_of(shapes)
    weights = []
    for k, (shape, origin) in enumerate(zip(shapes, origins(shapes), strict=True)):
        flat = []
        for at, element in enumerate(itertools.product(*map(range, box(shape)))):
            p, index = place_of[origin[element]]
            row = 0 if generator is SHARED else users[element].index(k)
            value = sum(
                float(a) * float(template[index])
                for a, template in zip(
                    tensors[f"coefficients_{p}"][row], tensors[f"templates_{p}"], strict=True
                )
            )
            for j in range(size.partial_rows):
                if j * size.template_size + at < size.num_partial:
                    a = float(tensors["partial_coefficients"][k, j])
                    value += a * float(tensors["partial"][0, j * size.template_size + at])
            flat.append(float(tensors["gain"][k]) * value)
        weights.append(torch.tensor(flat, dtype=torch.float64).view(shape))
    return weights


@EVERY_BANK
def test_batched_equals_element_by_element(generator, shapes, size):
    tensors = noise(generator, shapes, size)
    got = generator.generate(tensors, shapes, size)
    assert [tuple(weight.shape) for weight in got] == list(shapes)
    for mine, theirs in zip(got, reference(generator, tensors, shapes, size), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


@EVERY_BANK
def test_tensors_are_exactly_those_that_are_declared(generator, shapes, size):
    parameters, buffers = generator.parameters(shapes, size), generator.buffers(shapes, size)
    assert not parameters.keys() & buffers.keys()
    drawn = born(generator, shapes, size)
    assert {name: tuple(value.shape) for name, value in drawn.items()} == {
        **parameters,
        **buffers,
        "offset": (len(shapes),),
    }
    assert {value.dtype for value in drawn.values()} == {torch.float32}
    owned = sum(drawn[name].numel() for name in parameters)
    assert num_parameters(generator, shapes, size) == owned
    counts = counts_of(generator, shapes, size)
    assert sum(counts) == size.num_templates
    expected = size.num_partial + (len(shapes) if generator is SHARED else 0)
    for count, (numel, users) in zip(counts, pieces_of(shapes), strict=True):
        expected += count * (numel + (1 if generator is SHARED else users))
    assert owned == expected


@EVERY_BANK
def test_births_have_the_moments(generator, shapes, size):
    moments = [Moments(mean=0.1 * k, std=0.5 + k) for k in range(len(shapes))]
    tensors = born(generator, shapes, size)
    weights = finished(tensors, generator.generate(tensors, shapes, size))
    for wanted, weight in zip(moments, weights, strict=True):
        found = Moments.of(weight)
        assert found.std == pytest.approx(wanted.std, rel=1e-3)
        assert abs(found.mean - wanted.mean) <= 1.1 * MEAN_TOLERANCE * wanted.std


@EACH_MODE
def test_templates_have_the_typical_deviation(generator):
    shapes = ((40, 30), (60, 50))
    moments = [Moments(mean=0.0, std=0.3), Moments(mean=0.0, std=0.4)]
    tensors = born(generator, shapes, sized(shapes, 2), moments=moments)
    for p in range(2):
        assert Moments.of(tensors[f"templates_{p}"]).std == pytest.approx(0.125**0.5, rel=0.1)


@EVERY_BANK
def test_constant_weights_are_exact_and_can_be_trained(generator, shapes, size):
    values = [0.0, 1.0, -0.3, 0.0, 2.5, 1.0][: len(shapes)]
    tensors = born(generator, shapes, size, moments=[Moments(mean=v, std=0.0) for v in values])
    trained = {name: tensors[name].requires_grad_() for name in generator.parameters(shapes, size)}
    weights = finished(tensors, generator.generate({**tensors, **trained}, shapes, size))
    for value, weight in zip(values, weights, strict=True):
        assert torch.equal(weight, torch.full_like(weight, value))
    torch.manual_seed(0)
    total = sum((weight * torch.randn_like(weight)).sum() for weight in weights)
    gradients = dict(zip(trained, torch.autograd.grad(total, list(trained.values())), strict=True))
    key = "gain" if generator is SHARED else "coefficients"
    assert all(g.abs().min() > 0 for name, g in gradients.items() if name.startswith(key))


@EACH_MODE
def test_some_constant_among_others(generator):
    shapes = ((5, 6), (5, 6), (10, 6))
    moments = [Moments(mean=1.0, std=0.0), Moments(mean=0.0, std=0.2), Moments(mean=3.0, std=0.1)]
    tensors = born(generator, shapes, sized(shapes, 3), moments=moments)
    ones, plain, shifted = finished(tensors, generator.generate(tensors, shapes, sized(shapes, 3)))
    assert torch.equal(ones, torch.ones(5, 6))
    assert Moments.of(plain).std == pytest.approx(0.2, rel=1e-4)
    assert Moments.of(shifted).mean == pytest.approx(3.0, abs=1e-4)


@settings(max_examples=100, deadline=None)
@given(SHAPES)
def test_each_element_comes_from_the_superweight_of_its_users(shapes):
    users, of_element = users_of(shapes), {}
    for shape, origin in zip(shapes, origins(shapes), strict=True):
        for element in itertools.product(*map(range, box(shape))):
            # The same element of two weights is the same element of a template.
            assert of_element.setdefault(element, origin[element].item()) == origin[element]
    # Two elements never are, and none is left over: each has one place in one template.
    numels = [numel for numel, _ in pieces_of(shapes)]
    assert sorted(of_element.values()) == list(range(sum(numels)))
    starts = list(itertools.accumulate(numels, initial=0))
    piece_of = {e: sum(n >= start for start in starts) - 1 for e, n in of_element.items()}
    # A SuperWeight is a set of users, and a set of users one SuperWeight.
    pairs = {(piece_of[element], users[element]) for element in users}
    assert len(pairs) == len({p for p, _ in pairs}) == len({found for _, found in pairs})
    assert all(pieces_of(shapes)[p][1] == len(found) for p, found in pairs)


def test_weights_of_one_shape_are_made_of_the_same_superweights():
    for shapes in GROUPS:
        for (a, one), (b, other) in itertools.combinations(
            zip(shapes, origins(shapes), strict=True), 2
        ):
            assert a != b or torch.equal(one, other)


# WRN-16-4 in four bins; numbers of the reference's own table, and of ours for ResNet-50.
WRN_BINS = [
    ((64, 16, 1, 1), (128, 64, 1, 1), (256, 128, 1, 1)),
    ((16, 3, 3, 3), (64, 16, 3, 3), *((64, 64, 3, 3),) * 3),
    ((128, 64, 3, 3), *((128, 128, 3, 3),) * 3),
    ((256, 128, 3, 3), *((256, 256, 3, 3),) * 3),
]
WRN_SIZES = [(1_024, 7_168, 24_576), (432, 8_784, 27_648), (73_728,) * 2, (294_912,) * 2]
WRN_TEMPLATES = [(3, 2, 1), (4, 4, 3), (4, 3), (4, 3)]


def declared(shapes, number):
    owned = OWN.parameters(shapes, sized(shapes, number))
    return [owned[name] for name in sorted(owned) if name.startswith("templates")]


def test_superweights_of_nested_shapes_are_those_of_the_reference():
    for shapes, sizes in zip(WRN_BINS, WRN_SIZES, strict=True):
        assert tuple(numel for _, numel in declared(shapes, len(sizes))) == sizes
    assert sum(map(sum, WRN_SIZES)) == 806_912


def test_at_the_size_of_the_weights_templates_are_dealt_as_in_the_reference():
    bank, coefficients = 0, 0
    for shapes, counts in zip(WRN_BINS, WRN_TEMPLATES, strict=True):
        size = sized(shapes, sum(counts))
        assert tuple(n for n, _ in declared(shapes, sum(counts))) == counts
        bank += sum(map(math.prod, declared(shapes, sum(counts))))
        coefficients += num_parameters(OWN, shapes, size)
    assert (bank, coefficients - bank) == (2_742_272, 109)


def test_shapes_that_are_not_nested_need_no_more_than_the_union_of_their_boxes():
    ones, threes = [], []
    for width, blocks, stride_in in ((64, 3, 64), (128, 4, 256), (256, 6, 512), (512, 3, 1024)):
        ones += [(width, stride_in, 1, 1), (4 * width, stride_in, 1, 1)]
        ones += [(width, 4 * width, 1, 1)] * (blocks - 1) + [(4 * width, width, 1, 1)] * blocks
        threes += [(width, width, 3, 3)] * blocks
    groups = [((64, 3, 7, 7),), tuple(ones), tuple(threes)]
    total = sum(math.prod(shape) for shapes in groups for shape in shapes)
    # As many as are in some box: per row, up to the longest row of all boxes that reach it.
    union = sum(
        max(math.prod(shape[1:]) for shape in shapes if shape[0] > row)
        for shapes in groups
        for row in range(max(shape[0] for shape in shapes))
    )
    least = 0
    for shapes in groups:
        number = next(n for n in itertools.count(1) if not OWN.refuse(shapes, sized(shapes, n)))
        least += sum(map(math.prod, declared(shapes, number)))
    assert least == union
    assert union / total == pytest.approx(0.213, abs=5e-4)


def test_a_generated_weight_has_full_rank_at_the_least_size():
    shapes = ((6, 5), (5, 9), (12, 10), (12, 10))
    tensors = born(OWN, shapes, sized(shapes, floor(shapes)))
    for weight in OWN.generate(tensors, shapes, sized(shapes, floor(shapes))):
        assert torch.linalg.matrix_rank(weight) == min(weight.shape)


def dealt(pieces, number):
    """Templates of each SuperWeight, given away one at a time."""
    counts, t = [1] * len(pieces), 1
    order = sorted(range(len(pieces)), key=lambda p: (-pieces[p][1], pieces[p][0], p))
    while True:
        everyone_has_enough = all(
            count >= min(users, MAX_TEMPLATES)
            for count, (_, users) in zip(counts, pieces, strict=True)
        )
        for p in order:
            if sum(counts) == number:
                return tuple(counts)
            if counts[p] < MAX_TEMPLATES and (everyone_has_enough or pieces[p][1] > t):
                counts[p] += 1
        t += 1


@pytest.mark.parametrize("shapes", [*GROUPS, ((2, 3),) * 18 + ((4, 3), (4, 4))], ids=str)
def test_templates_are_dealt_in_rounds(shapes):
    pieces = pieces_of(shapes)
    for number in range(len(pieces), MAX_TEMPLATES * len(pieces) + 1):
        counts = counts_of(OWN, shapes, sized(shapes, number))
        assert counts == dealt(pieces, number)
        short = any(c < min(u, MAX_TEMPLATES) for c, (_, u) in zip(counts, pieces, strict=True))
        assert not (short and any(c > u for c, (_, u) in zip(counts, pieces, strict=True)))


@EACH_MODE
@settings(max_examples=60, deadline=None)
@given(SHAPES, st.booleans())
def test_proposals_are_valid_spread_and_within_the_weights(generator, shapes, above):
    sizes = list(generator.propose(shapes, above=above))
    if len(shapes) < 2:
        assert not sizes
        return
    total, least = sum(map(math.prod, shapes)), floor(shapes)
    costs = [num_parameters(generator, shapes, size) for size in sizes]
    assert all(generator.refuse(shapes, size) is None for size in sizes)
    assert all(b >= 1.3 * a for a, b in itertools.pairwise(costs))
    if not above:
        assert all(cost <= total for cost in costs)
    if num_parameters(generator, shapes, sized(shapes, least)) <= total or above:
        assert sizes[0] == sized(shapes, least)
    if generator is SHARED:
        assert len(sizes) <= 1
    for size in sizes:
        counts = counts_of(generator, shapes, size)
        assert above or all(c <= u for c, (_, u) in zip(counts, pieces_of(shapes), strict=True))


def test_more_than_the_weights_only_where_it_is_wanted():
    shapes = ((16, 16),) * 3 + ((32, 16),)
    total = sum(map(math.prod, shapes))
    below = {num_parameters(OWN, shapes, s) for s in OWN.propose(shapes, above=False)}
    above = {num_parameters(OWN, shapes, s) for s in OWN.propose(shapes, above=True)}
    assert total / 1.5 < max(below) <= total < 4 * total < max(above)


def test_no_superweight_gets_more_templates_than_weights_while_another_cannot_have_as_many():
    shapes = ((4, 4),) * (MAX_TEMPLATES + 1) + ((8, 4),)
    full = sized(shapes, MAX_TEMPLATES + 1)
    assert counts_of(OWN, shapes, full) == (MAX_TEMPLATES, 1)
    assert all(s.num_templates <= full.num_templates for s in OWN.propose(shapes, above=True))
    assert OWN.enlarge(shapes, full, 10**9) is None


@pytest.mark.parametrize("shapes", GROUPS, ids=str)
def test_enlarging_adds_one_template_where_that_is_affordable(shapes):
    size, largest = sized(shapes, floor(shapes), partial=5), 0
    while True:
        grown = OWN.enlarge(shapes, size, 10**9)
        if grown is None:
            break
        assert grown == sized(shapes, size.num_templates + 1, partial=5)
        assert OWN.refuse(shapes, grown) is None
        cost = num_parameters(OWN, shapes, grown) - num_parameters(OWN, shapes, size)
        assert OWN.enlarge(shapes, size, cost) == grown
        assert OWN.enlarge(shapes, size, cost - 1) is None
        size, largest = grown, size.num_templates + 1
    assert largest == MAX_TEMPLATES * floor(shapes)
    assert SHARED.enlarge(shapes, sized(shapes, floor(shapes)), 10**9) is None


@EACH_MODE
def test_sizes_that_are_refused(generator):
    shapes = ((4, 2), (8, 4))
    assert generator.refuse(shapes, sized(shapes, 2)) is None
    assert generator.refuse(shapes, sized(shapes, 32, partial=99)) is None
    for number in (0, 1, 33):
        wrong = generator.refuse(shapes, sized(shapes, number))
        assert "2 SuperWeights" in wrong
        assert "2 to 32 templates" in wrong
    for length in (31, 33, 0):
        assert "32" in generator.refuse(shapes, Size(num_templates=2, template_size=length))
    assert "rank" in generator.refuse(shapes, Size(num_templates=2, template_size=32, rank=1))


def test_it_is_described_by_its_elements():
    # The first has 8 elements of one SuperWeight, the second 24 more: 3 and 2 templates.
    shapes, size = ((4, 2), (8, 4)), sized(((4, 2), (8, 4)), 5)
    assert counts_of(OWN, shapes, size) == (3, 2)
    found = OWN.describe(shapes, size)
    assert found.share == pytest.approx((3 * 8 + 2 * 24) / 40)
    assert found.templates == pytest.approx((3 + (3 * 8 + 2 * 24) / 32) / 2)
    assert (found.parts, found.rank) == (1.5, None)
    # Mixed in one way, several templates are worth one.
    assert SHARED.describe(shapes, size) == OWN.describe(shapes, sized(shapes, 2))
    partial = sized(shapes, 5, partial=33)  # two rows
    assert OWN.flops(shapes, size) == 2 * (2 * 3 * 8 + 2 * 24)
    assert OWN.flops(shapes, partial) == OWN.flops(shapes, size) + 2 * 2 * 40
    assert SHARED.flops(shapes, size) == 2 * (3 * 8 + 2 * 24) + 40


@pytest.mark.parametrize("partial", [0, 7, 35])
def test_weights_of_one_shape_that_share_coefficients_differ_in_their_gain_only(partial):
    shapes = ((4, 2), (8, 4), (4, 2), (8, 4))
    size = sized(shapes, 4, partial)
    tensors = born(SHARED, shapes, size)
    if partial:
        tensors["partial"] = torch.randn(1, partial)
    weights = SHARED.generate(tensors, shapes, size)
    for a, b in ((0, 2), (1, 3)):
        ratio = tensors["gain"][a] / tensors["gain"][b]
        torch.testing.assert_close(weights[a], ratio * weights[b])
    # And that of the larger ones begins with the smaller.
    if not partial:
        torch.testing.assert_close(
            weights[1][:4, :2] / tensors["gain"][1], weights[0] / tensors["gain"][0]
        )


def test_rows_of_coefficients_start_orthonormal_where_they_can():
    shapes = ((4, 4),) * 3
    for count in (3, 5):
        rows = born(OWN, shapes, sized(shapes, count))["coefficients_0"]
        torch.testing.assert_close(rows @ rows.T, torch.eye(3), atol=1e-5, rtol=0)
    rows = born(OWN, shapes, sized(shapes, 2))["coefficients_0"]
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))


@EACH_MODE
def test_the_seed_decides(generator):
    size = sized(MIXED, floor(MIXED) + 2, partial=7)
    first, again, other = (born(generator, MIXED, size, seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["templates_0"], other["templates_0"])


@pytest.mark.parametrize(("generator", "shapes", "size"), BANKS[1::4], ids=name_bank)
def test_gradients_are_those_of_the_formula(generator, shapes, size):
    check_gradients(generator, noise(generator, shapes, size), shapes, size, second=True)


@EACH_MODE
def test_half_precision_is_kept(generator):
    size = sized(MIXED, floor(MIXED) + 2, partial=7)
    tensors = {name: value.bfloat16() for name, value in born(generator, MIXED, size).items()}
    weights = generator.generate(tensors, MIXED, size)
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    full = generator.generate({name: v.float() for name, v in tensors.items()}, MIXED, size)
    for a, b in zip(weights, full, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.05)


class Calls(TorchDispatchMode):
    """Counts the operations that are called."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **kwargs or {})


def test_there_is_one_product_for_each_superweight_and_no_copy_of_a_weight_of_one_block():
    size = sized(GROUPS[0], 2)
    tensors = noise(OWN, GROUPS[0], size)
    with Calls() as calls:
        weights = OWN.generate(tensors, GROUPS[0], size)
    assert calls.counts["mm"] == 1
    assert not {"cat", "clone", "_unsafe_view", "copy_"} & calls.counts.keys()
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    for generator in MODES:
        for shapes in GROUPS:
            size = sized(shapes, floor(shapes))
            tensors = noise(generator, shapes, size)
            with Calls() as calls:
                generator.generate(tensors, shapes, size)
            assert calls.counts["mm"] == floor(shapes)
            assert not {"clone", "_unsafe_view", "copy_"} & calls.counts.keys()


def test_shared_weights_are_composed_once_for_each_shape():
    shapes = ((4, 2), (8, 4)) * 3
    tensors = noise(SHARED, shapes, sized(shapes, 2))
    with Calls() as calls:
        SHARED.generate(tensors, shapes, sized(shapes, 2))
    assert calls.counts["cat"] == 2


@EACH_MODE
@pytest.mark.filterwarnings("error:.*lru_cache")
def test_a_bank_compiles_as_one_graph(generator):
    torch.compiler.reset()
    shapes = GROUPS[1]
    size = sized(shapes, floor(shapes) + 2, partial=7)
    bank = Bank(generator, shapes, size, dtype=torch.float32, device=torch.device("cpu"))
    bank.birth([torch.randn(shape) for shape in shapes], torch.Generator().manual_seed(0))
    outputs = []
    for call in (bank, torch.compile(lambda: bank(), fullgraph=True, backend="aot_eager")):
        weights = call()
        sum(weight.sin().sum() for weight in weights).backward()
        outputs.append((*weights, *(p.grad.clone() for p in bank.parameters())))
        bank.zero_grad()
    for mine, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.compiler.reset()


@EACH_MODE
def test_functional_transforms_of_a_bank(generator):
    size = sized(MIXED, floor(MIXED) + 2)
    banks = {
        name: torch.stack([value, 2 * value, value + 1]).double()
        for name, value in noise(generator, MIXED, size).items()
    }

    def total(tensors):
        return sum(w.sin().sum() for w in generator.generate(tensors, MIXED, size))

    together = torch.func.vmap(torch.func.grad(total))(banks)
    for k in range(3):
        alone = {name: value[k].clone().requires_grad_() for name, value in banks.items()}
        total(alone).backward()
        for name in generator.parameters(MIXED, size):
            torch.testing.assert_close(together[name][k], alone[name].grad)
