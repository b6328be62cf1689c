"""What modules keep in their attributes from one call to the next."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from npas_fx.passes.leaves import MODULE_FIELDS


def read_state(root: nn.Module) -> dict[tuple[str, str], object]:
    """What the modules keep in their attributes, in a form that can be compared later."""
    return {
        (path, name): _summary(value)
        for path, module in root.named_modules()
        for name, value in vars(module).items()
        if name not in MODULE_FIELDS
    }


def _summary(value: object, depth: int = 0) -> object:
    if isinstance(value, (bool, int, float, complex, str, bytes, type(None))):
        return repr(value)  # NaN differs from itself
    if isinstance(value, Tensor):
        return id(value), None if value.is_inference() else value._version
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return repr(value.get_state())
    if isinstance(value, (Mapping, list, tuple, set, frozenset, deque)) and depth < 5:
        items = value.items() if isinstance(value, Mapping) else value
        return type(value), [_summary(item, depth + 1) for item in items]
    return type(value)
