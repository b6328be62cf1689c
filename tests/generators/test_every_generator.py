"""What holds of every generator: exact counts, births, gradients, liveness, and round trips."""

import copy
import math
from dataclasses import dataclass, replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from npas_fx.banks import Bank
from npas_fx.generators import GENERATORS, Moments
from npas_fx.generators.birth import MEAN_TOLERANCE
from npas_fx.generators.generator import TEMPLATE_NAMES, num_parameters
from npas_fx.ir import Size

NAMES = [name for name in GENERATORS if name != "dedicated"]
VALUES = (0.0, 1.0, -0.3)


@dataclass(frozen=True)
class Case:
    """A bank, as a value that prints what it is.

    Attributes:
        name: of the generator.
        shapes: of the weights.
        size: of the bank.
        constants: place of a constant weight -> its value.
        seed: of weights and draws.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    size: Size
    constants: tuple[tuple[int, float], ...] = ()
    seed: int = 0

    @property
    def generator(self):
        return GENERATORS[self.name]

    def weights(self):
        random = torch.Generator().manual_seed(self.seed)
        weights = [
            torch.randn(shape, generator=random) * (0.02 + 0.3 * k) + 0.1 * k
            for k, shape in enumerate(self.shapes)
        ]
        for place, value in self.constants:
            weights[place].fill_(value)
        return weights

    def bank(self, dtype=torch.float32, *, born=True):
        bank = Bank(self.generator, self.shapes, self.size, dtype=dtype, device=torch.device("cpu"))
        if born:
            bank.birth(self.weights(), torch.Generator().manual_seed(self.seed))
        return bank


def some_shapes():
    """Of a linear layer, or of convolutions in one to three dimensions; kernels of 1 to 5."""
    channels, kernel = st.integers(1, 12), st.integers(1, 5)
    linear = st.tuples(channels, channels)
    conv1d = st.tuples(channels, channels, kernel)
    conv2d = st.tuples(channels, channels, kernel).map(lambda s: (*s, s[-1]))
    conv3d = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3)).map(
        lambda s: (*s, s[-1], s[-1])
    )
    depthwise = st.tuples(channels, kernel).map(lambda s: (s[0], 1, s[1], s[1]))
    return (linear | conv1d | conv2d | conv3d | depthwise).filter(lambda s: math.prod(s) > 3)


@st.composite
def cases(draw, names=NAMES, constants=True):
    name = draw(st.sampled_from(names))
    groups = st.one_of(
        st.tuples(some_shapes(), st.integers(1, 5)).map(lambda pair: (pair[0],) * pair[1]),
        st.lists(some_shapes(), min_size=1, max_size=4).map(tuple),
        # of one output or input dimension
        st.tuples(st.integers(2, 12), st.lists(st.integers(2, 12), min_size=2, max_size=4)).map(
            lambda pair: tuple((pair[0], other) for other in pair[1])
        ),
        st.tuples(st.integers(2, 12), st.lists(st.integers(2, 12), min_size=2, max_size=4)).map(
            lambda pair: tuple((other, pair[0]) for other in pair[1])
        ),
    )
    shapes, above = draw(groups), draw(st.booleans())
    sizes = list(GENERATORS[name].propose(shapes, above=above))
    if not sizes:  # it cannot serve these; all can serve four of one shape, or a larger one
        shapes = ((8, 6),) * 4
        sizes = list(GENERATORS[name].propose(shapes, above=above))
    if not sizes:
        shapes = ((16, 12),) * 4
        sizes = list(GENERATORS[name].propose(shapes, above=above))
    size = draw(st.sampled_from(sizes))
    partial = draw(st.sampled_from([0, 1, 3, size.template_size + 1]))
    if GENERATORS[name].refuse(shapes, replace(size, num_partial=partial)) is None:
        size = replace(size, num_partial=partial)
    chosen = draw(st.sets(st.integers(0, len(shapes) - 1), max_size=2)) if constants else set()
    values = tuple((k, draw(st.sampled_from(VALUES))) for k in sorted(chosen))
    return Case(name, shapes, size, values, draw(st.integers(0, 99)))


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_counts_shapes_names_and_births(name, data):
    case = data.draw(cases([name]))
    bank, weights = case.bank(), case.weights()
    assert case.generator.refuse(case.shapes, case.size) is None
    owned = sum(parameter.numel() for parameter in bank.parameters())
    assert owned == num_parameters(case.generator, case.shapes, case.size)
    assert case.generator.flops(case.shapes, case.size) > 0
    for key, parameter in bank.named_parameters():
        assert parameter.dim() == 2 or not key.startswith(TEMPLATE_NAMES)
    constants = dict(case.constants)
    for k, (weight, given_) in enumerate(zip(bank(), weights, strict=True)):
        assert weight.shape == given_.shape
        if k in constants:
            assert torch.equal(weight, given_)
            continue
        found, wanted = Moments.of(weight), Moments.of(given_)
        assert found.std == pytest.approx(wanted.std, rel=1e-2)
        assert abs(found.mean - wanted.mean) <= 1.2 * MEAN_TOLERANCE * wanted.std


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_every_element_is_live_after_two_steps(name, data):
    case = data.draw(cases([name], constants=False))
    bank = case.bank()
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    sum((weight * torch.randn_like(weight)).sum() for weight in bank()).backward()
    for key, parameter in bank.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.ne(0).all(), key


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=6, deadline=None)
def test_gradients_are_those_of_what_is_generated(name, data):
    case = data.draw(cases([name]))
    bank = case.bank(torch.float64)
    keys = [key for key, _ in bank.named_parameters()]

    def generate(*values):
        weights = torch.func.functional_call(bank, dict(zip(keys, values, strict=True)))
        return torch.cat([weight.flatten() for weight in weights])

    inputs = [parameter.detach().clone().requires_grad_() for parameter in bank.parameters()]
    assert torch.autograd.gradcheck(generate, inputs, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_the_seed_decides_and_state_dicts_carry_everything(name, data):
    case = data.draw(cases([name]))
    bank, again, empty = case.bank(), case.bank(), case.bank(born=False)
    empty.load_state_dict(bank.state_dict())
    for other in (again, empty, copy.deepcopy(bank)):
        assert all(torch.equal(a, b) for a, b in zip(bank(), other(), strict=True))


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=5, deadline=None)
def test_defaults_of_the_program_do_not_matter(name, data):
    case = data.draw(cases([name]))
    before = case.bank().state_dict()
    weights, random = case.weights(), torch.Generator().manual_seed(case.seed)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            bank = case.bank(born=False)
            bank.birth(weights, random)
    finally:
        torch.set_default_dtype(torch.float32)
    for key, tensor in bank.state_dict().items():
        assert torch.equal(tensor, before[key]), key


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_larger_banks_cost_more_and_fit(name, data):
    case = data.draw(cases([name]))
    generator, shapes = case.generator, case.shapes
    money = data.draw(st.integers(1, 400))
    larger = generator.enlarge(shapes, case.size, money)
    if larger is not None:
        before = num_parameters(generator, shapes, case.size)
        assert generator.refuse(shapes, larger) is None
        assert larger != case.size
        assert num_parameters(generator, shapes, larger) - before <= money
    assert generator.refuse(shapes, replace(case.size, num_templates=0)) is not None
    too_long = replace(case.size, template_size=10 * max(map(math.prod, shapes)))
    assert generator.refuse(shapes, too_long) is not None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("axis", [0, 1])
def test_parts_of_fused_weights_are_weights(name, axis):
    parts, shape = ((8, 12),) * 4, (24, 12) if axis == 0 else (8, 36)
    size = list(GENERATORS[name].propose(parts, above=False))[-1]
    kwargs = {"dtype": torch.float32, "device": torch.device("cpu")}
    bank = Bank(GENERATORS[name], [(8, 12), shape], size, parts=[(1, 0), (3, axis)], **kwargs)
    random = torch.Generator().manual_seed(0)
    given_ = [torch.randn(s, generator=random) * 0.1 for s in ((8, 12), shape)]
    bank.birth(given_, random)
    apart = Bank(GENERATORS[name], parts, size, **kwargs)
    apart.load_state_dict(bank.state_dict())
    first, fused = bank()
    assert torch.equal(first, apart()[0])
    assert torch.equal(fused, torch.cat(apart()[1:], axis))
    assert Moments.of(fused).std == pytest.approx(Moments.of(given_[1]).std, rel=1e-2)
