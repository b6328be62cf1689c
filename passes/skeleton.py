"""Copies of a module tree that share, drop or replace its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from npas_fx.errors import CaptureError
from npas_fx.passes.closures import deepcopy_with_closures


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer once, under the first of its names."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's tensors; the CPU for one that is on the meta device or has none."""
    device = next((tensor.device for _, tensor in named_tensors(model)), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device


def copy_with(model: nn.Module, replace: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """Copy a module tree, with another tensor in the place of each parameter and buffer.

    No tensor is copied by this function: a model that does not fit into memory twice can still be
    copied onto the meta device. What is tied stays tied.

    Args:
        model: the tree to copy; it is not changed.
        replace: name and tensor of the model -> the tensor that the copy holds.

    Raises:
        CaptureError: the model holds something that Python cannot copy.
    """
    memo: dict[int, object] = {id(t): replace(name, t) for name, t in named_tensors(model)}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                # A result kept on the module; deepcopy refuses tensors that are part of a graph.
                memo[id(value)] = value.detach().clone()
    try:
        return deepcopy_with_closures(model, model, memo)
    except Exception as err:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({type(err).__name__}: {err}); keep locks, "
            "files, generators and other state that copy.deepcopy refuses out of the module"
        ) from err


def empty_like(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Make a parameter or buffer of the same kind, shape and dtype, with undefined values."""
    empty = torch.empty_like(tensor.detach(), device=device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


def clone(tensor: Tensor) -> Tensor:
    """Make a parameter or buffer of the same kind with the same values."""
    copied = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(copied, requires_grad=tensor.requires_grad)
    return copied


def make_skeleton(model: nn.Module) -> nn.Module:
    """Copy a module tree onto the meta device: its classes and settings, none of its values."""
    return copy_with(model, lambda _, tensor: empty_like(tensor, "meta"))
