"""Capture: a model as a graph in which every weight is a node, and the inventory of its weights."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, fx, nn

from npas_fx.errors import UntraceableError
from npas_fx.ir import Inventory
from npas_fx.passes.call import CallSignature, flatten_example, read_call
from npas_fx.passes.inventory import take_inventory
from npas_fx.passes.lower import hand_in, lower
from npas_fx.passes.modes import differing_modules, merge_modes
from npas_fx.passes.probes import Probes
from npas_fx.passes.refuse_models import refuse_models
from npas_fx.passes.skeleton import make_skeleton, named_tensors
from npas_fx.passes.trace_mode import trace_mode


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """A captured model.

    Attributes:
        graph: every weight that could be generated is read by a ``get_attr`` node.
        inventory: its sites, and all that stays with the reason.
        call: the arguments that the graph was captured for.
        leaves: path of each module that the graph calls -> why it is called, not traced; with the
            root (``""``) among them, the model's own ``forward`` runs and the graph is empty.
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
                site.name: f"{list(site.shape)} {site.kind}, held row {site.held_row}"
                for site in self.inventory.sites
            },
            "kept": {
                kept.name: f"{list(kept.shape)} {kept.reason}" for kept in self.inventory.kept
            },
            "leaves": {
                path: type(self.skeleton.get_submodule(path)).__name__
                for path in sorted(self.leaves)
            },
        }


def capture(
    model: nn.Module, example_inputs: Any = None, example_kwargs: Mapping[str, Any] | None = None
) -> Capture:
    """Turn a model into a graph and an inventory; the model is not run and not changed.

    Train mode and eval mode are both traced. Where they differ in constants only, the graph reads
    the flag of the owning module; where they differ in structure, or cannot be traced, the smallest
    such module stays a call, and is handed its weights; in the extreme the whole model does.

    Args:
        model: any module; it may be on the meta device.
        example_inputs: positional arguments that say which arguments of ``forward`` are given.
        example_kwargs: the same for keyword arguments.

    Raises:
        CaptureError: the model is none that could be captured: a wrapper, uninitialised, or alike.
    """
    refuse_models(model)
    skeleton = make_skeleton(model)
    call = read_call(model, example_inputs, example_kwargs)
    probes = make_probes(model, call, example_inputs, example_kwargs)
    reasons: dict[str, str] = {}
    while "" not in reasons:
        try:
            return _capture_with(model, skeleton, call, reasons, probes)
        except UntraceableError as err:
            for path, reason in err.reasons.items():
                while path in reasons:  # it is a call already: then what is around it has to be
                    path = path.rpartition(".")[0]
                reasons[path] = reason
    return _keep_whole(skeleton, model, call, reasons[""])


def _capture_with(
    model: nn.Module,
    skeleton: nn.Module,
    call: CallSignature,
    reasons: Mapping[str, str],
    probes: Probes | None,
) -> Capture:
    """Capture a model, parts of which stay calls.

    Raises:
        UntraceableError: further parts have to.
    """
    work = make_skeleton(skeleton)  # a fresh copy: tracing may leave traced values on the modules
    exposed = _expose_tensors(work)
    trace = partial(
        trace_mode, work, call=call, leaves=frozenset(reasons), exposed=exposed, probes=probes
    )
    work.train(True)
    train = trace()
    work.train(False)
    evaluate = trace()
    failed = {**train.failed, **evaluate.failed}
    if train.failed.keys() != evaluate.failed.keys():
        raise UntraceableError(failed)
    differing = differing_modules(train, evaluate)
    if differing:
        why = "code that differs between train and eval mode"
        raise UntraceableError({**failed, **dict.fromkeys(differing, why)})

    def trace_with(flags: Mapping[str, bool]) -> fx.Graph:
        work.train(True)
        for path, flag in flags.items():
            work.get_submodule(path).training = flag
        mixed = trace()
        if mixed.failed.keys() != failed.keys():
            raise UntraceableError({**failed, **mixed.failed})
        return mixed.graph

    merged = merge_modes(train, evaluate, trace_with)
    assumed = dict.fromkeys(train.assumed_tensors | evaluate.assumed_tensors, Tensor)
    call = replace(call, types={**call.types, **assumed})
    graph, leaves = lower(merged, skeleton)
    whys = {**reasons, **failed}
    leaves.update({path: whys[path] for path in leaves.keys() & whys.keys()})
    return Capture(
        graph=graph,
        inventory=take_inventory(graph, leaves, skeleton, model),
        call=call,
        leaves=leaves,
        constants=_find_constants(graph, work, skeleton),
        skeleton=skeleton,
    )


def make_probes(
    model: nn.Module, call: CallSignature, example_inputs: Any, example_kwargs: Any
) -> Probes | None:
    """Make probes of an example; None without one."""
    if example_inputs is None and example_kwargs is None:
        return None
    return Probes(model, flatten_example(call, example_inputs, example_kwargs))


def _keep_whole(skeleton: nn.Module, model: nn.Module, call: CallSignature, reason: str) -> Capture:
    """Capture a model whose own ``forward`` is called, with weights that are handed in."""
    graph, leaves = fx.Graph(), {"": reason}
    inputs = [graph.placeholder(name) for name in call.names]
    name_of = {id(parameter): name for name, parameter in skeleton.named_parameters()}
    graph.output(
        hand_in(graph, skeleton, lambda p: graph.get_attr(name_of[id(p)]), None, inputs, {})
    )
    inventory = take_inventory(graph, leaves, skeleton, model)
    return Capture(
        graph=graph, inventory=inventory, call=call, leaves=leaves, constants={}, skeleton=skeleton
    )


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
