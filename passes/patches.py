"""What Python and torch are patched with while tracing, so that they hide nothing from it."""

from __future__ import annotations

import builtins
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from npas_fx.errors import BusyError
from npas_fx.passes.contexts import init_autocast
from npas_fx.passes.functions import ApplyFunction, reads_code_around
from npas_fx.passes.proxy import CapturedProxy, proxies_in

if TYPE_CHECKING:
    from npas_fx.passes.tracer import Tracer

# Called without a traced value, these would run while tracing and leave a constant behind: a random
# draw that is the same at every call, a buffer that in-place operations change for good.
FACTORIES = (
    *("arange", "as_tensor", "bartlett_window", "blackman_window", "empty", "eye", "from_numpy"),
    *("full", "hamming_window", "hann_window", "linspace", "logspace", "normal", "ones", "rand"),
    *("randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices"),
    *("asarray", "kaiser_window", "zeros"),
)
_CONTEXTS = (
    *(torch.no_grad, torch.enable_grad, torch.set_grad_enabled, torch.inference_mode),
    torch.autocast,
)

# What these say is up to the caller, unless the model's own code has switched it.
MODES = {
    "is_grad_enabled": _CONTEXTS[:4],
    "is_inference_mode_enabled": (torch.inference_mode,),
    "is_autocast_enabled": (torch.autocast,),
    "is_autocast_cpu_enabled": (torch.autocast,),
}

_LOCK = threading.Lock()
_plain_isinstance = builtins.isinstance
_plain_len = builtins.len
_plain_vars = builtins.vars
_plain_size = torch.Size
_plain_setattr: Callable[[nn.Module, str, Any], None] = nn.Module.__setattr__


@contextmanager
def patches(tracer: Tracer) -> Iterator[None]:
    """Patch Python and torch for this trace only, and undo it in any case."""
    if not _LOCK.acquire(blocking=False):
        raise BusyError("another capture is running in this process; wait until it is done")
    try:
        with ExitStack() as stack:
            for owner, name, value in _replacements(tracer):
                is_new = not hasattr(owner, name)
                stack.enter_context(mock.patch.object(owner, name, value, create=is_new))
            stack.callback(torch.set_grad_enabled, torch.is_grad_enabled())
            yield
    finally:
        _LOCK.release()


def _replacements(tracer: Tracer) -> Iterator[tuple[Any, str, Any]]:
    for name in FACTORIES:
        yield torch, name, _recorded(tracer, getattr(torch, name))
    for name in ("finfo", "iinfo", "broadcast_shapes"):
        yield torch, name, _recorded_if_traced(tracer, getattr(torch, name))
    for name, contexts in MODES.items():
        yield torch, name, _asked_by_user(tracer, name, contexts)
    yield torch, "Size", _Size
    yield builtins, "isinstance", _isinstance
    yield builtins, "len", _len
    yield builtins, "vars", _vars
    yield torch, "is_tensor", _is_tensor
    if "torch._dynamo" in sys.modules:  # not imported for this: it takes long
        yield torch._dynamo, "mark_static_address", lambda *args, **kwargs: None
    yield parametrize, "_cache", {}
    yield nn.Module, "parameters", _parameters_of(tracer)
    yield nn.Module, "__setattr__", _set_attribute_of(tracer)
    yield nn.Module, "training", _training_of(tracer)
    yield torch.autograd.Function, "apply", _record_function(tracer)
    yield torch.autocast, "__init__", init_autocast(torch.autocast.__init__, _known_of)
    for context in _CONTEXTS:
        yield context, "__enter__", _then(context.__enter__, tracer.note_entered)
        yield context, "__exit__", _then(context.__exit__, tracer.note_left)


def _recorded(tracer: Tracer, factory: Callable[..., Any]) -> Callable[..., Any]:
    def record(*args: Any, **kwargs: Any) -> Any:
        if not tracer.is_tracing():  # in a data loader's thread, say
            return factory(*args, **kwargs)
        return tracer.create_proxy("call_function", factory, args, kwargs)

    return record


def _recorded_if_traced(tracer: Tracer, kind: Callable[..., Any]) -> Callable[..., Any]:
    def record(*args: Any) -> Any:
        if any(_plain_isinstance(arg, CapturedProxy) for arg in args):
            return tracer.create_proxy("call_function", kind, args, {})
        return kind(*args)

    return record


def _asked_by_user(tracer: Tracer, name: str, contexts: tuple[type, ...]) -> Callable[..., Any]:
    ask = getattr(torch, name)

    def answer(*args: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "").split(".")[0]
        if caller not in ("torch", "npas_fx") and tracer.is_tracing():
            tracer.refuse_question_of_mode(name, contexts)
        return ask(*args)

    return answer


def _isinstance(value: Any, kind: Any) -> bool:
    # A proxy is no Tensor, so user code would take the wrong branch without a word.
    if _plain_isinstance(value, CapturedProxy):
        caller = sys._getframe(1).f_globals.get("__name__", "")
        is_own = caller.split(".")[0] in ("torch", "npas_fx")
        if not is_own or caller.startswith("torch.distributions."):  # which is written as a user's
            return _stands_for(value, kind)
    return _plain_isinstance(value, kind)


def _stands_for(value: CapturedProxy, kind: Any) -> bool:
    """Whether the value that a traced one stands for is of a type.

    Code that asks whether it is traced learns so, and does not ask for data that are not known;
    where they are known it goes the way that it goes when it is called.
    """
    if _plain_isinstance(value, kind) and not value.tracer.questions.is_fixed(value.node):
        return True
    return value.is_instance(kind)


class _SizeType(type):
    """Stands for the type ``torch.Size``, which takes no traced numbers and has no subclasses."""

    def __call__(cls, *args: Any) -> Any:
        for proxy in proxies_in(args)[:1]:
            return proxy.tracer.create_proxy("call_function", _plain_size, args, {})
        return _plain_size(*args)

    def __instancecheck__(cls, instance: Any) -> bool:
        return _plain_isinstance(instance, _plain_size)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, _plain_size)


class _Size(metaclass=_SizeType):
    pass


def _len(value: Any) -> Any:
    return value.length() if _plain_isinstance(value, CapturedProxy) else _plain_len(value)


def _vars(*args: Any) -> Any:
    if not args:  # of the code that asks
        return sys._getframe(1).f_locals
    caller = sys._getframe(1).f_globals.get("__name__", "").split(".")[0]
    if _plain_isinstance(args[0], CapturedProxy) and caller not in ("torch", "npas_fx"):
        raise args[0].tracer.refusal(
            "forward asks for vars() of a traced value, which are not known while tracing"
        )
    return _plain_vars(*args)


def _known_of(value: Any) -> Any:
    if not _plain_isinstance(value, CapturedProxy):
        return value
    values = value.tracer.questions.values_of(value.node)
    return values[0] if values and _plain_isinstance(values[0], (str, torch.dtype)) else value


def _is_tensor(value: Any) -> bool:
    if _plain_isinstance(value, CapturedProxy):
        return bool(value.is_instance(Tensor))
    return _plain_isinstance(value, Tensor)


def _record_function(tracer: Tracer) -> Any:
    apply = vars(torch.autograd.Function)["apply"]

    def record(cls: type, *args: Any, **kwargs: Any) -> Any:
        if not tracer.is_tracing():
            return apply.__get__(None, cls)(*args, **kwargs)
        if reads_code_around(cls):
            raise tracer.refusal(
                f"it calls the torch.autograd.Function {cls.__name__}, which reads variables of "
                "the code around it; pass them as arguments"
            )
        return tracer.create_proxy("call_function", ApplyFunction(cls), args, kwargs)

    return classmethod(record)


def _parameters_of(tracer: Tracer) -> Callable[..., Any]:
    # Else `next(self.parameters()).device` would be the device of a copy without values.
    def parameters(module: nn.Module, recurse: bool = True) -> Iterator[Any]:
        for _, parameter in module.named_parameters(recurse=recurse):
            name = tracer.names.get(id(parameter)) if tracer.is_tracing() else None
            yield parameter if name is None else tracer.read(name, parameter)

    return parameters


def _then(method: Callable[..., Any], note: Callable[[Any], None]) -> Callable[..., Any]:
    def run(context: Any, *args: Any) -> Any:
        result = method(context, *args)
        note(context)
        return result

    return run


def _set_attribute_of(tracer: Tracer) -> Callable[[nn.Module, str, Any], None]:
    def set_attribute(module: nn.Module, name: str, value: Any) -> None:
        tracer.note_assigned(module, name)
        if not (tracer.is_tracing() and tracer.slots.assign(module, name, value)):
            _plain_setattr(module, name, value)

    return set_attribute


def _training_of(tracer: Tracer) -> property:
    def read(module: nn.Module) -> bool:
        tracer.note_asked(module)
        flag: bool = vars(module)["training"]
        return flag

    def write(module: nn.Module, mode: bool) -> None:
        vars(module)["training"] = mode

    return property(read, write)
