"""Twelve families of timm at four budgets, each against its own code with generated weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import npas_fx
from npas_fx import plan_of
from oracle import (
    assert_close,
    banks_of,
    by_formula,
    count_trainable,
    generated,
    gradients,
    largest,
    run_original,
    same_tensors,
    seeded,
    shared_sites,
)
from zoo import LARGE, ZOO

from timm.layers import BatchNormAct2d  # isort: skip

BUDGETS = (0.1, 0.5, 1.0, 2.0)


def marks_of(name: str, budget: float) -> list[pytest.MarkDecorator]:
    """Most take longer than all tests may; some run beside the rest of the zoo, others at night."""
    if name == "resnet18" or (name, budget) == ("vit_tiny_patch16_224", 0.5):
        return []
    return [pytest.mark.slow if name in LARGE or budget != 0.5 else pytest.mark.zoo]


MODES = pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
EXAMPLE_SIZE, BATCH_SIZE = 2, 3


@dataclass(frozen=True)
class Case:
    """A model at a budget; tests work on copies.

    Attributes:
        name: of the model.
        budget: a share.
        original: the model that was transformed.
        shared: what came out.
        moved: the same, away from birth: there, zeros and tiny factors hide what stands behind
            them, such as the last norm of a residual branch.
        outputs: mode -> what ``moved`` gives.
    """

    name: str
    budget: float
    original: nn.Module
    shared: nn.Module
    moved: nn.Module
    outputs: dict[bool, Tensor]

    def inputs(self, batch_size: int = BATCH_SIZE) -> tuple[Tensor, ...]:
        return ZOO[self.name].inputs(batch_size)


@pytest.fixture(
    scope="module",  # pytest runs all tests of a case together, then drops it
    params=[
        pytest.param((name, budget), marks=marks_of(name, budget))
        for name in ZOO
        for budget in BUDGETS
    ],
    ids=lambda case: f"{case[0]}-{case[1]}",
)
def case(request: pytest.FixtureRequest) -> Case:
    name, budget = request.param
    original = ZOO[name].make()
    shared = npas_fx.transform(
        original,
        budget,
        example_inputs=ZOO[name].inputs(EXAMPLE_SIZE),
        verify=budget == 0.5,  # the tests do without; once, that it is content with all of these
    )
    moved = move(copy.deepcopy(shared))
    x = ZOO[name].inputs(BATCH_SIZE)
    outputs = {mode: call(moved, x, mode=mode) for mode in (True, False)}
    return Case(name, budget, original, shared, moved, outputs)


def move(module: nn.Module) -> nn.Module:
    """Add a tenth of its deviation to each tensor; a tenth to vectors and what is constant."""
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in (*module.parameters(), *statistics(module).values()):
            std = tensor.std(correction=0).item() if tensor.dim() > 1 else 0.0
            tensor += 0.1 * (std or 1.0) * torch.randn(tensor.shape, generator=noise)
    return module


def statistics(module: nn.Module) -> dict[str, Tensor]:
    """The means and variances of batch norms."""
    return {name: buffer for name, buffer in module.named_buffers() if "running_" in name}


def loss_of(output: Tensor) -> Tensor:
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    return (output - target).square().mean()


def call(module: nn.Module, inputs: tuple[Tensor, ...], *, mode: bool) -> Tensor:
    """The output of a copy, with the same random numbers each time.

    Gradients are on: without, a generated weight requires none but a plain one still does, and
    torch's matmul adds up in another order for the two.
    """
    copied = copy.deepcopy(module).train(mode)
    return seeded(lambda: copied(*inputs)).detach()


def test_budget_is_used_to_the_last_parameter(case):
    size = count_trainable(case.original)
    assert count_trainable(case.shared) == int(case.budget * size + 1e-9)
    assert plan_of(case.shared).parameters == count_trainable(case.shared)


def test_banks_generate_what_the_formula_says(case):
    with torch.no_grad():
        for bank in banks_of(case.moved):
            for weight, expected in zip(bank(), by_formula(bank), strict=True):
                assert_close("weight", weight, expected.float(), torch.float32)


def test_what_is_not_shared_is_the_models_own(case):
    shared = {name for sites in shared_sites(plan_of(case.shared)) for name in sites}
    for kind in (nn.Module.named_parameters, nn.Module.named_buffers):
        ours = dict(kind(case.shared))
        for name, tensor in kind(case.original):
            assert name in shared or torch.equal(ours[name], tensor), name
    if case.budget == 1.0:
        assert not banks_of(case.shared)
        model = copy.deepcopy(case.original)
        model.load_state_dict(case.moved.state_dict())
        for mode, output in case.outputs.items():
            assert torch.equal(call(model, case.inputs(), mode=mode), output)


@MODES
def test_it_is_the_original_with_generated_weights(case, mode):
    original, shared = copy.deepcopy(case.original).train(mode), copy.deepcopy(case.moved)
    shared.train(mode)
    x, dtype = case.inputs(), torch.float32
    ours = dict(shared.named_buffers())
    buffers = {name: ours[name].clone() for name, _ in original.named_buffers()}
    parameters = dict(shared.named_parameters())
    expected = seeded(
        lambda: run_original(original, generated(shared, plan_of(shared)), shared, x, buffers)
    )
    got = seeded(lambda: shared(*x))
    assert_close("output", got, expected, dtype)
    for name, buffer in buffers.items():
        assert_close(name, ours[name].double(), buffer.double(), dtype)
    got_gradients = gradients(loss_of(got), parameters)
    expected_gradients = gradients(loss_of(expected), parameters)
    floor = 1e-3 * max(map(largest, expected_gradients.values()))
    for name, gradient in expected_gradients.items():
        assert largest(gradient) > 0 or reaches_nothing(original, shared, parameters[name], x), name
        assert_close(name, got_gradients[name], gradient, dtype, is_gradient=True, floor=floor)


def reaches_nothing(
    original: nn.Module, shared: nn.Module, parameter: Tensor, x: tuple[Tensor, ...]
) -> bool:
    """Whether plain weights get no gradient where this parameter reaches them.

    A few elements may all be taps of kernels that see only padding, on pictures this small.
    """
    weights = generated(shared, plan_of(shared))
    buffers = {name: shared.get_buffer(name).clone() for name, _ in original.named_buffers()}
    found = gradients(
        loss_of(seeded(lambda: run_original(original, weights, shared, x, buffers))), weights
    )
    moved = copy.deepcopy(shared)
    names = [name for name, tensor in shared.named_parameters() if tensor is parameter]
    with torch.no_grad():
        moved.get_parameter(names[0]).add_(1.0)
        after = generated(moved, plan_of(moved))
    felt = [found[name][after[name] != weight] for name, weight in weights.items()]
    assert any(len(gradient) for gradient in felt)
    return all(bool((gradient == 0).all()) for gradient in felt)


def test_a_training_step_changes_every_parameter(case):
    shared = copy.deepcopy(case.moved).train()
    before = {name: p.detach().clone() for name, p in shared.named_parameters()}
    optimizer = torch.optim.Adam(npas_fx.param_groups(shared, lr=1e-3, weight_decay=0.0))
    loss = seeded(lambda: loss_of(shared(*case.inputs())))
    loss.backward()
    optimizer.step()
    assert bool(loss.isfinite())
    for name, tensor in (*shared.named_parameters(), *shared.named_buffers()):
        assert bool(tensor.isfinite().all()), name
        assert name not in before or not torch.equal(tensor, before[name]), name


def test_save_and_load_are_bit_for_bit(case, tmp_path):
    npas_fx.save(case.moved, tmp_path)
    loaded = npas_fx.load(
        tmp_path, ZOO[case.name].make(seed=5), example_inputs=case.inputs(EXAMPLE_SIZE)
    )
    assert plan_of(loaded) == plan_of(case.moved)
    assert same_tensors(loaded, case.moved)
    for mode, output in case.outputs.items():
        assert torch.equal(call(loaded, case.inputs(), mode=mode), output)


def test_materialized_it_is_a_plain_model(case):
    plain = npas_fx.materialize(case.moved)
    assert type(plain) is type(case.original)
    assert plain.state_dict().keys() == case.original.state_dict().keys()
    ZOO[case.name].make(seed=9).load_state_dict(plain.state_dict())  # strict
    for name, weight in generated(case.moved, plan_of(case.moved)).items():
        assert torch.equal(plain.get_parameter(name), weight), name
    assert torch.equal(call(plain, case.inputs(), mode=False), case.outputs[False])


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["mobilenetv3_small_100", "densenet121"])
@pytest.mark.parametrize("mode", [True, False], ids=["eval to train", "train to eval"])
def test_norms_with_an_activation_follow_the_mode(name, mode):
    model = move(ZOO[name].make()).train(not mode)
    assert any(isinstance(part, BatchNormAct2d) for part in model.modules())
    shared = npas_fx.transform(model, 1.0, example_inputs=ZOO[name].inputs(EXAMPLE_SIZE))
    before = {key: buffer.clone() for key, buffer in statistics(model).items()}
    x = ZOO[name].inputs(BATCH_SIZE)
    assert torch.equal(shared.train(mode)(*x), model.train(mode)(*x))
    ours = statistics(shared)
    for key, buffer in statistics(model).items():
        assert torch.equal(ours[key], buffer), key
        assert torch.equal(buffer, before[key]) is not mode, key
