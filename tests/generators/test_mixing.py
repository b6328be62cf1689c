"""The batched product equals a mix site by site; births have the moments that were asked for."""

import itertools
import math

import pytest
import torch

from generating import check_gradients, check_half_precision
from npas_fx.generators import GENERATORS, Moments
from npas_fx.generators.birth import MEAN_TOLERANCE
from npas_fx.generators.generator import num_parameters
from npas_fx.ir import Size

SHAPES = [(6, 4), (3, 4), (2, 2, 3), (24,)]
SIZES = [(1, 24), (2, 24), (3, 7), (1, 1), (4, 5), (5, 3)]


def reference(tensors, shapes, size):
    """Each weight by itself, one tile and one element after the other, in float64."""
    row, weights = 0, []
    for site, shape in enumerate(shapes):
        flat = []
        numel = math.prod(shape)
        for start in range(0, numel, size.template_size):
            gain = tensors["gain"][site].double()
            for place in range(min(size.template_size, numel - start)):
                total = torch.zeros((), dtype=torch.float64)
                for k in range(size.num_templates):
                    a = tensors["coefficients"][row, k] if "coefficients" in tensors else 1.0
                    total = total + a * tensors["templates"][k, place].double()
                for k in range(size.partial_rows):
                    index = k * size.template_size + place
                    if index < size.num_partial:
                        a = tensors["partial_coefficients"][row, k].double()
                        total = total + a * tensors["partial"][0, index].double()
                flat.append(gain * total)
            row += 1
        weights.append(torch.stack(flat).view(shape))
    return weights


def every_bank():
    for (count, length), partial in itertools.product(SIZES, ("0", "1", "P", "P+3")):
        extra = {"0": 0, "1": 1, "P": length, "P+3": length + 3}[partial]
        yield (
            "wavg",
            tuple(SHAPES),
            Size(num_templates=count, template_size=length, num_partial=extra),
        )
    for extra in (0, 1, 12, 15):
        yield "tied", ((3, 4),) * 3, Size(num_templates=1, template_size=12, num_partial=extra)


BANKS = list(every_bank())


def finished(tensors, weights):
    """With the offsets that a bank adds."""
    return [w + o for w, o in zip(weights, tensors["offset"], strict=True)]


def born(name, shapes, size, seed=0, moments=None):
    moments = moments or [Moments(mean=0.1 * k, std=0.5 + k) for k in range(len(shapes))]
    random = torch.Generator().manual_seed(seed)
    return GENERATORS[name].birth(shapes, size, moments, random)


@pytest.mark.parametrize(("name", "shapes", "size"), BANKS, ids=str)
def test_batched_equals_site_by_site(name, shapes, size):
    torch.manual_seed(0)
    tensors = {k: torch.randn_like(v) for k, v in born(name, shapes, size).items()}
    got = GENERATORS[name].generate(tensors, shapes, size)
    assert [tuple(weight.shape) for weight in got] == list(shapes)
    for mine, theirs in zip(got, reference(tensors, shapes, size), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "shapes", "size"), BANKS, ids=str)
def test_tensors_are_exactly_those_that_are_declared(name, shapes, size):
    generator = GENERATORS[name]
    parameters, buffers = generator.parameters(shapes, size), generator.buffers(shapes, size)
    assert not parameters.keys() & buffers.keys()
    drawn = born(name, shapes, size)
    assert {k: tuple(v.shape) for k, v in drawn.items()} == {
        **parameters,
        **buffers,
        "offset": (len(shapes),),
    }
    owned = sum(drawn[key].numel() for key in parameters)
    assert num_parameters(generator, shapes, size) == owned


@pytest.mark.parametrize(("name", "shapes", "size"), BANKS, ids=str)
def test_births_have_the_moments(name, shapes, size):
    moments = [Moments(mean=0.1 * k, std=0.5 + k) for k in range(len(shapes))]
    tensors = born(name, shapes, size)
    weights = finished(tensors, GENERATORS[name].generate(tensors, shapes, size))
    for wanted, weight in zip(moments, weights, strict=True):
        found = Moments.of(weight)
        assert found.std == pytest.approx(wanted.std, rel=1e-3)
        assert abs(found.mean - wanted.mean) <= 1.1 * MEAN_TOLERANCE * wanted.std


@pytest.mark.parametrize(("name", "shapes", "size"), BANKS, ids=str)
def test_constant_weights_are_exact_and_can_be_trained(name, shapes, size):
    values = [0.0, 1.0, -0.3, 0.0][: len(shapes)]
    moments = [Moments(mean=value, std=0.0) for value in values]
    generator = GENERATORS[name]
    tensors = born(name, shapes, size, moments=moments)
    trained = {
        k: v.requires_grad_() for k, v in tensors.items() if k in generator.parameters(shapes, size)
    }
    weights = finished(tensors, generator.generate({**tensors, **trained}, shapes, size))
    for value, weight in zip(values, weights, strict=True):
        assert torch.equal(weight, torch.full_like(weight, value))
    total = sum((weight * torch.randn_like(weight)).sum() for weight in weights)
    gradients = torch.autograd.grad(total, list(trained.values()))
    key = "coefficients" if name == "wavg" else "gain"
    assert gradients[list(trained).index(key)].abs().min() > 0


def test_some_constant_among_others():
    shapes, size = ((5, 6),) * 3, Size(num_templates=2, template_size=30)
    moments = [Moments(mean=1.0, std=0.0), Moments(mean=0.0, std=0.2), Moments(mean=3.0, std=0.1)]
    tensors = born("wavg", shapes, size, moments=moments)
    ones, plain, shifted = finished(tensors, GENERATORS["wavg"].generate(tensors, shapes, size))
    assert torch.equal(ones, torch.ones(5, 6))
    assert Moments.of(plain).std == pytest.approx(0.2, rel=1e-4)
    assert Moments.of(shifted).mean == pytest.approx(3.0, abs=1e-4)


@pytest.mark.parametrize(("name", "shapes", "size"), BANKS[::5], ids=str)
def test_the_seed_decides(name, shapes, size):
    first, again, other = (born(name, shapes, size, seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["templates"], other["templates"])


@pytest.mark.parametrize(("name", "shapes", "size"), BANKS[::3], ids=str)
def test_gradients_are_those_of_the_formula(name, shapes, size):
    torch.manual_seed(0)
    tensors = {key: torch.randn_like(value) for key, value in born(name, shapes, size).items()}
    check_gradients(GENERATORS[name], tensors, shapes, size)


def test_half_precision_is_kept():
    shapes, size = ((4, 4), (2, 4)), Size(num_templates=2, template_size=5, num_partial=7)
    check_half_precision(GENERATORS["wavg"], born("wavg", shapes, size), shapes, size)


def test_moments_of_odd_weights():
    assert Moments.of(torch.full((3, 3), 0.1)) == Moments(mean=torch.tensor(0.1).item(), std=0.0)
    half = Moments.of(torch.tensor([1.0, 3.0], dtype=torch.bfloat16))
    assert (half.mean, half.std) == (2.0, 1.0)
    assert Moments.of(nn_parameter()).std > 0


def nn_parameter():
    return torch.nn.Parameter(torch.randn(4, 4))
