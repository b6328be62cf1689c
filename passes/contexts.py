"""``no_grad``, ``enable_grad`` and autocast switched off, as operations of a graph."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.amp import autocast_mode


class _Here(threading.local):
    def __init__(self) -> None:
        self.entered: list[Any] = []  # autocast contexts that a graph has not left yet


_here = _Here()


def set_grad_mode(is_enabled: bool) -> bool:
    """Switch gradients on or off; gives what they were."""
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(is_enabled)
    return before


def enter_full_precision(device_type: str) -> Any:
    """Switch autocast off; gives what ``leave_full_precision`` takes."""
    enter: Any = autocast_mode._enter_autocast
    context = enter(device_type, None, False, None)
    if not torch.compiler.is_compiling():
        _here.entered.append(context)
    return context


def leave_full_precision(context: Any) -> None:
    """Make autocast what it was before."""
    if not torch.compiler.is_compiling():
        _here.entered.remove(context)
    leave: Any = autocast_mode._exit_autocast
    leave(context)


_TRACED = "_npas_fx_device"


def init_autocast(init: Callable[..., None], known: Callable[[Any], Any]) -> Callable[..., None]:
    """Make autocast take the type of a device that is traced, as ``x.device.type``.

    Args:
        init: of autocast.
        known: gives what stands for a traced value in the example, None if that is not known.
    """

    def construct(context: Any, device_type: Any, *args: Any, **kwargs: Any) -> None:
        value = known(device_type)
        init(context, device_type if value is None else value, *args, **kwargs)
        if value is not None:
            vars(context)[_TRACED] = device_type

    return construct


SWITCHES = (set_grad_mode, enter_full_precision, leave_full_precision)


def write_enter(context: Any) -> tuple[Callable[..., Any], tuple[Any, ...]] | None:
    """The operation that enters a context manager, and its arguments; None if there is none."""
    if type(context) in (torch.no_grad, torch.enable_grad):
        return set_grad_mode, (type(context) is torch.enable_grad,)
    if isinstance(context, torch.autocast) and not context._enabled:
        return enter_full_precision, (vars(context).get(_TRACED, context.device),)
    return None


def write_leave(entered: fx.Node) -> Callable[..., Any]:
    """The operation that leaves what a node has entered; it takes that node."""
    return set_grad_mode if entered.target is set_grad_mode else leave_full_precision


def leave_on_error(forward: Callable[..., Any], graph: fx.Graph) -> Callable[..., Any]:
    """Let ``forward`` leave what it has entered also where it fails halfway."""
    if not any(node.target in SWITCHES for node in graph.nodes):
        return forward

    @functools.wraps(forward)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        before, depth = torch.is_grad_enabled(), len(_here.entered)
        try:
            return forward(*args, **kwargs)
        except BaseException:
            for context in reversed(_here.entered[depth:]):
                leave_full_precision(context)
            torch._C._set_grad_enabled(before)
            raise

    return guarded
