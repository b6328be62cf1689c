"""Whether it matters to a call of a model which calls came before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from npas_fx.passes.python_state import contents_of, read_contents
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
    owned = [(tensor, tensor.detach().clone()) for _, tensor in named_tensors(root)]
    for call in (*fresh, *reversed(fresh)):
        left = []
        for _ in range(2):
            try:
                if _run(root, call) != fresh[call]:
                    return False
            except Exception:
                return False
            with torch.no_grad():
                for tensor, value in owned:  # one that was replaced by another stays so
                    tensor.copy_(value)
            left.append(read_contents(root))
        if left[0] != left[1]:
            return False
    return bool(fresh)


@torch.no_grad()
def _run(root: nn.Module, call: Call) -> object:
    """What a call gives, and what it leaves in parameters and buffers."""
    random = RandomState()
    try:
        output = call(root)
    finally:
        random.put_back()
    return contents_of(output), contents_of(dict(named_tensors(root)))
