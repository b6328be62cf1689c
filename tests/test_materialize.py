"""Materialize: the plain architecture again, with the weights that are generated."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import npas_fx
from models import GPT, MLP, MODELS
from npas_fx import PlanError, materialize, plan_of, transform
from oracle import count_trainable, generated, same_tensors, snapshot


def emit(budget: float = 0.4, name: str = "mlp") -> nn.Module:
    example = MODELS[name]
    return transform(example.make(), budget, example_inputs=example.inputs(3))


@pytest.mark.parametrize("name", ["mlp", "wrn", "gpt"])
def test_it_is_an_instance_of_the_users_class_with_plain_weights(name):
    shared, model = emit(name=name), MODELS[name].make()
    plain = materialize(shared)
    assert type(plain) is type(model)
    assert [type(m) for m in plain.modules()] == [type(m) for m in model.modules()]
    weights = generated(shared, plan_of(shared))
    for key, parameter in plain.named_parameters():
        assert type(parameter) is nn.Parameter
        assert parameter.is_leaf
        assert parameter.is_contiguous()
        assert parameter.grad is None
        expected = weights[key] if key in weights else shared.get_parameter(key)
        assert torch.equal(parameter, expected)


def test_it_owns_its_tensors():
    shared = emit()
    before = snapshot(shared)
    plain = materialize(shared)
    with torch.no_grad():
        for tensor in (*plain.parameters(), *plain.buffers()):
            tensor.fill_(7)
    assert snapshot(shared) == before
    pointers = [p.untyped_storage().data_ptr() for p in plain.parameters()]
    assert len(set(pointers)) == len(pointers)


def test_it_can_be_pickled_trained_and_transformed_again(tmp_path):
    plain = materialize(emit())
    torch.save(plain.state_dict(), tmp_path / "state.pt")
    fresh = MLP()
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same_tensors(fresh, plain)
    again = transform(plain, 0.4, example_inputs=MODELS["mlp"].inputs(3))
    assert plan_of(again) == plan_of(emit())


def test_what_is_tied_stays_tied():
    plain = materialize(emit(name="gpt"))
    assert plain.lm_head.weight is plain.transformer.wte.weight
    assert count_trainable(plain) == count_trainable(MODELS["gpt"].make())


def test_it_takes_attributes_and_modes_along():
    model = MODELS["wrn"].make()
    model.note = {"epoch": 3}
    model.block1.eval()
    shared = transform(model, 0.5, example_inputs=MODELS["wrn"].inputs(2))
    plain = materialize(shared)
    assert plain.note == {"epoch": 3}
    assert [m.training for m in plain.modules()] == [m.training for m in model.modules()]
    shared.eval()
    assert not any(m.training for m in materialize(shared).modules())


def test_buffers_are_those_of_the_emitted_module():
    shared = emit(name="wrn")
    shared.train()(*MODELS["wrn"].inputs(4))
    plain = materialize(shared)
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, shared.get_buffer(name))
    assert plain.bn.num_batches_tracked == 1


def test_it_does_not_matter_whether_gradients_or_autocast_are_on():
    shared = emit()
    expected = materialize(shared)
    with torch.no_grad():
        assert same_tensors(materialize(shared), expected)
    with torch.autocast("cpu", torch.bfloat16):
        plain = materialize(shared)
        assert same_tensors(plain, expected)
    assert all(p.requires_grad for p in plain.parameters())


def test_frozen_parameters_stay_frozen():
    model = MODELS["mlp"].make()
    model.stem.weight.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    plain = materialize(transform(model, 0.5))
    frozen = {name for name, p in plain.named_parameters() if not p.requires_grad}
    assert frozen == {"stem.weight", "head.bias"}


def test_it_follows_the_dtype_of_the_emitted_module():
    plain = materialize(emit().double())
    assert {p.dtype for p in plain.parameters()} == {torch.float64}
    x = MODELS["mlp"].inputs(2)[0].double()
    assert torch.equal(plain.eval()(x), emit().double().eval()(x))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_into_a_model_that_is_given(device):
    shared = emit()
    with torch.device(device):
        given = MLP()
    before = snapshot(given) if device == "cpu" else None
    plain = materialize(shared, given)
    assert plain is not given
    assert same_tensors(plain, materialize(shared))
    assert before is None or snapshot(given) == before


def test_another_architecture_is_refused():
    with pytest.raises(PlanError, match=r"stem\.weight of shape \[20, 12\]"):
        materialize(emit(), MLP(width=20))
    with pytest.raises(PlanError, match="nothing"):
        materialize(emit(), GPT())


def test_a_stranger_is_refused():
    with pytest.raises(TypeError, match="was not made by npas_fx"):
        materialize(MLP())


def test_a_copy_materializes_to_its_own_weights():
    shared = emit()
    copied = copy.deepcopy(shared)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(2)
    plain = materialize(copied)
    for name, weight in generated(copied, plan_of(copied)).items():
        assert torch.equal(plain.get_parameter(name), weight)
        assert not torch.equal(plain.get_parameter(name), materialize(shared).get_parameter(name))


def test_moved_aside_from_npas_fx_it_needs_nothing_of_it():
    plain = materialize(emit())
    assert not any(type(m).__module__.startswith(npas_fx.__name__) for m in plain.modules())
