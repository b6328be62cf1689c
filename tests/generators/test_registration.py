"""A generator of somebody else's is used by its name wherever a built-in one is."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import npas_fx
from npas_fx import NPASError, PlanError, generators
from npas_fx.generators import DEFAULT_GENERATORS, GENERATORS, Moments, Within, register_generator
from npas_fx.generators.generator import num_parameters
from npas_fx.generators.tied import Tied
from npas_fx.ir import Size

PAGE = Path(__file__).resolve().parents[2] / "docs" / "generators" / "your-own.md"
SHAPES = [((4, 6),) * 3, ((5, 2, 3, 3),) * 2]


@pytest.fixture(autouse=True)
def _as_before():
    before = dict(generators._registered)
    yield
    generators._registered.clear()
    generators._registered.update(before)


@pytest.fixture(scope="module")
def example():
    """The generator that the page defines; ``test_docs`` runs all of the page."""
    scope = {}
    block = re.search(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    exec(compile(block[1], str(PAGE), "exec", dont_inherit=True), scope)
    return scope["BatchEnsemble"]()


class Named(Tied):
    def __init__(self, name):
        self.name = name


@pytest.mark.parametrize("name", [*GENERATORS, ""])
def test_names_that_are_built_in_or_empty_are_refused(name):
    before = dict(GENERATORS)
    with pytest.raises(NPASError, match=f"^{name!r} cannot be the name"):
        register_generator(Named(name))
    assert dict(GENERATORS) == before


def test_the_last_one_of_a_name_stands_for_it():
    first, second = Named("mine"), Named("mine")
    register_generator(first)
    assert GENERATORS["mine"] is first
    register_generator(second)
    assert GENERATORS["mine"] is second
    assert "mine" not in DEFAULT_GENERATORS


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(12, 12) for _ in range(4)))


def test_by_name_from_transform_to_materialize(tmp_path):
    inputs = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    with pytest.raises(NPASError, match="'mine' is not known"):
        npas_fx.transform(mlp(), 0.5, generators=["mine"])
    register_generator(Named("mine"))
    shared = npas_fx.transform(mlp(), 0.5, example_inputs=inputs, generators=["mine"])
    (bank,) = (bank for bank in shared.plan.banks if not bank.is_dedicated)
    assert bank.generator == "mine"
    npas_fx.save(shared, tmp_path)
    again = npas_fx.load(tmp_path, mlp())
    assert torch.equal(again(inputs), shared(inputs))
    assert torch.equal(npas_fx.materialize(again)(inputs), shared(inputs))
    applied = npas_fx.apply(mlp(), shared.plan, example_inputs=inputs)
    pinned = npas_fx.transform(mlp(), 0.6, pin=[bank])  # also where it is not among generators
    assert applied.plan == shared.plan
    assert bank in pinned.plan.banks


def test_a_folder_of_a_generator_that_is_not_registered_names_it(tmp_path):
    given = [Named("mine")]
    shared = npas_fx.transform(mlp(), 0.5, example_inputs=torch.randn(3, 12), generators=given)
    npas_fx.save(shared, tmp_path)
    with pytest.raises(PlanError, match="no generator 'mine'"):
        npas_fx.load(tmp_path, mlp())
    assert npas_fx.load(tmp_path, mlp(), generators=given).plan == shared.plan


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_the_example_owns_what_it_says_and_all_of_it_trains(example, shapes):
    wanted = [Moments(mean=0.1 - k, std=0.5 * k) for k in range(len(shapes))]  # the first constant
    (size,) = example.propose(shapes, above=True)
    tensors = example.birth(shapes, size, wanted, torch.Generator().manual_seed(0))
    declared = {**example.parameters(shapes, size), **example.buffers(shapes, size)}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        **declared,
        "offset": (len(shapes),),
    }
    rows, columns = shapes[0][0], math.prod(shapes[0][1:])
    owned = rows * columns + len(shapes) * (rows + columns)
    assert num_parameters(example, shapes, size) == owned
    trained = [tensors[name].requires_grad_() for name in example.parameters(shapes, size)]
    weights = example.generate(tensors, shapes, size)
    for k, (weight, offset, moments) in enumerate(
        zip(weights, tensors["offset"], wanted, strict=True)
    ):
        found = Moments.of(weight + offset)
        assert found.std == pytest.approx(moments.std, rel=1e-3)
        assert found.mean == pytest.approx(moments.mean, abs=0.03 * moments.std + 1e-6)
        assert weight.shape == shapes[k]
    loss = sum((weight * torch.randn_like(weight)).sum() for weight in weights)
    template, of_rows, of_columns = torch.autograd.grad(loss, trained)
    assert all((gradient != 0).all() for gradient in (template, of_rows, of_columns[1:]))


def test_the_example_is_its_formula(example):
    shapes = ((2, 3),) * 2
    tensors = {
        "templates": torch.randn(2, 3),
        "rows": torch.randn(2, 2),
        "columns": torch.randn(2, 3),
        "gain": torch.randn(2),
    }
    weights = example.generate(tensors, shapes, Size(num_templates=1, template_size=6))
    for k, weight in enumerate(weights):
        for r in range(2):
            for c in range(3):
                own = tensors["gain"][k] * tensors["rows"][k, r] * tensors["columns"][k, c]
                torch.testing.assert_close(weight[r, c], own * tensors["templates"][r, c])


def test_the_example_refuses_what_it_cannot_do(example):
    size = Size(num_templates=1, template_size=24)
    assert example.refuse(((4, 6),) * 2, size) is None
    for shapes in (((4, 6), (6, 4)), ((24,),) * 2, ((4, 5),) * 2):
        assert example.refuse(shapes, size)
    for field in ("num_partial", "rank"):
        wrong = Size(**{"num_templates": 1, "template_size": 24, field: 1})
        assert "only size" in example.refuse(((4, 6),) * 2, wrong)
    assert not list(example.propose(((4, 6),), above=True))
    assert not list(example.propose(((2, 2),) * 2, above=False))  # more than the weights
    assert list(example.propose(((2, 2),) * 2, above=True))


def test_weights_of_the_example_may_grow(example):
    generator, size = Within(example, (6, 6)), Size(num_templates=1, template_size=36)
    small, large = ((4, 3), (5, 5)), ((6, 3), (5, 6))
    wanted = [Moments(mean=0.0, std=1.0)] * 2
    assert list(generator.propose(small, above=True)) == [size]
    tensors = generator.birth(small, size, wanted, torch.Generator().manual_seed(0))
    for less, more in zip(
        generator.generate(tensors, small, size),
        generator.generate(tensors, large, size),
        strict=True,
    ):
        assert torch.equal(less, more[: less.shape[0], : less.shape[1]])
        assert Moments.of(less).std == pytest.approx(1.0, rel=1e-3)
