"""Opaque calls: a module is called as it is, with weights that the graph hands in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.utils.checkpoint
from torch import Tensor, nn


def call_opaque(
    leaf: nn.Module,
    names: Sequence[str],
    weights: Sequence[Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """Call a module with other weights than it has.

    Args:
        leaf: its hooks run, its buffers change, as in any call.
        names: of parameters in it; all names of a tied weight.
        weights: what stands for each of them during the call.
        args: of the call.
        kwargs: likewise.
    """
    with lend(leaf, names, weights):
        return leaf(*args, **kwargs)


@contextmanager
def lend(leaf: nn.Module, names: Sequence[str], weights: Sequence[Tensor]) -> Iterator[None]:
    """Put weights into the slots of a module's parameters, for as long as it is needed.

    Another thread that calls the same module waits: there is one slot for each weight.
    """
    if torch.compiler.is_compiling():
        with _fill(leaf, names, weights):
            yield
        return
    with _lock_of(leaf), without_checkpoints():
        try:
            with _fill(leaf, names, weights):
                forget_weights(leaf)
                yield
        finally:
            forget_weights(leaf)


@contextmanager
def _fill(leaf: nn.Module, names: Sequence[str], weights: Sequence[Tensor]) -> Iterator[None]:
    split = [name.rpartition(".") for name in names]
    slots = [(leaf.get_submodule(owner)._parameters, name) for owner, _, name in split]
    owned = [slot[name] for slot, name in slots]
    for (slot, name), weight in zip(slots, weights, strict=True):
        slot[name] = weight  # type: ignore[assignment]
    try:
        yield
    finally:
        for (slot, name), own in zip(slots, owned, strict=True):
            slot[name] = own


_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


@torch.compiler.disable  # type: ignore[untyped-decorator]  # no lock is entered in graphs
def _lock_of(leaf: nn.Module) -> threading.RLock:
    with _lock:
        return _locks.setdefault(leaf, threading.RLock())


def handed_in(leaf: nn.Module) -> list[str]:
    """Names of the parameters that an opaque call can hand in, each under all of its names."""
    return [
        f"{path}.{name}" if path else name
        for path, module in leaf.named_modules(remove_duplicate=False)
        if not why_plain(module)
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() > 1 and parameter.is_floating_point()
    ]


def why_plain(module: nn.Module) -> str:
    """Why the parameters of a module itself cannot be handed in; empty if they can."""
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript, whose weights cannot be replaced"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        if module.max_norm is not None:
            return "embedding with max_norm, which rewrites its weight in place"
        if module.sparse:
            return "embedding with sparse gradients"
    return ""


def empty_slots(leaf: nn.Module, names: Sequence[str]) -> None:
    """Take parameters out of a module; their names stay, without a tensor."""
    for name in names:
        owner, _, attribute = name.rpartition(".")
        leaf.get_submodule(owner)._parameters[attribute] = None
    forget_weights(leaf)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def forget_weights(leaf: nn.Module) -> None:
    """Make recurrent modules read their parameters anew at the next call.

    They keep them in a list besides, which would hold generated weights, and make later copies
    fail. Where a parameter is missing they do not notice that one has come.
    """
    for module in leaf.modules():
        if isinstance(module, nn.RNNBase):
            names = module._flat_weights_names
            vars(module)["_flat_weights"] = [module._parameters.get(name) for name in names]
            vars(module)["_flat_weight_refs"] = [_no_tensor] * len(names)


def _no_tensor() -> None:
    """A weak reference whose tensor is gone."""


class _Here(threading.local):
    inside = 0  # opaque calls that this thread is in


_here = _Here()
_lock = threading.Lock()
_num_inside = 0  # in all threads
_found: tuple[Any, Any] = (None, None)


@contextmanager
def without_checkpoints() -> Iterator[None]:
    """Run what ``torch.utils.checkpoint`` is given at once, and keep its results for backward.

    It would run it again in backward, when the weights are no longer in their slots, and the
    gradients would silently be those of other weights.
    """
    global _num_inside, _found
    module: Any = torch.utils.checkpoint
    with _lock:
        if not _num_inside:
            _found = module.CheckpointFunction, module._checkpoint_without_reentrant_generator
            module.CheckpointFunction = _Reentrant(_found[0])
            module._checkpoint_without_reentrant_generator = _run_once_if_inside(_found[1])
        _num_inside += 1
    _here.inside += 1
    try:
        yield
    finally:
        _here.inside -= 1
        with _lock:
            _num_inside -= 1
            if not _num_inside:
                module.CheckpointFunction = _found[0]
                module._checkpoint_without_reentrant_generator = _found[1]


class _Reentrant:
    """Stands for ``CheckpointFunction``; other threads go on using it."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def apply(self, run: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return run(*args) if _here.inside else self.function.apply(run, preserve, *args)


def _run_once_if_inside(generate: Callable[..., Iterator[None]]) -> Callable[..., Iterator[None]]:
    def once() -> Iterator[None]:
        yield

    return lambda *args, **kwargs: once() if _here.inside else generate(*args, **kwargs)
