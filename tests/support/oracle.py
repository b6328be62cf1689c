"""What emitted modules are compared with: written from the formulas, not from the library."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from npas_fx import Plan
from npas_fx.banks import Bank

TOLERANCES = {torch.float64: (1e-10, 1e-10), torch.float32: (1e-4, 1e-3)}


def banks_of(shared: nn.Module) -> list[Bank]:
    """The banks, in the order of the plan's shared banks."""
    return [module for module in shared.modules() if isinstance(module, Bank)]


def shared_sites(plan: Plan) -> list[tuple[str, ...]]:
    return [bank.sites for bank in plan.banks if bank.generator != "dedicated"]


def generated(shared: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Name of each shared weight -> what its bank generates for it."""
    banks, sites = banks_of(shared), shared_sites(plan)
    assert len(banks) == len(sites)
    return {
        name: weight
        for bank, names in zip(banks, sites, strict=True)
        for name, weight in zip(names, bank(), strict=True)
    }


def by_formula(bank: Bank) -> list[Tensor]:
    """``W_i = offset_i + gain_i * sum_k a_k T_k``, element by element of each tile, in float64."""
    own = {name: tensor.double() for name, tensor in bank.tensors().items()}
    templates = list(own["templates"])
    size = templates[0].numel()
    if "partial" in own:
        flat = own["partial"].flatten()
        for start in range(0, flat.numel(), size):
            row = flat[start : start + size]
            templates.append(torch.cat([row, row.new_zeros(size - row.numel())]))
    weights, row = [], 0
    for site, shape in enumerate(bank.shapes):
        numel, tiles = math.prod(shape), []
        for start in range(0, numel, size):
            mixed = 0
            for k, template in enumerate(templates):
                if k < bank.size.num_templates:
                    factor = own["coefficients"][row, k] if "coefficients" in own else 1.0
                else:
                    factor = own["partial_coefficients"][row, k - bank.size.num_templates]
                mixed = mixed + factor * template
            tiles.append((own["offset"][site] + own["gain"][site] * mixed)[: numel - start])
            row += 1
        weights.append(torch.cat(tiles).view(shape))
    parts = iter(weights)
    return [torch.cat([next(parts) for _ in range(n)], axis) for n, axis in bank.parts]


def run_original(
    original: nn.Module,
    weights: Mapping[str, Tensor],
    shared: nn.Module,
    inputs: tuple[Any, ...],
    buffers: dict[str, Tensor],
) -> Any:
    """Run the model's own code with generated weights; all else is the emitted module's own.

    Buffers are those of the call, and afterwards what it has made of them.
    """
    kept = dict(shared.named_parameters(remove_duplicate=False))
    tensors = {
        name: weights[name] if name in weights else kept[name]
        for name, _ in original.named_parameters()
    }
    model = copy.deepcopy(original)  # functional_call would undo what is bound anew
    for name, buffer in buffers.items():
        path, _, attribute = name.rpartition(".")
        model.get_submodule(path)._buffers[attribute] = buffer
    output = functional_call(model, tensors, inputs)
    buffers.update(model.named_buffers())
    return output


def seeded(call: Callable[[], Any], seed: int = 7) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return call()


def gradients(loss: Tensor, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if gradient is None else gradient
        for (name, tensor), gradient in zip(wanted.items(), found, strict=True)
    }


def assert_close(
    what: str,
    got: Tensor,
    expected: Tensor,
    dtype: torch.dtype,
    *,
    is_gradient: bool = False,
    floor: float = 0.0,
) -> None:
    """Within the tolerance of the design, as a share of the largest entry.

    Args:
        what: for the message.
        got: ours.
        expected: theirs.
        dtype: the coarsest that takes part.
        is_gradient: whether they are gradients.
        floor: take the largest entry as no smaller; a gradient of zero has rounding errors.
    """
    assert got.shape == expected.shape, what
    assert got.dtype == expected.dtype, what
    scale = max(largest(expected), floor, 1e-30)
    tolerance = TOLERANCES[dtype][is_gradient]
    difference = largest(got - expected)
    assert difference <= tolerance * scale, f"{what}: {difference} of {scale}"


def largest(tensor: Tensor) -> float:
    return tensor.detach().abs().amax().item() if tensor.numel() else 0.0


def count_trainable(module: nn.Module, *, in_bytes: bool = False) -> int:
    """By hand: every trainable tensor once, however many names it has."""
    tensors = {
        id(p): p
        for part in module.modules()
        for p in part._parameters.values()
        if p is not None and p.requires_grad
    }
    return sum(p.numel() * (p.element_size() if in_bytes else 1) for p in tensors.values())


def snapshot(module: nn.Module) -> dict[str, Any]:
    """All that somebody could see change about a module, and about global state."""
    seen: dict[str, Any] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        seen[f"{path}: training"] = part.training
        seen[f"{path}: class"] = type(part)
        seen[f"{path}: attributes"] = [
            (key, id(value) if key != "training" else value) for key, value in vars(part).items()
        ]
        for key, value in vars(part).items():
            if isinstance(value, (dict, set, list)):
                seen[f"{path}: {key}"] = repr(value) if key[0] != "_" else _ids(value)
    for kind in (module.named_parameters, module.named_buffers):
        for name, tensor in kind(remove_duplicate=False):
            gradient = None if tensor.grad is None else (id(tensor.grad), _bytes(tensor.grad))
            seen[f"{name}: tensor"] = (
                *(id(tensor), tensor.data_ptr(), tensor._version, tensor.requires_grad),
                *(tensor.dtype, _bytes(tensor), gradient),
            )
    seen["random"] = random.getstate()
    seen["numpy"] = repr(np.random.get_state())
    seen["torch"] = _bytes(torch.get_rng_state())
    seen["modes"] = (
        *(torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu")),
        torch.are_deterministic_algorithms_enabled(),
    )
    return seen


def _ids(value: Any) -> list[Any]:
    return [(k, id(v)) for k, v in value.items()] if isinstance(value, dict) else list(value)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def same_tensors(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules hold the same bits under the same names."""
    one, other = (
        {**dict(m.named_parameters(remove_duplicate=False)), **dict(m.named_buffers())}
        for m in (a, b)
    )
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )
