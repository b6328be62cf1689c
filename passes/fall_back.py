"""Fall back to the code of the user's class where a graph was not captured for a call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from npas_fx.errors import GuardError
from npas_fx.passes.guards import check_guard
from npas_fx.passes.purity import is_mutated
from npas_fx.passes.rollback import RandomState


def fall_back(
    forward: Callable[..., Any], whole: Callable[..., Any], buffers: Sequence[str]
) -> Callable[..., Any]:
    """Make a ``forward`` that runs another where a guard refuses the call.

    What the first has done until then is undone: random numbers are drawn again, and buffers are
    put back. The state that called modules keep in Python is not.

    Args:
        forward: of a graph.
        whole: computes the same for any call.
        buffers: names of those that the graph may have changed when a guard refuses.
    """

    @functools.wraps(forward)
    def either(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found = [self.get_buffer(name) for name in buffers]
        before = [buffer.clone() for buffer in found]
        random_state = None if torch.compiler.is_compiling() else _all_random_states()
        try:
            return forward(self, *args, **kwargs)
        except GuardError:
            pass  # what the user's code raises below is no consequence of this
        with torch.no_grad():
            for buffer, value in zip(found, before, strict=True):
                buffer.copy_(value)
        if random_state is not None:
            random_state()
        return whole(self, *args, **kwargs)

    return either


def _all_random_states() -> Callable[[], None]:
    state = RandomState()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def put_back() -> None:
        state.put_back()
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)

    return put_back


def changed_before_guards(graph: fx.Graph, root: nn.Module) -> set[str]:
    """Names of the buffers that a graph may change before the last of its guards.

    Args:
        graph: of ``root``.
        root: says which modules have buffers.
    """
    nodes = list(graph.nodes)
    last = max((k for k, node in enumerate(nodes) if node.target is check_guard), default=0)
    own = {name for name, _ in root.named_buffers(remove_duplicate=False)}
    found: set[str] = set()
    for node in nodes[:last]:
        if node.op == "get_attr" and node.target in own:
            found |= {node.target} if is_mutated(node) else set()
        elif node.op in ("get_attr", "call_module"):
            found |= {name for name in own if name.startswith(f"{node.target}.")}
    return found
