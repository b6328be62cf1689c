"""Whether it matters to a call of a model which calls came before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from npas_fx.passes.python_state import contents_of, read_contents
from npas_fx.passes.rebinding import kind_of
from npas_fx.passes.rollback import RandomState
from npas_fx.passes.skeleton import named_tensors

Call = Callable[[nn.Module], Any]


def forgets_calls(make: Callable[[], nn.Module], calls: Sequence[Call]) -> bool:
    """Whether what a model keeps in its attributes only saves it work, as a cache does.

    One copy is called in all ways, forth and back. Each time it has to give what a copy gives that
    was not called before, and leave the same in parameters and buffers, which are then put back.
    The same call once more must leave no other attributes than the first time: so a counter is
    seen also where it does not count yet.

    Args:
        make: makes a copy of the model.
        calls: the ways to call it; those that it does not take are left out.
    """
    fresh = {}
    for call in calls:
        with suppress(Exception):
            fresh[call] = _run(make(), call)
    root = make()
    owned = {name: (tensor, tensor.detach().clone()) for name, tensor in named_tensors(root)}
    for call in (*fresh, *reversed(fresh)):
        left = []
        for _ in range(2):
            try:
                if _run(root, call) != fresh[call]:
                    return False
            except Exception:
                return False
            _put_back(root, owned)
            left.append(read_contents(root))
        if left[0] != left[1]:
            return False
    return bool(fresh)


@torch.no_grad()
def _put_back(root: nn.Module, owned: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Put parameters and buffers back; a buffer of another kind may be a cache, and stays."""
    now = dict(named_tensors(root))
    for name, (tensor, value) in owned.items():
        tensor.copy_(value)
        bound = now.get(name)
        if bound is not None and bound is not tensor and kind_of(bound) == kind_of(tensor):
            path, _, attribute = name.rpartition(".")
            root.get_submodule(path)._buffers[attribute] = tensor


@torch.no_grad()
def _run(root: nn.Module, call: Call) -> object:
    """What a call gives, and what it leaves in parameters and buffers."""
    random = RandomState()
    try:
        output = call(root)
    finally:
        random.put_back()
    return contents_of(output), contents_of(dict(named_tensors(root)))
