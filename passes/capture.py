"""Capture: a model as a graph in which every weight is a node, and the inventory of its weights."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, fx, nn

from npas_fx.errors import UntraceableError
from npas_fx.ir import Inventory
from npas_fx.passes.call import CallSignature, read_call
from npas_fx.passes.call_state import may_keep_state
from npas_fx.passes.examples import read_examples, read_inputs
from npas_fx.passes.flag_patterns import is_inside
from npas_fx.passes.functions import ApplyFunction
from npas_fx.passes.held_inputs import HeldInputs, hold_inputs
from npas_fx.passes.inventory import list_opaque, take_inventory
from npas_fx.passes.lower import hand_in, lower
from npas_fx.passes.modes import merge_modes
from npas_fx.passes.probes import Changes, Probes
from npas_fx.passes.rebinding import rebound_by
from npas_fx.passes.refuse_models import refuse_models
from npas_fx.passes.skeleton import device_of, make_skeleton, named_tensors
from npas_fx.passes.trace_mode import trace_mode
from npas_fx.passes.tracer import Trace, no_trace


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeGraph:
    """The graph of a model in one mode, or in any.

    Attributes:
        graph: every weight that could be generated is read by a ``get_attr`` node.
        flags: module path -> the training flag that the graph was traced for; empty where it reads
            the flags itself.
        leaves: path of each module that the graph calls -> why it is called, not traced; with the
            root (``""``) among them, the graph is one call of the model's own ``forward``.
    """

    graph: fx.Graph
    flags: Mapping[str, bool]
    leaves: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """A captured model.

    Attributes:
        modes: one graph for both modes; or two, of train mode and of eval mode, where these differ
            in more than constants.
        trace: training flags -> the graph with them, where there are two and neither is meant.
        inventory: the sites, and all that stays with the reason.
        call: the arguments that the graphs were captured for.
        constants: path -> a tensor that a graph reads, but is no parameter or buffer.
        skeleton: the model without its values, on the meta device.
        inputs: what it was captured with.
    """

    modes: tuple[ModeGraph, ...]
    trace: Callable[[Mapping[str, bool]], ModeGraph]
    inventory: Inventory
    call: CallSignature
    constants: Mapping[str, Tensor]
    skeleton: nn.Module
    inputs: HeldInputs

    @property
    def graph(self) -> fx.Graph:
        """The graph of both modes; of train mode, where there are two."""
        return self.modes[0].graph

    @property
    def leaves(self) -> Mapping[str, str]:
        """Path of each module that some graph calls -> why it is called, not traced."""
        return _all_leaves(self.modes)

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
    model: nn.Module,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    more_examples: Sequence[Any] = (),
    *,
    keeps_code: bool = False,
    calls: Collection[str] = (),
) -> Capture:
    """Turn a model into a graph and an inventory; the model is not run and not changed.

    Train mode and eval mode are both traced. Where they differ in constants only, one graph reads
    the flag of the owning module; where they differ in more, each has its own. A module that cannot
    be traced stays a call, and is handed its weights; in the extreme the whole model does.

    Args:
        model: any module; it may be on the meta device.
        example_inputs: positional arguments that say which arguments of ``forward`` are given.
        example_kwargs: the same for keyword arguments.
        more_examples: further ones; see ``read_examples``.
        keeps_code: whether the model's own code is to run on generated weights; what it reads
            behind torch's back, or changes in place, then stays plain.
        calls: paths of modules that stay calls whatever could be traced of them.

    Raises:
        CaptureError: the model is none that could be captured: a wrapper, uninitialised, or alike;
            or the examples do not fit it, or each other.
    """
    refuse_models(model)
    skeleton = make_skeleton(model)
    call = read_call(model, example_inputs, example_kwargs)
    examples = read_examples(example_inputs, example_kwargs, more_examples)
    probes = Probes(model, *read_inputs(model, call, examples)) if examples else None
    by_name = example_inputs is None  # then all are mappings, perhaps of a class of their own
    arguments = {
        "example_inputs": example_inputs,
        "example_kwargs": None if example_kwargs is None else dict(example_kwargs),
        "more_examples": [dict(item) for item in more_examples] if by_name else more_examples,
    }
    inputs = hold_inputs(arguments, device_of(model))
    reasons = dict.fromkeys(calls, "a graph of it computed something else")
    while True:
        try:
            return _capture_with(model, skeleton, call, reasons, probes, inputs, keeps_code)
        except UntraceableError as err:
            for path, reason in err.reasons.items():
                while path in reasons:  # it is a call already: then what is around it has to be
                    path = path.rpartition(".")[0]
                reasons[path] = reason


def _capture_with(
    model: nn.Module,
    skeleton: nn.Module,
    call: CallSignature,
    reasons: Mapping[str, str],
    probes: Probes | None,
    inputs: HeldInputs,
    keeps_code: bool,
) -> Capture:
    """Capture a model, parts of which stay calls.

    Raises:
        UntraceableError: further parts have to, in both modes.
    """
    work = make_skeleton(skeleton)  # a fresh copy: tracing leaves traced values on the modules
    exposed = _expose_tensors(work)

    def trace(flags: Mapping[str, bool], is_training: bool = True) -> Trace:
        if "" in reasons:
            return no_trace(reasons[""])
        work.train(is_training)
        for path, flag in flags.items():
            work.get_submodule(path).training = flag
        return trace_mode(work, call, frozenset(reasons), exposed, probes)

    def make_graph(trace: Trace, graph: fx.Graph, flags: Mapping[str, bool]) -> ModeGraph:
        whys = {**reasons, **trace.failed}
        if "" in whys:
            return ModeGraph(graph=_call_whole(skeleton, call), flags=flags, leaves={"": whys[""]})
        graph, leaves = lower(graph, skeleton)
        leaves.update({path: whys[path] for path in leaves.keys() & whys.keys()})
        return ModeGraph(graph=graph, flags=flags, leaves=leaves)

    train, evaluate = trace({}), trace({}, is_training=False)

    def find_changes(is_training: bool) -> Changes | None:
        return None if probes is None else probes.find_changes(call.run, is_training)

    _refuse_states(train, evaluate, skeleton, find_changes)
    asked = sorted({"", *train.asked_training, *evaluate.asked_training})
    modes: tuple[ModeGraph, ...]
    merged = merge_modes(train, evaluate, trace)
    if merged is not None:
        modes = (make_graph(train, merged, {}),)
    else:
        modes = tuple(
            make_graph(mode, mode.graph, {path: mode.flags[path] for path in asked})
            for mode in (train, evaluate)
        )

    def trace_mixture(flags: Mapping[str, bool]) -> ModeGraph:
        mixed = trace(flags)
        made = make_graph(mixed, mixed.graph, flags)
        further = {path: why for path, why in made.leaves.items() if path not in leaves}
        if not mixed.asked_training <= flags.keys():
            further[""] = "it depends on the mode of further modules"
        if not _find_constants(made.graph, work, skeleton).keys() <= constants.keys():
            further[""] = "it reads further tensors"
        if further:
            raise UntraceableError(further)
        return made

    leaves = _all_leaves(modes)
    constants = {
        path: constant
        for mode in modes
        for path, constant in _find_constants(mode.graph, work, skeleton).items()
    }
    opaque = [skeleton.get_submodule(each.path) for each in list_opaque(leaves, skeleton)]
    runs_own_code = (
        keeps_code
        or any(not module.__module__.startswith("torch.nn.") for module in opaque)
        or any(isinstance(n.target, ApplyFunction) for mode in modes for n in mode.graph.nodes)
    )
    found = [find_changes(mode) for mode in (True, False)] if runs_own_code else []
    changed = {name for changes in found if changes for name in changes.tensors}
    _refuse_stale_reads(modes, {name for changes in found if changes for name in changes.bound})
    assumed = dict.fromkeys(train.assumed_tensors | evaluate.assumed_tensors, Tensor)
    if probes is not None:  # they live on where mixtures of modes may be traced
        probes.drop_values(is_over=len(modes) == 1)
    graphs = [mode.graph for mode in sorted(modes, key=partial(_num_opaque, skeleton))]
    return Capture(
        modes=modes,
        trace=trace_mixture if len(modes) > 1 else _trace_no_mixture,
        inventory=take_inventory(graphs, leaves, skeleton, model, changed, keeps_code),
        call=replace(call, types={**call.types, **assumed}),
        constants=constants,
        skeleton=skeleton,
        inputs=inputs,
    )


def _trace_no_mixture(flags: Mapping[str, bool]) -> ModeGraph:
    raise UntraceableError({"": "its graph reads the flags itself"})


def _refuse_states(
    train: Trace,
    evaluate: Trace,
    skeleton: nn.Module,
    find_changes: Callable[[bool], Changes | None],
) -> None:
    """Refuse to trace, in one mode, what may read there what a call of the other mode has left.

    Raises:
        UntraceableError: with the modules that have to be calls in both modes.
    """
    failed = {**train.failed, **evaluate.failed}
    in_one = train.failed.keys() ^ evaluate.failed.keys()

    def keeps(path: str) -> bool:
        changes = find_changes(path in train.failed)
        if changes is None:
            return may_keep_state(skeleton.get_submodule(path))
        return any(is_inside(changed, path) for changed in changes.modules)

    keeping = {path for path in in_one if keeps(path)}
    if keeping:
        raise UntraceableError({path: failed[path] for path in keeping})


def _refuse_stale_reads(modes: Sequence[ModeGraph], bound: Collection[str]) -> None:
    """Refuse to read a buffer in a graph, which reads it once, where a call binds it anew.

    Args:
        modes: the graphs.
        bound: names of the buffers that are other tensors after a call of the model.

    Raises:
        UntraceableError: with the modules that read one.
    """
    by_graph = frozenset[str]().union(*(rebound_by(mode.graph) for mode in modes))
    readers = {}
    for node in (node for mode in modes for node in mode.graph.nodes):
        if node.op == "get_attr" and node.target in bound and node.target not in by_graph:
            stack = list(node.meta.get("nn_module_stack", {}).values())
            why = f"it reads the buffer {node.target!r}, which a call binds to another tensor"
            readers[stack[-1][0] if stack else ""] = why
    if readers:
        raise UntraceableError(readers)


def _all_leaves(modes: Sequence[ModeGraph]) -> dict[str, str]:
    """Path of each module that is a call -> why, and in which mode if not in both."""
    leaves = {path: why for mode in modes for path, why in mode.leaves.items()}
    for path, why in leaves.items():
        inside = [any(is_inside(path, leaf) for leaf in mode.leaves) for mode in modes]
        if not all(inside):
            leaves[path] = f"{why} (in {'train' if inside[0] else 'eval'} mode only)"
    return leaves


def _num_opaque(skeleton: nn.Module, mode: ModeGraph) -> int:
    """How many parameters stand in modules that the graph calls."""
    return sum(opaque.numel for opaque in list_opaque(mode.leaves, skeleton))


def _call_whole(skeleton: nn.Module, call: CallSignature) -> fx.Graph:
    """Write the graph of a model whose own ``forward`` is called, with weights handed in."""
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in call.names]
    name_of = {id(parameter): name for name, parameter in skeleton.named_parameters()}
    graph.output(
        hand_in(graph, skeleton, lambda p: graph.get_attr(name_of[id(p)]), None, inputs, {})
    )
    return graph


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
