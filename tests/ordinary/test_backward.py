"""Several calls before one backward, accumulated gradients, no gradients, penalties.

In a user's words: ``docs/training.md``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import npas_fx
from models import MODELS, loss_of
from npas_fx import plan_of, transform
from oracle import (
    banks_of,
    by_formula,
    gradients,
    same_tensors,
    seeded,
    shared_sites,
)
from ordinary import (
    assert_same,
    assert_same_gradients,
    budgets,
    emitted,
    example,
    names,
    plain_of,
    take_step,
    values,
)

# The model called twice before one backward


@names
@budgets
def test_two_batches_before_one_backward(name, budget):
    shared = emitted(name, budget).train()
    one, two = example(name).inputs(3, seed=1), example(name).inputs(2, seed=2)
    plain = plain_of(shared, example(name).make())
    assert_same_gradients(
        shared,
        lambda: loss_of(shared(*one)) + 2 * loss_of(shared(*two)),
        lambda: loss_of(plain(*one)) + 2 * loss_of(plain(*two)),
    )


@budgets
def test_a_siamese_network_and_one_applied_to_its_own_output(budget):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 24), nn.Linear(24, 8))
        one, two = torch.randn(2, 4, 8)
    shared = transform(model, budget, example_inputs=one)
    plain = plain_of(shared, model)

    def distance(net: Callable[[Tensor], Tensor]) -> Tensor:
        return functional.cosine_similarity(net(one), net(two)).sum()

    def repeated(net: Callable[[Tensor], Tensor]) -> Tensor:
        return loss_of(net(net(net(one))))

    for loss in (distance, repeated):
        assert_same_gradients(shared, lambda loss=loss: loss(shared), lambda loss=loss: loss(plain))


@budgets
def test_two_backwards_through_one_graph_and_second_derivatives(budget):
    shared = emitted("mlp", budget).double().eval()
    x = MODELS["mlp"].inputs(3)[0].double().requires_grad_()
    plain = plain_of(shared, MODELS["mlp"].make().double())

    def penalty(net: Callable[[Tensor], Tensor]) -> Tensor:
        (slope,) = torch.autograd.grad(net(x).tanh().sum(), x, create_graph=True)
        return slope.square().sum()

    def sharpness(net: Callable[[Tensor], Tensor]) -> Tensor:
        own = list(shared.parameters())
        slopes = torch.autograd.grad(net(x).tanh().sum(), own, create_graph=True)
        return sum(slope.square().sum() for slope in slopes)

    for loss in (penalty, sharpness):
        assert_same_gradients(
            shared, lambda loss=loss: loss(shared), lambda loss=loss: loss(plain), torch.float64
        )
    loss = loss_of(shared(x))
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in shared.named_parameters()}
    loss.backward()
    assert all(torch.allclose(p.grad, 2 * once[name]) for name, p in shared.named_parameters())


# Gradient accumulation


@pytest.mark.parametrize("name", ["mlp", "residual_cnn", "gpt", "recursive", "lstm"])
@budgets
def test_accumulated_gradients_are_those_of_the_sum(name, budget):
    shared = emitted(name, budget).eval()  # no dropout
    plain = plain_of(shared, example(name).make())
    batches = [example(name).inputs(2, seed=seed) for seed in range(3)]
    for batch in batches:
        (loss_of(shared(*batch)) / 3).backward()
    found = {key: p.grad for key, p in shared.named_parameters()}
    parameters = dict(shared.named_parameters())
    together = sum(loss_of(shared(*batch)) / 3 for batch in batches)
    assert_same(found, gradients(together, parameters))
    assert_same(found, gradients(sum(loss_of(plain(*b)) / 3 for b in batches), parameters))


# no_grad and inference_mode


MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
modes = pytest.mark.parametrize("mode", MODES)


@contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved


@modes
@names
@budgets
def test_without_gradients_it_computes_the_same_and_keeps_nothing(name, budget, mode):
    shared, inputs = emitted(name, budget).eval(), example(name).inputs(3)
    with saved_tensors() as saved:
        expected = loss_of(shared(*inputs))
    assert saved
    plain = plain_of(shared, example(name).make(), is_exact=True)
    with MODES[mode](), saved_tensors() as saved:
        found = loss_of(shared(*inputs))
        assert torch.equal(found, loss_of(plain(*inputs)))
    assert torch.allclose(found, expected)  # an LSTM takes another way without gradients
    assert found.grad_fn is None
    assert not found.requires_grad
    assert not saved


@modes
@budgets
def test_it_trains_after_a_first_call_without_gradients(budget, mode):
    """Nothing that was made in inference mode may be kept for later."""
    shared, inputs = emitted("wrn", budget), MODELS["wrn"].inputs(3)
    untouched = copy.deepcopy(shared)
    with MODES[mode]():
        shared.eval()(*inputs)
        plain = npas_fx.materialize(untouched)
        plan = npas_fx.plan(MODELS["wrn"].make(), 0.4)
    shared.train()
    loss, expected = (seeded(lambda m=m: loss_of(m(*inputs))) for m in (shared, untouched))
    loss.backward()
    expected.backward()
    assert torch.equal(loss, expected)
    for name, parameter in shared.named_parameters():
        assert torch.equal(parameter.grad, untouched.get_parameter(name).grad)
        assert not parameter.is_inference()
    assert torch.equal(plain.fc.bias, shared.fc.bias)
    assert npas_fx.apply(MODELS["wrn"].make(), plan).train()(*inputs).requires_grad


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
@budgets
def test_what_is_made_without_gradients_can_be_trained(budget, mode, tmp_path):
    inputs = MODELS["mlp"].inputs(4)
    model = MODELS["mlp"].make()
    expected = transform(model, budget, example_inputs=inputs)
    with MODES[mode]():
        made = transform(model, budget, example_inputs=inputs)
        applied = npas_fx.apply(model, plan_of(expected), example_inputs=inputs)
        npas_fx.save(made, tmp_path)
        loaded = npas_fx.load(tmp_path, model, example_inputs=inputs)
        plain = npas_fx.materialize(made)
    for each in (made, applied, loaded):
        assert same_tensors(each, expected)
    for each in (made, applied, loaded, plain):
        before = values(each)
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        take_step(each, lambda each=each: seeded(lambda: loss_of(each(*inputs))), optimizer)
        assert all(not torch.equal(p, before[name]) for name, p in each.named_parameters())


@budgets
def test_a_model_and_inputs_made_in_inference_mode(budget):
    with torch.inference_mode():
        model, inputs = MODELS["wrn"].make(), MODELS["wrn"].inputs(3)
    assert model.fc.weight.is_inference()
    assert inputs[0].is_inference()
    shared = transform(model, budget, example_inputs=inputs)
    assert not any(t.is_inference() for t in (*shared.parameters(), *shared.buffers()))
    with pytest.raises(RuntimeError, match="Inference tensors"):
        loss_of(model(*MODELS["wrn"].inputs(3))).backward()
    loss_of(shared(*MODELS["wrn"].inputs(3))).backward()
    assert all(p.grad is not None for p in shared.parameters())


# A regulariser that reads parameters outside of forward


@budgets
def test_a_penalty_on_parameters_is_one_on_templates(budget):
    shared = emitted("mlp", budget)
    penalty = sum(p.square().sum() for p in shared.parameters())
    penalty.backward()
    assert all(torch.equal(p.grad, 2 * p) for p in shared.parameters())
    weights = npas_fx.materialize(shared)
    of_weights = sum(p.square().sum() for p in weights.parameters())
    # Weights and parameters are the same only where nothing is shared.
    assert torch.isclose(penalty, of_weights, rtol=1e-3) == (budget == 1.0)


@pytest.mark.parametrize("budget", [0.4, 2.0])
def test_a_penalty_on_generated_weights(budget):
    shared = emitted("mlp", budget).double()
    made = npas_fx.weights_of(shared)
    plain = npas_fx.materialize(shared)
    assert list(made) == [name for group in shared_sites(plan_of(shared)) for name in group]
    assert made
    for name, weight in made.items():
        assert torch.equal(weight, plain.get_parameter(name))
    parameters = {n: p for n, p in shared.named_parameters() if n.startswith("npas_banks")}
    found = gradients(sum(w.square().sum() for w in made.values()), parameters)
    formula = [weight for bank in banks_of(shared) for weight in by_formula(bank)]
    expected = gradients(sum(w.square().sum() for w in formula), parameters)
    assert_same(found, expected, torch.float64)

    def penalty():
        return sum(weight.square().sum() for weight in npas_fx.weights_of(shared).values())

    before = penalty().item()
    optimizer = torch.optim.SGD(shared.parameters(), lr=0.01)
    for _ in range(3):
        take_step(shared, penalty, optimizer)
    assert penalty().item() < before


def test_weights_of_a_wrapped_module_and_of_others():
    shared = emitted("mlp", 0.5)
    compiled = npas_fx.weights_of(torch.compile(shared))
    assert compiled.keys() == npas_fx.weights_of(shared).keys()
    assert npas_fx.weights_of(npas_fx.transform(MODELS["mlp"].make(), 1.0)) == {}
    with pytest.raises(TypeError, match="not made by npas_fx"):
        npas_fx.weights_of(MODELS["mlp"].make())


def test_a_shared_weight_is_no_attribute_and_what_is_kept_is():
    shared = emitted("mlp", 0.4)
    plain = npas_fx.materialize(shared)
    for name in (name for group in shared_sites(plan_of(shared)) for name in group):
        part = shared.get_submodule(name.rpartition(".")[0])
        assert not hasattr(part, "weight")
        with pytest.raises(AttributeError, match="weight"):
            _ = part.weight
        with pytest.raises(AttributeError, match="weight"):
            shared.get_parameter(name)
        assert plain.get_parameter(name).requires_grad
    for name in plan_of(shared).kept:
        assert torch.equal(shared.get_parameter(name), plain.get_parameter(name))
