"""Frozen parameters: before the transform and after.

In a user's words: ``docs/training.md``.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import npas_fx
from models import MODELS, loss_of
from npas_fx import plan_of, transform
from oracle import (
    count_trainable,
    same_tensors,
    seeded,
)
from ordinary import (
    BUDGETS,
    budgets,
    emitted,
    example,
    freeze,
    take_step,
    values,
)

FROZEN = {
    "mlp": ("stem", "hidden"),
    "residual_cnn": ("blocks.1.conv2",),
    "gpt": ("transformer.h.0",),
    "resnet18": ("conv1", "bn1", "layer1", "layer2", "layer3"),
}


@pytest.mark.parametrize(
    ("name", "budget"),
    [
        *((name, budget) for name in FROZEN if name in MODELS for budget in BUDGETS),
        pytest.param("resnet18", 0.4, marks=pytest.mark.slow),
    ],
)
def test_frozen_layers_stay_as_they_are(name, budget, tmp_path):
    model, inputs = freeze(example(name).make(), *FROZEN[name]), example(name).inputs(2)
    frozen = {key: p for key, p in model.named_parameters() if not p.requires_grad}
    size = count_trainable(model)
    assert size < sum(p.numel() for p in model.parameters())
    shared = transform(model, budget, example_inputs=inputs)
    plan = plan_of(shared)
    assert plan.model_parameters == size
    assert plan.parameters == count_trainable(shared) == int(budget * size + 1e-9)
    assert {key for key, why in plan.kept.items() if why == "frozen"} == frozen.keys()
    before = values(shared)
    optimizer = torch.optim.AdamW(shared.parameters(), lr=0.01, weight_decay=0.1)
    take_step(shared, lambda: loss_of(shared(*inputs)), optimizer)
    for key, parameter in shared.named_parameters():
        assert parameter.requires_grad == (key not in frozen)
        assert (parameter.grad is None) == (key in frozen)
        if key in frozen or parameter.grad.any():  # behind a dead unit there is none
            assert torch.equal(parameter, before[key]) == (key in frozen)
    for key, parameter in frozen.items():
        assert torch.equal(shared.get_parameter(key), parameter)
    npas_fx.save(shared, tmp_path)
    architecture = freeze(example(name).make(seed=3), *FROZEN[name])
    loaded = npas_fx.load(tmp_path, architecture, example_inputs=inputs)
    for other in (loaded, copy.deepcopy(shared)):
        assert same_tensors(other, shared)
        assert [p.requires_grad for p in other.parameters()] == [
            p.requires_grad for p in shared.parameters()
        ]
    plain = npas_fx.materialize(shared)
    assert {key for key, p in plain.named_parameters() if not p.requires_grad} == frozen.keys()
    with pytest.raises(npas_fx.StorageError, match="frozen"):
        npas_fx.load(tmp_path, example(name).make(), example_inputs=inputs)


@pytest.mark.parametrize("budget", ["1k", 1_000_000, "1kB"])
def test_a_model_that_is_frozen_whole_has_nothing_to_share(budget):
    model, inputs = MODELS["mlp"].make().requires_grad_(False), MODELS["mlp"].inputs(3)
    shared = transform(model, budget, example_inputs=inputs)
    assert plan_of(shared).parameters == count_trainable(shared) == 0
    assert set(plan_of(shared).kept.values()) == {"frozen"}
    assert torch.equal(shared.eval()(*inputs), model.eval()(*inputs))
    assert npas_fx.param_groups(shared, 0.1, 0.1) == []


def test_a_share_of_no_trainable_parameters_is_refused():
    with pytest.raises(npas_fx.BudgetError, match="trainable parameters"):
        transform(MODELS["mlp"].make().requires_grad_(False), 1.0)


def with_some(kind: str) -> nn.Module:
    """A module whose banks have tensors of this kind; which do is the solver's choice."""
    generator = "tied" if kind == "gain" else "wavg"
    for budget in range(1200, 1230):
        shared = transform(MODELS["mlp"].make(), budget, generators=[generator])
        if any(name.endswith(f".{kind}") for name, _ in shared.named_parameters()):
            return shared
    raise AssertionError(f"no plan with {kind}")


@pytest.mark.parametrize("kind", ["templates", "coefficients", "gain", "partial"])
def test_a_part_of_the_banks_can_be_frozen_afterwards(kind):
    shared, inputs = with_some(kind).eval(), MODELS["mlp"].inputs(4)
    whole = copy.deepcopy(shared)
    loss_of(whole(*inputs)).backward()
    chosen = [name for name, _ in shared.named_parameters() if name.endswith(f".{kind}")]
    for name in chosen:
        shared.get_parameter(name).requires_grad_(False)
    before = values(shared)
    grouped = npas_fx.param_groups(shared, lr=0.1, weight_decay=0.1)
    assert sum(p.numel() for group in grouped for p in group["params"]) == count_trainable(shared)
    take_step(shared, lambda: loss_of(shared(*inputs)), torch.optim.AdamW(grouped))
    for name, parameter in shared.named_parameters():
        if name in chosen:
            assert parameter.grad is None
            assert torch.equal(parameter, before[name])
        else:
            assert torch.equal(parameter.grad, whole.get_parameter(name).grad), name
            assert not torch.equal(parameter, before[name])


@budgets
def test_all_can_be_frozen_afterwards_and_set_free_again(budget):
    shared, inputs = emitted("mlp", budget), MODELS["mlp"].inputs(4)
    expected = seeded(lambda: loss_of(shared(*inputs)))
    shared.requires_grad_(False)
    assert not shared(*inputs).requires_grad
    assert npas_fx.param_groups(shared, 0.1, 0.1) == []
    assert not any(p.requires_grad for p in copy.deepcopy(shared).parameters())
    x = inputs[0].clone().requires_grad_()
    shared(x).sum().backward()  # as a fixed feature extractor, or to attack it
    assert bool(x.grad.any())
    shared.requires_grad_(True)
    loss = seeded(lambda: loss_of(shared(*inputs)))
    loss.backward()
    assert torch.equal(loss, expected)
    assert all(p.grad is not None for p in shared.parameters())
