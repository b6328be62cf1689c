"""Trace one mode: say where it fails, and refuse what a call leaves behind for the next one."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor, fx, nn

from npas_fx.errors import BusyError, UntraceableError
from npas_fx.passes.call import CallSignature
from npas_fx.passes.leaves import MODULE_FIELDS
from npas_fx.passes.probes import Probes
from npas_fx.passes.say_why import say_why
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
    before = _state(work)
    trace = _trace_once(work, call, leaves, exposed, probes)
    left = _state(work)
    if left == before:
        return trace
    # What a call leaves on its modules is harmless only where no later call reads it.
    again = _trace_once(work, call, leaves, exposed, probes)
    if again.failed.keys() != trace.failed.keys():
        raise UntraceableError({**trace.failed, **again.failed})
    now = _state(work)
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
    if str(again.graph) != str(trace.graph):
        path = _first_difference(trace.graph, again.graph)
        raise UntraceableError({path: "it reads what an earlier call left on it"})
    return trace


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
    for node, counterpart in zip(one.nodes, other.nodes, strict=False):
        if node.format_node() != counterpart.format_node():
            stack = list(node.meta.get("nn_module_stack", {}).values())
            return stack[-1][0] if stack else ""
    return ""


def _trace_once(
    work: nn.Module,
    call: CallSignature,
    leaves: frozenset[str],
    exposed: frozenset[str],
    probes: Probes | None,
) -> Trace:
    try:
        return Tracer(call, leaves, exposed, probes).trace_mode(work)
    except (BusyError, UntraceableError):
        raise
    except Exception as err:
        raise UntraceableError({"": say_why(err)}) from err


def _state(root: nn.Module) -> dict[tuple[str, str], object]:
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
