"""What tests of ordinary models share: modules made once, and the plain code to compare with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import MODELS
from npas_fx import plan_of, transform
from oracle import (
    assert_close,
    banks_of,
    by_formula,
    generated,
    gradients,
    run_original,
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


def freeze(model: nn.Module, *prefixes: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        if name.startswith(prefixes):
            parameter.requires_grad_(False)
    return model
