"""All that must hold for an architecture of the zoo."""

from __future__ import annotations

import copy
import tempfile
import time
import warnings
from typing import Any

import torch
from torch import nn

import npas_fx
from comparison import assert_same, emit, tensors_of
from npas_fx.passes.capture import ModeGraph, capture
from zoo_case import Case

BUDGETS = (0.3, 1.5)
EXAMPLE_SIZE, OTHER_SIZE = 2, 3


def check(case: Case) -> dict[str, Any]:
    """Put an architecture through all of it.

    Returns:
        Parameters, the shares of them in opaque calls, in train and in eval mode, and seconds.

    Raises:
        AssertionError: something does not hold.
        Exception: whatever else goes wrong.
    """
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = case.make()
    args, kwargs = case.draw(EXAMPLE_SIZE)
    others = case.draw(OTHER_SIZE)
    before = {name: tensor.clone() for name, tensor in _tensors(model).items()}
    start = time.perf_counter()
    captured = capture(model, args, kwargs)
    seconds = time.perf_counter() - start
    for name, tensor in _tensors(model).items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
    trains, runs_backward = _try(model, others)
    for budget in BUDGETS:
        shared = emit(model, budget, args, kwargs, solver="cp_sat")
        limit = npas_fx.plan_of(shared).budget.amount
        assert sum(p.numel() for p in shared.parameters() if p.requires_grad) <= limit
        _move(shared)
        modes = [mode for mode, ran in ((True, trains), (False, True)) if ran]
        with torch.set_grad_enabled(runs_backward):
            assert_same(shared, model, *others, modes=modes, by_copy=True, share=1e-3)
        if budget == BUDGETS[0]:
            _same_as_own_class(shared, model, (args, kwargs), others, modes, runs_backward)
        if trains and runs_backward:
            _step(copy.deepcopy(shared), others)
        _round_trips(shared, model, others)
    modes = captured.modes if len(captured.modes) == 2 else captured.modes * 2
    train, evaluate = (_opaque_share(mode, model) for mode in modes)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "generated": round(captured.inventory.coverage, 4),
        "opaque_train": round(train, 4),
        "opaque_eval": round(evaluate, 4),
        "graphs": len(captured.modes),
        "capture_seconds": round(seconds, 2),
    }


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _try(model: nn.Module, inputs: tuple[Any, Any]) -> tuple[bool, bool]:
    """Whether the model itself runs in train mode, and whether gradients go through it."""
    results = []
    for mode in (True, False):
        original = copy.deepcopy(model).train(mode)
        args, kwargs = copy.deepcopy(inputs)
        try:
            _loss(original(*args, **kwargs)).backward()
            results.append((True, True))
        except Exception:
            try:
                with torch.no_grad():
                    original(*args, **kwargs)
                results.append((True, False))
            except Exception:
                results.append((False, False))
    assert results[1][0], "the model itself does not run in eval mode"
    return results[0][0], all(ran for _, ran in results)


def _loss(output: Any) -> torch.Tensor:
    leaves = torch.utils._pytree.tree_leaves(tensors_of(output))
    return sum(leaf.float().square().mean() for leaf in leaves if leaf.requires_grad)


def _move(module: nn.Module) -> None:
    """Away from birth: there, zeros hide what stands behind them."""
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in module.parameters():
            if tensor.is_floating_point() and tensor.numel():
                std = tensor.std(correction=0).item() if tensor.dim() > 1 else 0.0
                drawn = torch.randn(tensor.shape, generator=noise)
                tensor += (0.05 * (std or 1.0) * drawn).to(tensor.dtype)


def _step(shared: nn.Module, inputs: tuple[Any, Any]) -> None:
    """One step of training moves the banks, and leaves everything finite."""
    args, kwargs = copy.deepcopy(inputs)
    before = {name: p.detach().clone() for name, p in shared.named_parameters()}
    optimizer = torch.optim.AdamW(npas_fx.param_groups(shared, lr=1e-3, weight_decay=0.01))
    loss = _loss(shared.train()(*args, **kwargs))
    loss.backward()
    if not loss.isfinite():
        return  # nor is it of the model, whose outputs were compared
    optimizer.step()
    moved = [n for n, p in shared.named_parameters() if not torch.equal(p, before[n])]
    assert moved
    assert all(p.isfinite().all() for p in shared.parameters())


def _same_as_own_class(
    shared: nn.Module,
    model: nn.Module,
    example: tuple[Any, Any],
    inputs: tuple[Any, Any],
    modes: list[bool],
    runs_backward: bool,
) -> None:
    """The user's own class over the same banks is the same."""
    plan = npas_fx.plan_of(shared)
    given = {"example_inputs": example[0], "example_kwargs": example[1], "verify": False}
    own = npas_fx.apply(model, plan, emit="module", **given)
    assert isinstance(own, type(model))
    assert own.state_dict().keys() == shared.state_dict().keys()
    own.load_state_dict(shared.state_dict())
    with torch.set_grad_enabled(runs_backward):
        assert_same(own, model, *inputs, modes=modes, by_copy=True, share=1e-3)


def _round_trips(shared: nn.Module, model: nn.Module, inputs: tuple[Any, Any]) -> None:
    """Saved and loaded it is the same; materialized it is the model's own class, and the same."""
    plain = npas_fx.materialize(shared)
    assert type(plain) is type(model)
    with tempfile.TemporaryDirectory() as folder:
        npas_fx.save(shared, folder)
        loaded = npas_fx.load(folder, model)
    assert loaded.state_dict().keys() == shared.state_dict().keys()
    with torch.no_grad():
        outputs = []
        for module in (shared, loaded, plain):
            args, kwargs = copy.deepcopy(inputs)
            torch.manual_seed(4)
            outputs.append(tensors_of(copy.deepcopy(module).eval()(*args, **kwargs)))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(outputs[2], outputs[0], rtol=1e-4, atol=1e-5, equal_nan=True)


def _opaque_share(mode: ModeGraph, model: nn.Module) -> float:
    """The share of the parameters that are in calls of modules without a functional form."""
    modules = [model.get_submodule(path) for path in mode.leaves]
    opaque = {
        id(p): p.numel()
        for module in modules
        if any(p.dim() > 1 for p in module.parameters())
        and not (type(module).__module__.startswith("torch.nn.") and not list(module.children()))
        for p in module.parameters()
    }
    return sum(opaque.values()) / max(sum(p.numel() for p in model.parameters()), 1)
