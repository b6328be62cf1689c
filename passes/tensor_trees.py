"""Tensors in containers, and in objects of the user's own classes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from npas_fx.passes.objects import is_plain_object


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Copy a value with other tensors in it: in containers and in objects of the user's classes."""
    copies: dict[int, Any] = {}

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if not (isinstance(leaf, dict) or is_plain_object(leaf)):
            return leaf
        if id(leaf) not in copies:
            try:
                made = copy.copy(leaf)
            except Exception:  # of a class with rules of its own
                return leaf
            copies[id(leaf)] = made
            if isinstance(leaf, dict):  # of a class that torch does not know
                for key, item in leaf.items():
                    dict.__setitem__(made, key, of_any(item))
            if hasattr(leaf, "__dict__"):
                vars(made).update({name: of_any(item) for name, item in vars(leaf).items()})
        return copies[id(leaf)]

    def of_any(item: Any) -> Any:
        return pytree.tree_map(of_leaf, item)

    return of_any(value)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a value, as ``map_tensors`` finds them."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, value)
    return found
