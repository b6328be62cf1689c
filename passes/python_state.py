"""What modules keep in their attributes from one call to the next."""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from npas_fx.passes.leaves import MODULE_FIELDS
from npas_fx.passes.objects import is_plain_object


def read_state(root: nn.Module) -> dict[tuple[str, str], object]:
    """What the modules keep in their attributes, in a form that can be compared later."""
    return {key: _summary(value, _identity) for key, value in _attributes(root).items()}


def read_contents(root: nn.Module) -> dict[tuple[str, str], object]:
    """The same for a comparison with what another copy of the modules keeps."""
    return {key: contents_of(value) for key, value in _attributes(root).items()}


def contents_of(value: object) -> object:
    """What a value contains, in a form that is equal for equal contents, bit for bit."""
    return _summary(value, _content)


def _attributes(root: nn.Module) -> dict[tuple[str, str], object]:
    return {
        (path, name): value
        for path, module in root.named_modules()
        for name, value in vars(module).items()
        if name not in MODULE_FIELDS
    }


def _identity(tensor: Tensor) -> object:
    return id(tensor), None if tensor.is_inference() else tensor._version


def _content(tensor: Tensor) -> object:
    dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    data = dense.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return tuple(tensor.shape), tensor.dtype, hashlib.sha256(data).digest()


def _summary(value: object, of_tensor: Callable[[Tensor], object], depth: int = 0) -> object:
    if isinstance(value, (bool, int, float, complex, str, bytes, type(None))):
        return repr(value)  # NaN differs from itself
    if isinstance(value, Tensor):
        return of_tensor(value)
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return repr(value.get_state())
    inside: Any = None
    if isinstance(value, (Mapping, list, tuple, set, frozenset, deque)):
        inside = value.items() if isinstance(value, Mapping) else value
    elif of_tensor is _content and is_plain_object(value):
        inside = vars(value).items()
    if inside is not None and depth < 5:
        return type(value), [_summary(item, of_tensor, depth + 1) for item in inside]
    return type(value)
