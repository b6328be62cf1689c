"""Fall back to the code of the user's class where a graph was not captured for a call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from npas_fx.errors import GuardError
from npas_fx.passes.flag_patterns import is_inside
from npas_fx.passes.guards import check_guard
from npas_fx.passes.purity import is_mutated
from npas_fx.passes.rebinding import buffer_slots, caches_bound_by, names_set_by_calls, rebind
from npas_fx.passes.rollback import RandomState


def fall_back(
    forward: Callable[..., Any],
    whole: Callable[..., Any],
    buffers: Sequence[str],
    shapes: Mapping[str, torch.Size | None],
) -> Callable[..., Any]:
    """Make a ``forward`` that runs another where a guard refuses the call.

    What the first has done until then is undone: random numbers are drawn again, and buffers are
    put back, also those that were bound to other tensors. The state that called modules keep in
    Python is not.

    Args:
        forward: of a graph.
        whole: computes the same for any call.
        buffers: names of those that the graph may have changed when a guard refuses.
        shapes: name -> shape of the buffers that the graph relies on, and the other may bind anew.
    """

    @functools.wraps(forward)
    def either(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if any(_shape(_slot(self, name)) != shape for name, shape in shapes.items()):
            return whole(self, *args, **kwargs)
        slots = [_slot(self, name) for name in buffers]
        found = [owned[name] for owned, name in slots]
        before = [None if buffer is None else buffer.clone() for buffer in found]
        random_state = None if torch.compiler.is_compiling() else _all_random_states()
        try:
            return forward(self, *args, **kwargs)
        except GuardError:
            pass  # what the user's code raises below is no consequence of this
        with torch.no_grad():
            for (owned, name), buffer, value in zip(slots, found, before, strict=True):
                owned[name] = buffer
                # One that is expanded cannot be written to, and was not.
                if buffer is not None and value is not None and not torch.equal(buffer, value):
                    buffer.copy_(value)
        if random_state is not None:
            random_state()
        return whole(self, *args, **kwargs)

    return either


_Slot: TypeAlias = tuple[dict[str, "Tensor | None"], str]


def _slot(module: nn.Module, name: str) -> _Slot:
    path, _, attribute = name.rpartition(".")
    return module.get_submodule(path)._buffers, attribute


def _shape(slot: _Slot) -> torch.Size | None:
    owned, name = slot
    buffer = owned.get(name)
    return None if buffer is None else buffer.shape


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
    guards = (check_guard, rebind)
    last = max((k for k, node in enumerate(nodes) if node.target in guards), default=0)
    own = buffer_slots(root).keys()
    found = set[str]()
    for node in nodes[:last]:
        if node.op == "get_attr" and node.target in own:
            found |= {node.target} if is_mutated(node) else set()
        elif node.op in ("get_attr", "call_module"):
            found |= {name for name in own if name.startswith(f"{node.target}.")}
    return found


def assumed_shapes(
    graph: fx.Graph, root: nn.Module, leaves: Collection[str]
) -> dict[str, torch.Size | None]:
    """Shape of each buffer that a graph relies on, and that the code of ``root`` may bind anew.

    What a graph itself binds anew at each call to save work is no such buffer.

    Args:
        graph: of ``root``; one that reads no buffer under a name may have found None there.
        root: the model.
        leaves: paths of the modules that the graph calls.
    """
    names, caches = names_set_by_calls(root), caches_bound_by(graph)
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    return {
        name: None if buffer is None else buffer.shape
        for name, buffer in buffer_slots(root).items()
        if name in read or (buffer is None and not any(is_inside(name, each) for each in leaves))
        if name.rpartition(".")[2] in names and name not in caches
    }
