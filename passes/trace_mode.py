"""Trace one mode: say where it fails, and refuse what a call leaves behind for the next one."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from traceback import walk_tb

import numpy as np
import torch
from torch import Tensor, nn

from npas_fx.errors import CaptureError
from npas_fx.passes.call import CallSignature
from npas_fx.passes.leaves import MODULE_FIELDS
from npas_fx.passes.tracer import Trace, Tracer

_CONSTANT = "_tensor_constant"  # the name that torch.fx gives to tensors that it finds


def trace_mode(
    work: nn.Module, mode: str, call: CallSignature, leaves: frozenset[str], exposed: frozenset[str]
) -> Trace:
    """Trace a model in the mode that it is in, so that the trace holds for each call.

    Args:
        work: a copy that may be left with traced values in its attributes.
        mode: its name, for the user.
        call: how the model is called.
        leaves: paths of modules that stay calls.
        exposed: names of buffers that are plain attributes in the model.

    Raises:
        CaptureError: the path of the module that cannot be traced, the reason and the line; or
            what a call leaves behind for the next one.
    """
    before = _state(work)
    trace = _trace_once(work, mode, call, leaves, exposed)
    left = _state(work)
    if left == before:
        return trace
    # What a call leaves on its modules is harmless only where no later call reads it.
    again = _trace_once(work, mode, call, leaves, exposed)
    now = _state(work)
    changed = [key for key in left.keys() | now.keys() if left.get(key) != now.get(key)]
    path, name = min((key for key in changed if not key[1].startswith(_CONSTANT)), default=("", ""))
    if name:
        raise CaptureError(
            f"{path or type(work).__name__!r} changes its own attribute {name!r} at each call, "
            "which a graph would not; keep it in a buffer, or outside forward"
        )
    if changed:
        raise CaptureError(
            f"{type(work).__name__} makes a tensor while it runs that a graph would make only once "
            "(from a parameter or tensor in a list or global, or by torch.FloatTensor or alike); "
            "keep it in a buffer, or make it with torch.tensor"
        )
    if str(again.graph) != str(trace.graph):
        raise CaptureError(
            f"{type(work).__name__} reads what an earlier call left on it, which a graph would "
            "not; keep it in a buffer, or pass it as an argument"
        )
    return trace


def _trace_once(
    work: nn.Module, mode: str, call: CallSignature, leaves: frozenset[str], exposed: frozenset[str]
) -> Trace:
    tracer = Tracer(call, leaves, exposed)
    try:
        return tracer.trace_mode(work)
    except Exception as err:
        path = next((path for path, _ in reversed(tracer.module_stack.values())), "")
        module = work.get_submodule(path)
        where = f"{path!r} ({type(module).__name__})" if path else type(module).__name__
        line = _source_line(err)
        raise CaptureError(
            f"{where} cannot be traced in {mode}: "
            f"{str(err) or type(err).__name__}{f' [{line}]' if line else ''}"
        ) from err


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


def _source_line(err: BaseException) -> str:
    """Name the last line outside torch and npas_fx that an error passed through."""
    found = ""
    for frame, line in walk_tb(err.__traceback__):
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] not in ("torch", "npas_fx", "contextlib", "unittest"):
            found = f"{frame.f_code.co_filename}:{line}"
    return found
