"""Six kinds of models at four budgets: all that people do with a module."""

from __future__ import annotations

import copy
import inspect
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import npas_fx
from models import MODELS, loss_of
from npas_fx import InfeasibleBudgetError, plan_of
from oracle import count_trainable, same_tensors, seeded

BUDGETS = (0.1, 0.5, 1.0, 2.0)
CASES = [(name, budget) for name in MODELS for budget in BUDGETS]
each = pytest.mark.parametrize(("name", "budget"), CASES)


@cache
def _emitted(name: str, budget: float) -> nn.Module:
    example = MODELS[name]
    return npas_fx.transform(example.make(), budget, example_inputs=example.inputs(3))


def emitted(name: str, budget: float) -> nn.Module:
    return copy.deepcopy(_emitted(name, budget))


def call(module: nn.Module, inputs: tuple[torch.Tensor, ...], *, mode: bool) -> Any:
    """Outputs as a tuple, with the same random numbers each time, of a copy."""
    output = seeded(lambda: copy.deepcopy(module).train(mode)(*inputs))
    return output if isinstance(output, tuple) else (output,)


def assert_equal_outputs(one: nn.Module, other: nn.Module, name: str, *modes: bool) -> None:
    inputs = MODELS[name].inputs(5)
    for mode in modes or (True, False):
        for a, b in zip(call(one, inputs, mode=mode), call(other, inputs, mode=mode), strict=True):
            assert torch.equal(a, b)


@each
def test_budget_is_used_to_the_last_parameter(name, budget):
    shared = emitted(name, budget)
    size = count_trainable(MODELS[name].make())
    assert count_trainable(shared) == int(budget * size + 1e-9) == plan_of(shared).parameters


@each
@pytest.mark.parametrize("batch_size", [2, 7])
def test_other_batch_sizes(name, budget, batch_size):
    shared, example = emitted(name, budget), MODELS[name]
    model = example.make()
    for mode in (True, False):
        outputs = call(shared, example.inputs(batch_size), mode=mode)
        expected = call(model, example.inputs(batch_size), mode=mode)
        assert [o.shape for o in outputs] == [o.shape for o in expected]
        assert all(bool(o.isfinite().all()) for o in outputs)


@each
def test_a_training_step_changes_every_parameter(name, budget):
    shared, example = emitted(name, budget), MODELS[name]
    before = {key: p.detach().clone() for key, p in shared.named_parameters()}
    optimizer = torch.optim.SGD(npas_fx.param_groups(shared, lr=0.1, weight_decay=0.0))
    loss = seeded(lambda: loss_of(shared.train()(*example.inputs(6))))
    loss.backward()
    optimizer.step()
    assert bool(loss.isfinite())
    for key, parameter in shared.named_parameters():
        assert parameter.grad is not None, key
        assert bool(parameter.isfinite().all()), key
        assert not torch.equal(parameter, before[key]), key


@each
def test_training_reduces_the_loss(name, budget):
    shared, example = emitted(name, budget), MODELS[name]
    optimizer = torch.optim.AdamW(npas_fx.param_groups(shared, lr=3e-3, weight_decay=0.01))
    inputs = example.inputs(6)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = seeded(lambda: loss_of(shared.train()(*inputs)))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@each
def test_save_and_load(name, budget, tmp_path):
    shared, example = emitted(name, budget), MODELS[name]
    npas_fx.save(shared, tmp_path)
    loaded = npas_fx.load(tmp_path, example.make(seed=5), example_inputs=example.inputs(2))
    assert plan_of(loaded) == plan_of(shared)
    assert same_tensors(loaded, shared)
    assert_equal_outputs(loaded, shared, name)


@each
def test_materialize(name, budget):
    shared, example = emitted(name, budget), MODELS[name]
    model = example.make()
    plain = npas_fx.materialize(shared)
    assert type(plain) is type(model)
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert count_trainable(plain) == count_trainable(model)
    assert_equal_outputs(plain, shared, name, False)
    into = npas_fx.materialize(shared, example.make(seed=9))
    assert same_tensors(into, plain)


@each
def test_deepcopy(name, budget):
    shared = emitted(name, budget)
    copied = copy.deepcopy(shared)
    assert same_tensors(copied, shared)
    assert plan_of(copied) == plan_of(shared)
    ours = {p.data_ptr() for p in shared.parameters()}
    assert not ours & {p.data_ptr() for p in copied.parameters()}
    assert_equal_outputs(copied, shared, name)
    expected = call(shared, MODELS[name].inputs(3), mode=False)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    again = call(shared, MODELS[name].inputs(3), mode=False)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


@each
def test_state_dict(name, budget):
    shared, example = emitted(name, budget), MODELS[name]
    other = npas_fx.apply(
        example.make(seed=3), plan_of(shared), example_inputs=example.inputs(2), seed=8
    )
    keys = other.load_state_dict(copy.deepcopy(shared.state_dict()))
    assert not keys.missing_keys
    assert not keys.unexpected_keys
    assert same_tensors(other, shared)
    assert_equal_outputs(other, shared, name)


@each
def test_float64(name, budget):
    shared, example = emitted(name, budget), MODELS[name]
    double = copy.deepcopy(shared).to(torch.float64)
    assert all(p.dtype == torch.float64 for p in double.parameters())
    inputs = tuple(x.double() if x.is_floating_point() else x for x in example.inputs(4))
    for got, expected in zip(
        call(double, inputs, mode=False), call(shared, example.inputs(4), mode=False), strict=True
    ):
        assert got.dtype == torch.float64
        assert torch.allclose(got, expected.double(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_at_its_own_size_it_is_the_model(name):
    assert_equal_outputs(emitted(name, 1.0), MODELS[name].make(), name)


@pytest.mark.parametrize("name", MODELS)
def test_its_class_is_named_after_the_models_and_has_its_signature(name):
    shared, model = emitted(name, 0.5), MODELS[name].make()
    assert type(model).__name__ in type(shared).__name__
    assert inspect.signature(shared.forward) == inspect.signature(model.forward)


def test_infeasible_budget_names_what_stays_and_what_would_do():
    example = MODELS["lstm"]
    model = example.make()
    with pytest.raises(InfeasibleBudgetError) as caught:
        npas_fx.transform(model, 0.1, exclude="lstm.*")
    message = str(caught.value)
    for name, parameter in model.lstm.named_parameters():
        if name.startswith("weight"):
            assert f"'lstm.{name}' {parameter.numel()}" in message
    assert "excluded" in message
    assert str(caught.value.smallest) in message
    smallest = caught.value.smallest
    shared = npas_fx.transform(model, smallest, exclude="lstm.*", example_inputs=example.inputs(2))
    assert count_trainable(shared) == smallest
    for name, parameter in model.lstm.named_parameters():
        assert torch.equal(shared.get_parameter(f"lstm.{name}"), parameter)


def test_gpt_without_targets_is_another_call():
    example = MODELS["gpt"]
    idx, targets = example.inputs(3)
    shared = npas_fx.transform(example.make(), 0.5, example_inputs=(idx,))
    assert shared(idx[:, :5]).shape == (3, 5, 17)
    with pytest.raises(npas_fx.GuardError, match="targets"):
        shared(idx, targets)
    logits, loss = emitted("gpt", 0.5)(idx, targets=targets)
    assert logits.shape == (3, 8, 17)
    assert loss.shape == ()
    with pytest.raises(npas_fx.GuardError, match="targets"):
        emitted("gpt", 0.5)(idx)


def test_tied_weights_are_one_site_under_two_names():
    shared = emitted("gpt", 1.0)
    assert shared.lm_head.weight is shared.transformer.wte.weight
    plain = npas_fx.materialize(emitted("gpt", 0.1))
    assert plain.lm_head.weight is plain.transformer.wte.weight
    names = [name for bank in plan_of(shared).banks for name in bank.sites]
    assert sum("wte" in name or "lm_head" in name for name in names) == 1


def test_a_block_that_is_called_often_counts_once():
    plan = plan_of(emitted("recursive", 0.5))
    assert sorted(name for bank in plan.banks for name in bank.sites) == [
        "block.down.weight",
        "block.up.weight",
        "head.weight",
        "stem.weight",
    ]


def test_dropout_of_the_emitted_module_follows_its_mode():
    shared, inputs = emitted("wrn", 0.5), MODELS["wrn"].inputs(4)
    one, two = shared.train()(*inputs), shared(*inputs)
    assert not torch.equal(one, two)
    one, two = shared.eval()(*inputs), shared(*inputs)
    assert torch.equal(one, two)
