"""What people do to ordinary models: freeze, pad, accumulate, mix dtypes, train on one example.

Each part stands in ``docs/training.md`` in a user's words.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import npas_fx
from models import GPT, MODELS, loss_of
from npas_fx import plan_of, transform
from oracle import (
    assert_close,
    banks_of,
    by_formula,
    count_trainable,
    generated,
    gradients,
    run_original,
    same_tensors,
    seeded,
    shared_sites,
)
from zoo import ZOO

BUDGETS = (0.4, 1.0, 2.0)
budgets = pytest.mark.parametrize("budget", BUDGETS)
names = pytest.mark.parametrize("name", MODELS)


def example(name: str) -> Any:
    return MODELS[name] if name in MODELS else ZOO[name]


def lowest(name: str, budget: float) -> float:
    """An LSTM stays plain: the smallest budget of that model is half its size."""
    return max(budget, 0.6) if name == "lstm" else budget


@cache
def _emitted(name: str, budget: float) -> nn.Module:
    inputs = example(name).inputs(2)
    return transform(example(name).make(), lowest(name, budget), example_inputs=inputs)


def emitted(name: str, budget: float) -> nn.Module:
    return copy.deepcopy(_emitted(name, budget))


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def weights_by_formula(shared: nn.Module) -> dict[str, Tensor]:
    """Every shared weight from the formula alone, with the padding rows that banks hold."""
    weights = {}
    for bank, sites in zip(banks_of(shared), shared_sites(plan_of(shared)), strict=True):
        dtype = bank.templates.dtype
        for place, (name, weight) in enumerate(zip(sites, by_formula(bank), strict=True)):
            weights[name] = weight.to(dtype)
            if place in bank.held_rows:
                row, held = bank.held_rows[place], bank.tensors()[f"held_row_{place}"]
                parts = [weight[:row].to(dtype), held[None], weight[row + 1 :].to(dtype)]
                weights[name] = torch.cat(parts)
    return weights


def plain_of(
    shared: nn.Module, original: nn.Module, *, is_exact: bool = False
) -> Callable[..., Any]:
    """The original's own code with the weights that ``shared`` stands for, as a function.

    Args:
        shared: made from ``original``.
        original: is called in the mode that ``shared`` is in now.
        is_exact: take the weights that the banks generate, bit for bit, and not the formula's.
    """
    buffers = buffers_of(shared)
    original = original.train(shared.training)

    def call(*inputs: Tensor) -> Any:
        weights = generated(shared, plan_of(shared)) if is_exact else weights_by_formula(shared)
        owned = {name: buffers[name] for name, _ in original.named_buffers()}
        return run_original(original, weights, shared, inputs, owned)

    return call


def assert_same_gradients(
    shared: nn.Module,
    loss: Callable[[], Tensor],
    expected: Callable[[], Tensor],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Of two losses of the same parameters, each computed with the same random numbers."""
    parameters = {name: p for name, p in shared.named_parameters() if p.requires_grad}
    wanted = gradients(seeded(expected), parameters)
    found = gradients(seeded(loss), parameters)
    assert_same(found, wanted, dtype)
    assert any(bool(gradient.any()) for gradient in found.values())


def assert_same(
    found: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype = torch.float32
) -> None:
    floor = 1e-3 * max(gradient.abs().max().item() for gradient in wanted.values())
    for name in wanted:
        assert_close(name, found[name], wanted[name], dtype, is_gradient=True, floor=floor)


def outputs_of(call: Callable[..., Any], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    output = seeded(lambda: call(*inputs))
    return output if isinstance(output, tuple) else (output,)


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def take_step(
    module: nn.Module, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer
) -> None:
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()


# The padding row of an embedding


class Tagger(nn.Module):
    """Words in, a score for each tag; ``options`` are those of the embedding."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 16, **options)
        self.hidden = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.head = nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.hidden:
            x = x + torch.tanh(layer(x))
        return self.head(x.mean(1))


def tagger(**options: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tagger(**options)


def words(number: int = 8, seed: int = 0) -> Tensor:
    return torch.randint(30, (number, 6), generator=torch.Generator().manual_seed(seed))


def padded(padding_idx: int) -> nn.Module:
    model = tagger(padding_idx=padding_idx)
    with torch.no_grad():
        model.embedding.weight[padding_idx] = 0.7
    return model


def row_of(module: nn.Module, padding_idx: int) -> Tensor:
    return npas_fx.materialize(module).embedding.weight[padding_idx].detach()


@pytest.mark.parametrize("padding_idx", [0, -1])
@pytest.mark.parametrize("budget", [0.2, 0.6, 2.0])
def test_a_shared_padding_row_is_kept_through_weight_decay(budget, padding_idx, tmp_path):
    model, ids = padded(padding_idx), words()
    ids[:, 0] = padding_idx % 30
    together = [["embedding.weight", "hidden.0.weight"]]
    shared = transform(model, budget, example_inputs=ids, same_bank=together)
    assert not hasattr(shared.embedding, "weight")
    row = torch.full((16,), 0.7)
    optimizer = torch.optim.AdamW(shared.parameters(), lr=0.05, weight_decay=0.5)
    for _ in range(3):
        take_step(shared, lambda: loss_of(shared(ids)), optimizer)
    npas_fx.save(shared, tmp_path)
    loaded = npas_fx.load(tmp_path, padded(padding_idx), example_inputs=ids)
    for each in (shared, copy.deepcopy(shared), loaded):
        assert torch.equal(row_of(each, padding_idx), row)
    others = npas_fx.materialize(shared).embedding.weight[1:-1]
    assert not torch.isclose(others, model.embedding.weight[1:-1], atol=1e-3).all()


@pytest.mark.parametrize("padding_idx", [0, -1])
@budgets
def test_the_padding_row_gets_no_gradient(budget, padding_idx):
    model = padded(padding_idx)
    shared = transform(model, budget, example_inputs=words())
    only_padding = torch.full((4, 6), padding_idx % 30)
    weights = generated(shared, plan_of(shared))
    weight = weights.get("embedding.weight")
    if weight is None:
        weight = shared.embedding.weight
    # Of the embedding alone: what the other layers do to its bank must not cover for it.
    rows = functional.embedding(only_padding, weight, padding_idx % 30)
    found = gradients((rows * torch.randn(16)).sum(), dict(shared.named_parameters()))
    assert all(not bool(gradient.any()) for gradient in found.values())
    ids = words()
    ids[:, :3] = padding_idx % 30
    plain = plain_of(shared, model)
    assert_same_gradients(shared, lambda: loss_of(shared(ids)), lambda: loss_of(plain(ids)))


def test_the_padding_row_of_a_dedicated_embedding_is_torchs_own_affair():
    """Its gradient is zero; AdamW decays it, as it does in the plain model."""
    model, ids = padded(0), words()
    shared = transform(model, 1.0, example_inputs=ids)
    for module in (model, shared):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.05, weight_decay=0.5)
        for _ in range(3):
            take_step(module, lambda module=module: loss_of(module(ids)), optimizer)
        assert not module.embedding.weight.grad[0].any()
    assert torch.equal(shared.embedding.weight, model.embedding.weight)
    assert not torch.equal(shared.embedding.weight[0], torch.full((16,), 0.7))


# Embeddings that torch changes by hand: max_norm and sparse


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_norm": 0.5}, "embedding with max_norm, which rewrites its weight in place"),
        ({"sparse": True}, "embedding with sparse gradients"),
        ({"max_norm": 0.5, "sparse": True}, "embedding with max_norm, which rewrites its weight"),
    ],
)
@pytest.mark.parametrize("budget", [0.8, 1.0, 2.0])
def test_max_norm_and_sparse_embeddings_stay_plain_and_train(budget, options, reason):
    model, ids = tagger(**options), words()
    shared = transform(model, budget, example_inputs=ids)
    assert plan_of(shared).kept["embedding.weight"].startswith(reason)
    # That transform ran the result on the example must not be seen.
    assert torch.equal(shared.embedding.weight, model.embedding.weight)
    plain = plain_of(shared, model)
    expected = gradients(loss_of(plain(ids)), dict(shared.named_parameters()))
    loss = loss_of(shared(ids))
    loss.backward()
    gradient = shared.embedding.weight.grad
    assert gradient.is_sparse == ("sparse" in options)
    assert torch.allclose(gradient.to_dense(), expected["embedding.weight"].to_dense(), atol=1e-6)
    rest = [p for name, p in shared.named_parameters() if name != "embedding.weight"]
    kind = torch.optim.SparseAdam if "sparse" in options else torch.optim.Adam
    optimizers = [kind([shared.embedding.weight], lr=0.01), torch.optim.Adam(rest, lr=0.01)]
    for _ in range(10):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(shared(ids)).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert loss_of(shared(ids)) < loss
    unread = [k for k in range(30) if k not in ids]
    assert torch.equal(shared.embedding.weight[unread], model.embedding.weight[unread])
    if "max_norm" in options:
        read = shared.embedding.weight[ids.unique()].norm(dim=1)
        assert bool((read <= 0.5 + 1e-4).all())
        assert bool((model.embedding.weight[unread].norm(dim=1) > 0.5).any())


def test_a_sparse_gradient_fits_sgd():
    model, ids = tagger(sparse=True), words()
    shared = transform(model, 1.0, example_inputs=ids)
    for module in (model, shared):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        take_step(module, lambda module=module: loss_of(module(ids)), optimizer)
    assert torch.equal(shared.embedding.weight, model.embedding.weight)


# Frozen parameters


def freeze(model: nn.Module, *prefixes: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        if name.startswith(prefixes):
            parameter.requires_grad_(False)
    return model


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
        ("resnet18", 0.4),  # takes seconds
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


# dtypes


class MixedDtypes(nn.Module):
    """An embedding in bfloat16, layers in float32, and a head in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 24, padding_idx=0, dtype=torch.bfloat16)
        self.coarse = nn.ModuleList(nn.Linear(24, 24, dtype=torch.bfloat16) for _ in range(2))
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(3))
        self.head = nn.Sequential(
            nn.Linear(24, 24, dtype=torch.float64), nn.Linear(24, 4, dtype=torch.float64)
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.coarse:
            x = x + torch.tanh(layer(x))
        x = x.float()
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x.double()).mean(1)


def dtypes_of(module: nn.Module) -> dict[str, torch.dtype]:
    return {name: p.dtype for name, p in module.named_parameters()}


@pytest.mark.parametrize("budget", [0.3, 1.0, 2.0, "6kB", "40kB"])
def test_layers_of_several_dtypes(budget, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MixedDtypes()
    ids = torch.arange(40).view(5, 8)
    shared = transform(model, budget, example_inputs=ids)
    plan = plan_of(shared)
    assert plan.bytes == count_trainable(shared, in_bytes=True)
    if isinstance(budget, str):
        assert 0.999 * plan.budget.bytes <= plan.bytes <= plan.budget.bytes
    else:
        assert plan.parameters == int(budget * count_trainable(model) + 1e-9)
    wanted = dtypes_of(model)
    for bank, sites in zip(banks_of(shared), shared_sites(plan), strict=True):
        assert len({p.dtype for p in bank.parameters()}) == 1
        assert {wanted[name] for name in sites} == {bank.templates.dtype}
    plain = plain_of(shared, model, is_exact=True)
    assert torch.equal(shared(ids), plain(ids))
    before = values(shared)
    optimizer = torch.optim.SGD(shared.parameters(), lr=0.5)
    take_step(shared, lambda: shared(ids).square().sum(), optimizer)
    for name, parameter in shared.named_parameters():
        assert parameter.grad.dtype == parameter.dtype
        assert bool(parameter.isfinite().all())
        assert not torch.equal(parameter, before[name]), name
    npas_fx.save(shared, tmp_path)
    assert same_tensors(npas_fx.load(tmp_path, MixedDtypes(), example_inputs=ids), shared)
    materialized = npas_fx.materialize(shared)
    assert dtypes_of(materialized) == wanted
    assert torch.equal(materialized(ids), shared(ids))


def cast(inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "budget"), [*((name, 0.4) for name in MODELS), *(("mlp", b) for b in BUDGETS[1:])]
)
def test_models_in_half_precision(name, budget, dtype, tmp_path):
    model = example(name).make().to(dtype)
    inputs = cast(example(name).inputs(3), dtype)
    shared = transform(model, lowest(name, budget), example_inputs=inputs)
    assert set(dtypes_of(shared).values()) == {dtype}
    assert plan_of(shared).bytes == 2 * plan_of(shared).parameters
    for site, weight in generated(shared, plan_of(shared)).items():
        given = model.get_parameter(site).float()
        assert weight.dtype == dtype
        assert torch.isclose(weight.float().std(), given.std(), rtol=0.02)
        assert abs(weight.float().mean() - given.mean()) < 0.05 * given.std()
    plain = plain_of(shared, model, is_exact=True)
    for a, b in zip(outputs_of(plain, inputs), outputs_of(shared, inputs), strict=True):
        assert a.dtype == b.dtype == dtype
        assert (a - b).abs().max() <= 0.03 * a.abs().max()
    before = values(shared)
    optimizer = torch.optim.SGD(shared.parameters(), lr=1.0)
    take_step(shared.train(), lambda: seeded(lambda: loss_of(shared(*inputs))), optimizer)
    assert all(bool(p.isfinite().all()) for p in shared.parameters())
    moved = [name for name, p in shared.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) >= 0.8 * len(before)  # the rest moves by less than its last bit
    npas_fx.save(shared, tmp_path)
    loaded = npas_fx.load(tmp_path, example(name).make().to(dtype), example_inputs=inputs)
    assert same_tensors(loaded, shared)
    assert dtypes_of(npas_fx.materialize(shared)) == dtypes_of(model)


@names
@budgets
def test_models_in_float64(name, budget):
    model = example(name).make().double()
    inputs = cast(example(name).inputs(3), torch.float64)
    shared = transform(model, lowest(name, budget), example_inputs=inputs)
    assert set(dtypes_of(shared).values()) == {torch.float64}
    assert plan_of(shared).bytes == 8 * plan_of(shared).parameters
    for mode in (True, False):
        shared.train(mode)
        plain = plain_of(shared, model)
        for a, b in zip(outputs_of(shared, inputs), outputs_of(plain, inputs), strict=True):
            assert_close("output", a, b, torch.float64)
        plain = plain_of(shared, model)
        assert_same_gradients(
            shared,
            lambda: loss_of(shared(*inputs)),
            lambda plain=plain: loss_of(plain(*inputs)),
            torch.float64,
        )


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@budgets
def test_the_default_dtype_of_the_program_does_not_matter(budget, dtype, default):
    model, inputs = MODELS["mlp"].make().to(dtype), cast(MODELS["mlp"].inputs(3), dtype)
    expected = transform(model, budget, example_inputs=inputs)
    with default_dtype(default):
        found = transform(model, budget, example_inputs=inputs)
        assert same_tensors(npas_fx.materialize(found), npas_fx.materialize(expected))
    assert same_tensors(found, expected)
    assert set(dtypes_of(found).values()) == {dtype}


# The meta device


PLAN_A_LARGE_MODEL = """
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, sys.argv[1])
import npas_fx
from models import GPT


class Watch(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.largest = max(self.largest, tensor.numel())
        return made


def peak():
    # Not getrusage: its peak begins with that of the process that started this one.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


before = peak()
with Watch() as watch:
    with torch.device("meta"):
        model = GPT(vocabulary=50257, width=1600, depth=48, length=1024)
    inventory = npas_fx.inspect(model)
    plan = npas_fx.plan(model, 0.25)
    assert "stay" in str(inventory) and "stays" in str(plan)
assert inventory.num_parameters == plan.model_parameters
assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
size = sum(p.numel() for p in model.parameters())
print(size, plan.parameters, watch.largest, peak() - before)
"""


def test_a_model_larger_than_memory_is_inspected_and_planned_on_the_meta_device():
    if not Path("/proc/self/status").exists():
        pytest.skip("reads its peak memory where Linux tells it")
    support = str(Path(__file__).parent / "support")
    run = subprocess.run(
        [sys.executable, "-c", PLAN_A_LARGE_MODEL, support],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    size, parameters, largest, grown = map(int, run.stdout.split())
    assert size > 1_500_000_000
    assert parameters == size // 4
    assert largest < 1_000_000
    assert grown < 1e9  # its weights are 6 GB; names, graph and candidates take 0.3


@names
@budgets
def test_a_meta_model_is_inspected_and_planned_but_not_transformed(name, budget, tmp_path):
    shared, inputs = emitted(name, budget), example(name).inputs(2)
    with torch.device("meta"):
        model = example(name).build()
    plan = npas_fx.plan(model, lowest(name, budget), example_inputs=inputs)
    assert plan == plan_of(shared)
    inventory = npas_fx.inspect(model, example_inputs=inputs)
    assert str(inventory) == str(npas_fx.inspect(example(name).make(), example_inputs=inputs))
    assert all(p.is_meta for p in model.parameters())
    for call in (
        lambda: transform(model, 1.0),
        lambda: npas_fx.apply(model, plan, example_inputs=inputs),
    ):
        with pytest.raises(npas_fx.PlanError, match=r"meta device and has no values.*to_empty"):
            call()
    npas_fx.save(shared, tmp_path)
    loaded = npas_fx.load(tmp_path, model, example_inputs=inputs)
    assert same_tensors(loaded, shared)
    assert {t.device.type for t in (*loaded.parameters(), *loaded.buffers())} == {"cpu"}
    assert torch.equal(*(seeded(lambda m=m: loss_of(m(*inputs))) for m in (loaded, shared)))


@budgets
def test_a_meta_model_with_some_frozen_layers(budget):
    with torch.device("meta"):
        model = freeze(GPT(), "transformer.h.0")
    plan = npas_fx.plan(model, budget)
    assert plan == npas_fx.plan(freeze(MODELS["gpt"].make(), "transformer.h.0"), budget)
    assert plan.kept["transformer.h.0.c_fc.weight"] == "frozen"


@budgets
def test_the_default_device_of_the_program_does_not_matter(budget):
    model = MODELS["mlp"].make()
    expected = transform(model, budget)
    with torch.device("meta"):
        found = transform(model, budget)
    assert same_tensors(found, expected)


# One example at a time


@names
@budgets
def test_a_batch_of_one(name, budget):
    inputs = example(name).inputs(1)
    shared = transform(example(name).make(), lowest(name, budget), example_inputs=inputs)
    for mode in (True, False):
        shared.train(mode)
        plain = plain_of(shared, example(name).make())
        assert_same_gradients(
            shared, lambda: loss_of(shared(*inputs)), lambda plain=plain: loss_of(plain(*inputs))
        )
    larger = example(name).inputs(3)
    plain = plain_of(shared, example(name).make())
    assert torch.allclose(loss_of(shared(*larger)), loss_of(plain(*larger)), rtol=1e-4)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "mobilenetv3_small_100"])
def test_a_batch_of_one_picture(name):
    inputs = example(name).inputs(1)
    model = example(name).make()
    shared = transform(model, 0.5, example_inputs=inputs)
    for mode in (True, False):
        shared.train(mode)
        plain = plain_of(shared, model, is_exact=True)
        expected, found = (seeded(lambda f=f: f(*inputs)) for f in (plain, shared))
        assert_close("output", found, expected, torch.float32)
        assert found.shape == (1, 1000)


@budgets
def test_a_batch_norm_over_one_value_trains_no_better_than_plain(budget):
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 16), nn.Linear(16, 2))
    one, two = torch.randn(1, 8), torch.randn(2, 8)
    with pytest.raises(npas_fx.CaptureError, match=r"train mode.*more than 1 value"):
        transform(model, budget, example_inputs=one)
    for shared in (
        transform(model, budget, example_inputs=two),
        transform(model, budget, example_inputs=one, verify=False),
    ):
        plain = plain_of(shared.eval(), model, is_exact=True)
        assert torch.equal(shared(one), plain(one))
        with pytest.raises(ValueError, match="more than 1 value"):
            shared.train()(one)
