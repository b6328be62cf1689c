"""Embeddings: padding rows, and those that torch changes by hand (max_norm, sparse).

In a user's words: ``docs/training.md``.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import npas_fx
from models import loss_of
from npas_fx import plan_of, transform
from oracle import (
    generated,
    gradients,
)
from ordinary import (
    assert_same_gradients,
    budgets,
    plain_of,
    take_step,
)

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
