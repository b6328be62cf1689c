"""Trace one mode: say where it fails, and refuse what a call leaves behind for the next one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import fx, nn

from npas_fx.errors import UntraceableError
from npas_fx.passes.call import CallSignature
from npas_fx.passes.guards import check_guard
from npas_fx.passes.leaves import MODULE_FIELDS
from npas_fx.passes.probes import Probes
from npas_fx.passes.proxy import CapturedProxy
from npas_fx.passes.purity import is_of_sizes, is_pure
from npas_fx.passes.python_state import read_state
from npas_fx.passes.rebinding import caches_bound_by
from npas_fx.passes.rollback import note_state
from npas_fx.passes.tracer import Trace, Tracer

_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size)
_CONSTANT = "_tensor_constant"  # the name that torch.fx gives to tensors that it finds


def trace_mode(
    work: nn.Module,
    call: CallSignature,
    leaves: frozenset[str],
    exposed: frozenset[str],
    probes: Probes | None = None,
) -> Trace:
    """Trace a model in the mode that it is in, so that the trace holds for each call.

    Args:
        work: a copy that may be left with traced values in its attributes.
        call: how the model is called.
        leaves: paths of modules that stay calls.
        exposed: names of buffers that are plain attributes in the model.
        probes: example runs that answer what the code asks; None without an example.

    Raises:
        UntraceableError: the root itself cannot be traced, or a call leaves something behind for
            the next one.
    """

    def trace_once() -> Trace:
        if probes is not None:
            probes.flags = {path: module.training for path, module in work.named_modules()}
        return Tracer(call, leaves, exposed, probes).trace_mode(work)

    def forgets_calls() -> bool:
        return probes is not None and probes.forgets_calls(call.run)

    put_back = note_state(work, ())
    try:
        trace, left = _trace_twice(work, trace_once, forgets_calls)
        if left:
            constants = _found_constants(work)
            _refuse_hand_over(work, trace_once, put_back, left)
            vars(work).update(constants)
        return trace
    finally:
        constants = _found_constants(work)
        put_back()
        vars(work).update(constants)


def _found_constants(work: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in vars(work).items() if k.startswith(_CONSTANT)}


def _trace_twice(
    work: nn.Module, trace_once: Callable[[], Trace], forgets_calls: Callable[[], bool]
) -> tuple[Trace, list[str]]:
    """Trace, and where a call leaves something behind see that it makes no difference.

    Returns:
        The trace, and the paths of the modules that have something new in their attributes.
    """
    owned = {id(module): _copy_attributes(module) for module in work.modules()}
    before = _read(work)
    trace = trace_once()
    if "" in trace.failed:
        return trace, []
    for module in work.modules():
        _forget_pure(module, owned[id(module)])
    left = _read(work)
    caches = [
        (module, name, kept)
        for path, name in _changed(before, left)
        for module in [work.get_submodule(path)]
        for kept in [owned[id(module)]]
        # What a called module may set was taken out, and is no cache.
        if name in vars(module) and _is_cache(vars(module)[name], kept.get(name))
    ]
    caches = caches if caches and forgets_calls() else []
    for module, name, kept in caches:
        _put_back(module, name, kept)
    left = _read(work)
    if (bound := caches_bound_by(trace.graph)) and not forgets_calls():
        why = "it binds a buffer to another tensor, and earlier calls may make a difference"
        raise UntraceableError({name.rpartition(".")[0]: why for name in bound})
    if left == before:
        return trace, []
    # What a call leaves on its modules is harmless only where no later call reads it.
    again = trace_once()
    for module, name, kept in caches:
        _put_back(module, name, kept)
    if again.failed.keys() != trace.failed.keys():
        raise UntraceableError({**trace.failed, **again.failed})
    now = _read(work)
    changed = _changed(left, now)
    path, name = min((key for key in changed if not key[1].startswith(_CONSTANT)), default=("", ""))
    if name:
        raise UntraceableError({path: f"it changes its own attribute {name!r} at each call"})
    if changed:
        why = (
            "it makes a tensor while it runs that a graph would make only once (from a parameter "
            "or tensor in a list or global, or by torch.FloatTensor or alike)"
        )
        raise UntraceableError({_reader(again.graph, changed): why})
    if _lines(again.graph) != _lines(trace.graph):
        path = _first_difference(trace.graph, again.graph)
        raise UntraceableError({path: "it reads what an earlier call left on it"})
    new = []
    for path, name in _changed(before, left):
        module = work.get_submodule(path)
        if name not in vars(module):  # taken out, since a called module may set it
            _put_back(module, name, owned[id(module)])
        elif not name.startswith(_CONSTANT):
            new.append(path)
    return trace, new


def _refuse_hand_over(
    work: nn.Module,
    trace_once: Callable[[], Trace],
    put_back: Callable[[], object],
    left: Collection[str],
) -> None:
    """See that what calls leave behind makes no difference to the other mode either.

    Args:
        work: as the calls have left it; it may be left anyhow.
        trace_once: traces it as it is.
        put_back: makes it what it was before the calls.
        left: paths of the modules that have something new.

    Raises:
        UntraceableError: it makes one, so that these modules have to be called.
    """
    other = not work.training
    work.train(other)
    after = trace_once()
    put_back()
    work.train(other)
    fresh = trace_once()
    is_same = after.failed.keys() == fresh.failed.keys()
    if not is_same or _lines(after.graph) != _lines(fresh.graph):
        mode = "eval" if other else "train"
        why = f"a call in {mode} mode leaves something on it that matters in the other mode"
        raise UntraceableError(dict.fromkeys(left, why))


def _changed(
    before: Mapping[tuple[str, str], object], now: Mapping[tuple[str, str], object]
) -> list[tuple[str, str]]:
    """Path and name of each attribute that was set, or taken away."""
    missing = object()
    keys = before.keys() | now.keys()
    return [key for key in keys if before.get(key, missing) != now.get(key, missing)]


def _read(work: nn.Module) -> dict[tuple[str, str], object]:
    """What the modules keep in their attributes, and which names of buffers there are."""
    names = [(path, name) for path, part in work.named_modules() for name in part._buffers]
    return {**dict.fromkeys(names), **read_state(work)}


def _copy_attributes(module: nn.Module) -> dict[str, Any]:
    return {k: v.copy() if type(v) in (dict, list) else v for k, v in vars(module).items()}


def _put_back(module: nn.Module, name: str, owned: Mapping[str, Any]) -> None:
    vars(module).pop(name, None)
    vars(module).update({name: owned[name]} if name in owned else {})
    if name in owned["_buffers"]:  # a plain attribute, exposed for the trace
        module._buffers[name] = owned["_buffers"][name]


def _forget_pure(module: nn.Module, owned: Mapping[str, Any]) -> None:
    """Take what the trace has left on a module, if it is made of weights alone, away again.

    Such a cache only saves work: a call that finds it empty makes the same again.
    """
    for name, value in list(vars(module).items()):
        if isinstance(value, CapturedProxy) and is_pure(value.node):
            _put_back(module, name, owned)
        if type(value) is dict and name not in MODULE_FIELDS and type(owned.get(name)) is dict:
            for key, item in list(value.items()):
                if isinstance(item, CapturedProxy) and is_pure(item.node):
                    value.pop(key)
                    value.update({key: owned[name][key]} if key in owned[name] else {})


def _is_cache(value: Any, before: Any) -> bool:
    """Whether a value may be kept to save work: constants, and what is made of sizes alone.

    Args:
        value: after a call.
        before: what stood there before it; None if nothing did.
    """
    if value is before:
        return True
    if isinstance(value, CapturedProxy):
        return is_of_sizes(value.node)
    if type(value) is dict:
        known = before if type(before) is dict else {}
        return all(_is_cache(item, known.get(key)) for key, item in value.items())
    if type(value) in (list, tuple):
        return all(_is_cache(item, None) for item in value)
    return isinstance(value, _CONSTANTS)


def _reader(graph: fx.Graph, constants: Collection[tuple[str, str]]) -> str:
    """Find the innermost module whose code reads one of the tensors that torch.fx has found."""
    names = {name for _, name in constants}
    stacks = [
        user.meta.get("nn_module_stack", {})
        for node in graph.nodes
        if node.op == "get_attr" and node.target in names
        for user in node.users
    ]
    paths = [path for stack in stacks for path, _ in list(stack.values())[-1:]]
    return min(paths, default="")


def _first_difference(one: fx.Graph, other: fx.Graph) -> str:
    """Find the innermost module whose code adds the first node in which two graphs differ."""
    for node, line, other_line in zip(one.nodes, _lines(one), _lines(other), strict=False):
        if line != other_line:
            stack = list(node.meta.get("nn_module_stack", {}).values())
            return stack[-1][0] if stack else ""
    return ""


def _lines(graph: fx.Graph) -> list[str]:
    """What each node does, without names of nodes: these depend on what was taken back before."""
    place = {node: f"%{k}" for k, node in enumerate(graph.nodes)}

    def line(node: fx.Node) -> str:
        name = getattr(node.target, "__name__", node.target)
        is_guard = node.target is check_guard
        args = (*node.args[:3], *node.args[5:]) if is_guard else node.args  # no words for people
        arguments = fx.node.map_arg((args, node.kwargs), place.__getitem__)
        return f"{node.op} {getattr(node.target, '__module__', '')} {name} {arguments}"

    return list(map(line, graph.nodes))
