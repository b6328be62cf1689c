"""Data types: several in one model, half precision, float64, other defaults.

In a user's words: ``docs/training.md``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import npas_fx
from models import MODELS, loss_of
from npas_fx import plan_of, transform
from oracle import (
    assert_close,
    banks_of,
    count_trainable,
    generated,
    same_tensors,
    seeded,
    shared_sites,
)
from ordinary import (
    BUDGETS,
    assert_same_gradients,
    budgets,
    example,
    lowest,
    names,
    outputs_of,
    plain_of,
    take_step,
    values,
)


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
