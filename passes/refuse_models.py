"""Models that are refused before they are traced."""

from __future__ import annotations

import operator
from types import MethodType

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from npas_fx.errors import CaptureError
from npas_fx.passes.op_rules.rule import own_hooks
from npas_fx.passes.skeleton import clone, copy_with, named_tensors

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


def refuse_models(model: object) -> None:
    """Refuse what is no plain module, or what a graph of it would get wrong.

    Raises:
        TypeError: no module at all.
        CaptureError: the reason, and what to do.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is a {type(model).__name__}, not a torch.nn.Module")
    kind = type(model).__name__
    if kind in _WRAPPERS:
        raise CaptureError(f"the model is wrapped in {kind}; pass model.module and wrap the result")
    if kind == "OptimizedModule":
        raise CaptureError("the model is compiled; pass the plain model and compile the result")
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            "the model is TorchScript, whose weights cannot be replaced; build it without torch.jit"
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise CaptureError(
                f"{name} is uninitialised (a lazy module); run the model once on an example first"
            )
    _refuse_hidden_modules(model)
    _refuse_closures(model)
    _refuse_shared_memory(model)
    hook = own_hooks(model)
    if hook:
        raise CaptureError(
            f"the model itself has a {hook}, which a graph cannot keep; remove it and register it "
            "on the emitted module instead"
        )


def refuse_changes_by_train(model: nn.Module) -> None:
    """Refuse, for a graph, a model whose own ``train`` changes tensors, to merge weights say.

    Raises:
        CaptureError: which tensor, and what to do.
    """
    has_own = any(type(module).train is not nn.Module.train for module in model.modules())
    if not has_own or any(tensor.is_meta for _, tensor in named_tensors(model)):
        return
    copied = copy_with(model, lambda _, tensor: clone(tensor))
    for is_training in (model.training, not model.training, model.training):
        copied.train(is_training)
        now = dict(named_tensors(copied))
        for name, tensor in named_tensors(model):
            if not torch.equal(now[name].nan_to_num(), tensor.nan_to_num()):
                raise CaptureError(
                    f"train({is_training}) changes the values of {name}, which a graph does not "
                    'record; use emit="module", or a model that changes them elsewhere'
                )


def _refuse_hidden_modules(model: nn.Module) -> None:
    for path, module in model.named_modules():
        kind = type(module)
        for name, child in module.named_children():
            if hasattr(kind, name) and getattr(module, name, None) is not child:
                raise CaptureError(
                    f"{'.'.join(filter(None, (path, name)))!r} cannot be reached, since its name "
                    f"gives {kind.__name__}.{name}; give the module another name"
                )


def _refuse_closures(model: nn.Module) -> None:
    modules = set(model.modules())
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(
                f"{path!r} is TorchScript, whose weights cannot be replaced; build it without "
                "torch.jit"
            )
        own = vars(module).get("forward")
        if own is not None and not (isinstance(own, MethodType) and own.__self__ in modules):
            raise CaptureError(
                f"{path or type(model).__name__!r} has a forward of its own, which a copy of the "
                "module cannot follow; write it as a subclass, or as types.MethodType(f, module)"
            )


def _refuse_shared_memory(model: nn.Module) -> None:
    first: dict[int, str] = {}
    for name, tensor in named_tensors(model):
        if tensor.is_meta or not tensor.numel() or tensor.layout != torch.strided:
            continue
        other = first.setdefault(tensor.data_ptr(), name)
        if other != name and isinstance(operator.attrgetter(other)(model), nn.Parameter):
            raise CaptureError(
                f"{name} and {other} are two tensors over the same memory; tie them by assigning "
                "one Parameter to both, or give each its own"
            )
