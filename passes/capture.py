"""Capture: a model as a graph in which every weight is a node, and the inventory of its weights."""

from __future__ import annotations

import operator
import random
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedParameter

from npas_fx.errors import CaptureError, RewriteError
from npas_fx.ir import Inventory, Kept, Site
from npas_fx.passes.call import CallSignature, read_call
from npas_fx.passes.lower import lower
from npas_fx.passes.modes import (
    differing_modules,
    differs_in_constants,
    merge_modes,
    mode_patterns,
)
from npas_fx.passes.op_rules.rule import own_hooks
from npas_fx.passes.roles import find_kind, find_roles, is_question
from npas_fx.passes.skeleton import make_skeleton, named_tensors
from npas_fx.passes.tracer import MODULE_FIELDS, Trace, Tracer, failing_module, source_line

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """A captured model.

    Attributes:
        graph: every weight that could be generated is read by a ``get_attr`` node.
        inventory: its sites, and all that stays with the reason.
        call: the arguments that the graph was captured for.
        leaves: path of each module that the graph calls -> why it is called, not traced.
        constants: path -> a tensor that the graph reads, but is no parameter or buffer.
        skeleton: the model without its values, on the meta device.
    """

    graph: fx.Graph
    inventory: Inventory
    call: CallSignature
    leaves: Mapping[str, str]
    constants: Mapping[str, Tensor]
    skeleton: nn.Module

    def report(self) -> dict[str, Any]:
        """What was captured, as plain data; a saved module refuses a model whose report differs."""
        return {
            "call": self.call.describe(),
            "sites": {
                site.name: f"{list(site.shape)} {site.kind}" for site in self.inventory.sites
            },
            "kept": {
                kept.name: f"{list(kept.shape)} {kept.reason}" for kept in self.inventory.kept
            },
            "leaves": dict(sorted(self.leaves.items())),
        }


def capture(
    model: nn.Module, example_inputs: Any = None, example_kwargs: Mapping[str, Any] | None = None
) -> Capture:
    """Turn a model into a graph and an inventory; the model is not run and not changed.

    Train mode and eval mode are both traced. Where they differ in constants only, the graph reads
    the flag of the owning module; where they differ in structure, the smallest such module stays a
    call, with plain weights.

    Args:
        model: any module that torch.fx can trace; it may be on the meta device.
        example_inputs: positional arguments that say which arguments of ``forward`` are given.
        example_kwargs: the same for keyword arguments.

    Raises:
        CaptureError: what cannot be traced, with the path of the module, the reason and the line.
    """
    _refuse_wrapped(model)
    skeleton = make_skeleton(model)
    call = read_call(model, example_inputs, example_kwargs)
    reasons: dict[str, str] = {}
    while True:
        # A fresh copy each time: tracing may leave traced values on the modules.
        work = make_skeleton(skeleton)
        exposed = _expose_tensors(work)
        trace = partial(_trace, work, call=call, leaves=frozenset(reasons), exposed=exposed)
        work.train(True)
        train = trace("train mode")
        work.train(False)
        evaluate = trace("eval mode")
        differing = differing_modules(train, evaluate)
        if "" in differing:
            raise CaptureError(
                f"{type(model).__name__}.forward itself takes another way in train mode than in "
                "eval mode; move the part that depends on self.training into a submodule"
            )
        if not differing:
            break
        reasons.update(dict.fromkeys(differing, "its code differs between train and eval mode"))
    try:
        merged = merge_modes(train, evaluate, _trace_mixed(work, train, evaluate, trace))
    except RewriteError as err:
        raise CaptureError(f"{type(model).__name__}: {err}") from err
    assumed = dict.fromkeys(train.assumed_tensors | evaluate.assumed_tensors, Tensor)
    call = replace(call, types={**call.types, **assumed})
    graph, leaves = lower(merged, skeleton)
    leaves.update({path: reason for path, reason in reasons.items() if path in leaves})
    inventory = _take_inventory(graph, leaves, skeleton, model)
    return Capture(
        graph=graph,
        inventory=inventory,
        call=call,
        leaves=leaves,
        constants=_find_constants(graph, work, skeleton),
        skeleton=skeleton,
    )


def _trace_mixed(
    work: nn.Module, train: Trace, evaluate: Trace, trace: Callable[[str], Trace]
) -> Sequence[tuple[Mapping[str, bool], fx.Graph]]:
    """Trace with some of the modules in train mode, to see whose flag each constant depends on."""
    if not differs_in_constants(train, evaluate):
        return []
    work.train(True)
    traced = []
    for flags in mode_patterns(train.asked_training | evaluate.asked_training):
        for path, flag in flags.items():
            work.get_submodule(path).training = flag
        traced.append((flags, trace("a mixed mode").graph))
    return traced


def _expose_tensors(work: nn.Module) -> frozenset[str]:
    """Make plain tensor attributes buffers, so that what is done with them is recorded."""
    exposed = set()
    for path, module in work.named_modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor):
                del vars(module)[name]
                module.register_buffer(name, value, persistent=False)
                exposed.add(f"{path}.{name}" if path else name)
    return frozenset(exposed)


def _find_constants(graph: fx.Graph, traced: nn.Module, skeleton: nn.Module) -> dict[str, Tensor]:
    owned = {name for name, _ in named_tensors(skeleton)}
    paths = {str(node.target) for node in graph.nodes if node.op == "get_attr"} - owned
    values = {path: operator.attrgetter(path)(traced) for path in sorted(paths)}
    return {path: value.detach() for path, value in values.items() if isinstance(value, Tensor)}


def _refuse_wrapped(model: object) -> None:
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
    _refuse_closures(model)
    _refuse_shared_memory(model)
    hook = own_hooks(model)
    if hook:
        raise CaptureError(
            f"the model itself has a {hook}, which a graph cannot keep; remove it and register it "
            "on the emitted module instead"
        )


def _refuse_closures(model: nn.Module) -> None:
    modules = set(model.modules())
    for path, module in model.named_modules():
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


def _trace(
    work: nn.Module, mode: str, call: CallSignature, leaves: frozenset[str], exposed: frozenset[str]
) -> Trace:
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


_CONSTANT = "_tensor_constant"  # the name that torch.fx gives to tensors that it finds


def _trace_once(
    work: nn.Module, mode: str, call: CallSignature, leaves: frozenset[str], exposed: frozenset[str]
) -> Trace:
    tracer = Tracer(call, leaves, exposed)
    try:
        return tracer.trace_mode(work)
    except Exception as err:
        path = failing_module(tracer)
        module = work.get_submodule(path)
        where = f"{path!r} ({type(module).__name__})" if path else type(module).__name__
        line = source_line(err)
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


def _take_inventory(
    graph: fx.Graph, leaves: Mapping[str, str], skeleton: nn.Module, model: nn.Module
) -> Inventory:
    reads_of: dict[str, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "get_attr" and not all(map(is_question, node.users)):
            reads_of[str(node.target)].append(node)
    names_of: dict[int, list[str]] = defaultdict(list)
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        names_of[id(parameter)].append(name)
    called_in = {
        id(parameter): path
        for path in leaves
        for parameter in skeleton.get_submodule(path).parameters()
    }
    kept: list[Kept] = []
    candidates: list[nn.Parameter] = []
    for parameter in skeleton.parameters():
        name, *aliases = names_of[id(parameter)]
        leaf = called_in.get(id(parameter))
        reason = _why_kept(
            name, parameter, reads_of.get(name, ()), None if leaf is None else leaves[leaf]
        )
        if reason is None:
            candidates.append(parameter)
            continue
        kept.append(
            Kept(
                name=name,
                aliases=tuple(aliases),
                reason=reason,
                shape=tuple(parameter.shape),
                dtype=parameter.dtype,
                is_trainable=parameter.requires_grad,
            )
        )
    device_of = {name: parameter.device for name, parameter in model.named_parameters()}
    shape_of = {names_of[id(p)][0]: tuple(p.shape) for p in candidates}
    roles = find_roles(graph, {name: reads_of[name] for name in shape_of}, shape_of)
    sites = tuple(
        Site(
            name=name,
            aliases=tuple(aliases),
            shape=tuple(parameter.shape),
            dtype=parameter.dtype,
            device=device_of[name],
            kind=find_kind(reads_of[name]),
            role=roles[name][0],
            depth=roles[name][1],
            uses=sum(not is_question(user) for read in reads_of[name] for user in read.users),
        )
        for parameter in candidates
        for name, *aliases in [names_of[id(parameter)]]
    )
    return Inventory(sites=sites, kept=tuple(kept))


def _why_kept(
    name: str, parameter: nn.Parameter, reads: Sequence[fx.Node], leaf: str | None
) -> str | None:
    if not parameter.requires_grad:
        return "frozen"
    if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
        return f"dtype {str(parameter.dtype).removeprefix('torch.')}"
    if leaf is not None:
        return leaf
    if not reads:
        return "not used in forward"
    if parameter.dim() < 2:
        return "bias" if name.split(".")[-1] == "bias" else "vector"
    if parameter.numel() < 2:
        return "too small"
    return "changed in place" if any(map(_is_mutated, reads)) else None


def _is_mutated(node: fx.Node) -> bool:
    """Whether an operation changes a weight, or what may be a view of it, in place."""
    for user in node.users:
        if user.all_input_nodes[0] is not node or user.op == "output":
            continue
        name = user.target if isinstance(user.target, str) else user.target.__name__
        if user.target in _IN_PLACE or (name.endswith("_") and not name.endswith("__")):
            return True
        if user.target is getattr and user.args[1] in ("data", "grad"):
            return True
        may_be_view = user.op != "call_module" and len(user.all_input_nodes) == 1
        if may_be_view and _is_mutated(user):
            return True
    return False


_IN_PLACE = frozenset(
    (
        *(operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv),
        *(operator.ifloordiv, operator.imod, operator.ipow, operator.imatmul),
    )
)
