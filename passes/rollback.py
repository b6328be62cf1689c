"""What a call may change while it is traced, so that it can be undone when tracing fails in it."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

_CONTAINERS = (list, dict, set, deque, OrderedDict)


def note_state(module: nn.Module, arguments: Any) -> Callable[[], bool]:
    """Note what a call of ``module`` may change; the function that is returned puts it back.

    It says whether the arguments were changed.

    These are the attributes of the module and of those below it, the containers in them, and the
    containers among the arguments. What lies deeper in them is not noted.
    """
    parts = [(part, dict(vars(part))) for part in module.modules()]
    owned = (value for _, state in parts for value in state.values())
    given = _copies(_nested(arguments))
    containers = (*_copies(owned), *given)

    def put_back() -> bool:
        is_changed = any(list(value) != list(copied) for value, copied in given)
        for part, state in parts:
            vars(part).clear()
            vars(part).update(state)
        for value, copied in containers:
            value.clear()
            extend = value.extend if isinstance(value, (list, deque)) else value.update
            extend(copied)
        return is_changed

    return put_back


def _copies(values: Iterable[Any]) -> list[tuple[Any, Any]]:
    return [(value, value.copy()) for value in values if type(value) in _CONTAINERS]


def _nested(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        yield value
        for item in value:
            yield from _nested(item)
    elif isinstance(value, dict):
        yield value
        for item in value.values():
            yield from _nested(item)


class RandomState:
    """The states of all random numbers that Python code can draw, as they are now."""

    def __init__(self) -> None:
        self.states = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def is_now(self) -> bool:
        """Whether no number was drawn since."""
        of_python, of_numpy, of_torch = self.states
        now = np.random.get_state()
        return (
            random.getstate() == of_python
            and all(map(np.array_equal, now, of_numpy))
            and torch.equal(torch.get_rng_state(), of_torch)
        )

    def put_back(self) -> None:
        """Make it the state again."""
        of_python, of_numpy, of_torch = self.states
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
