"""Trace one mode: say where it fails, and refuse what a call leaves behind for the next one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import fx, nn

from npas_fx.errors import UntraceableError
from npas_fx.passes.call import CallSignature
from npas_fx.passes.guards import check_guard
from npas_fx.passes.leaves import MODULE_FIELDS
from npas_fx.passes.probes import Probes
from npas_fx.passes.proxy import CapturedProxy
from npas_fx.passes.purity import is_pure
from npas_fx.passes.python_state import read_state
from npas_fx.passes.rollback import note_state
from npas_fx.passes.tracer import Trace, Tracer

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
    if probes is not None:
        probes.flags = {path: module.training for path, module in work.named_modules()}
    put_back = note_state(work, ())
    try:
        return _trace_twice(work, lambda: Tracer(call, leaves, exposed, probes).trace_mode(work))
    finally:
        constants = {k: v for k, v in vars(work).items() if k.startswith(_CONSTANT)}
        put_back()
        vars(work).update(constants)


def _trace_twice(work: nn.Module, trace_once: Callable[[], Trace]) -> Trace:
    """Trace, and where a call leaves something behind see that it makes no difference."""
    owned = {id(module): _copy_attributes(module) for module in work.modules()}
    before = _read(work)
    trace = trace_once()
    if "" in trace.failed:
        return trace
    for module in work.modules():
        _forget_pure(module, owned[id(module)])
    left = _read(work)
    if left == before:
        return trace
    # What a call leaves on its modules is harmless only where no later call reads it.
    again = trace_once()
    if again.failed.keys() != trace.failed.keys():
        raise UntraceableError({**trace.failed, **again.failed})
    now = _read(work)
    changed = [key for key in left.keys() | now.keys() if left.get(key) != now.get(key)]
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
    return trace


def _read(work: nn.Module) -> dict[tuple[str, str], object]:
    """What the modules keep in their attributes, and which names of buffers there are."""
    names = [(path, name) for path, part in work.named_modules() for name in part._buffers]
    return {**dict.fromkeys(names), **read_state(work)}


def _copy_attributes(module: nn.Module) -> dict[str, Any]:
    return {k: dict(v) if type(v) is dict else v for k, v in vars(module).items()}


def _forget_pure(module: nn.Module, owned: Mapping[str, Any]) -> None:
    """Take what the trace has left on a module, if it is made of weights alone, away again.

    Such a cache only saves work: a call that finds it empty makes the same again.
    """
    for name, value in list(vars(module).items()):
        if isinstance(value, CapturedProxy) and is_pure(value.node):
            vars(module).pop(name)
            vars(module).update({name: owned[name]} if name in owned else {})
        if type(value) is dict and name not in MODULE_FIELDS and type(owned.get(name)) is dict:
            for key, item in list(value.items()):
                if isinstance(item, CapturedProxy) and is_pure(item.node):
                    value.pop(key)
                    value.update({key: owned[name][key]} if key in owned[name] else {})


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
        args = node.args[:3] if node.target is check_guard else node.args  # no words for people
        arguments = fx.node.map_arg((args, node.kwargs), place.__getitem__)
        return f"{node.op} {getattr(node.target, '__module__', '')} {name} {arguments}"

    return list(map(line, graph.nodes))
