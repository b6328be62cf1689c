"""Emit: the module that owns what is kept and the banks, and runs the rewritten graph."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any, cast

from torch import Tensor, nn

from npas_fx.banks import Bank
from npas_fx.errors import GuardError, RewriteError, UntraceableError
from npas_fx.ir import Plan
from npas_fx.passes.banks_aside import BanksAside, live_weights_of, put_aside
from npas_fx.passes.call import make_forward
from npas_fx.passes.capture import Capture, ModeGraph
from npas_fx.passes.emitted import Emission, EmitOptions, EmittedModule, note_emission
from npas_fx.passes.fall_back import assumed_shapes, changed_before_guards, fall_back
from npas_fx.passes.live_classes import bind, names_of
from npas_fx.passes.live_weights import LiveWeights
from npas_fx.passes.opaque import empty_slots, lend
from npas_fx.passes.pipeline import rewrite

_SOURCES = count()


_BY_GRAPH = EmitOptions()


def choose_bank_name(model: nn.Module) -> str:
    """Find a name for the banks' submodule that the model does not use."""
    name, number = "npas_banks", count(2)
    while hasattr(model, name):
        name = f"npas_banks_{next(number)}"
    return name


def emit(
    capture: Capture,
    plan: Plan,
    store: nn.Module,
    banks: Mapping[str, Bank],
    options: EmitOptions = _BY_GRAPH,
) -> EmittedModule:
    """Make the module that computes what the model did, with generated weights.

    Args:
        capture: of the model.
        plan: of the banks.
        store: a copy of the model that the emitted module may own; the values of shared sites in
            it are not used.
        banks: name of each bank -> the bank, in the order of the plan's shared banks.
        options: by default the module runs the captured graph.
    """
    shared = [bank for bank in plan.banks if not bank.is_dedicated]
    prefix = choose_bank_name(store)
    names = list(banks)
    bank_of = {
        site: (name, place)
        for name, bank in zip(names, shared, strict=True)
        for place, site in enumerate(bank.sites)
    }
    sites_of = {f"{prefix}.{name}": b.sites for name, b in zip(names, shared, strict=True)}
    site_of = {
        name: site.name
        for site in capture.inventory.sites
        if site.name in bank_of
        for name in (site.name, *site.aliases)
    }
    read = {str(n.target) for m in capture.modes for n in m.graph.nodes if n.op == "get_attr"}
    for site in sorted(bank_of.keys() - read):
        raise RewriteError(f"{site} of bank {bank_of[site][0]} is not read in any graph")
    owner = nn.ModuleDict(banks)
    owner.train(store.training)
    live = LiveWeights(owner, bank_of)
    module: EmittedModule
    if options.emit == "module":
        bind(store, live, site_of, (EmittedModule, BanksAside))
        module = cast(EmittedModule, store)
    elif options.keeps_code or "" in capture.leaves:
        empty_slots(store, sorted(site_of))
        module = _keep_class(store, _make_forward(capture, sites_of, type(store), site_of, options))
    else:
        forward = _make_forward(capture, sites_of, type(store), site_of, options)
        module = _new_module(type(store), forward)
        _mirror(store, "", module, capture.leaves, frozenset(site_of), {})
    if isinstance(module, BanksAside):
        put_aside(module, prefix, live)
    elif banks:
        module.add_module(prefix, owner)
    if options.emit == "graph":
        register_constants(module, capture.constants)
    emission = Emission(plan=plan, capture=capture, banks=prefix, bank_of=bank_of, options=options)
    note_emission(module, emission)
    return module


def register_constants(module: nn.Module, constants: Mapping[str, Tensor]) -> None:
    """Give a module the tensors that a graph reads and that are no parameters or buffers."""
    for path, constant in constants.items():
        path, _, name = path.rpartition(".")
        owner = module.get_submodule(path)
        if not hasattr(owner, name):  # as an attribute of the user's own class
            owner.register_buffer(name, constant.clone(), persistent=False)


def _make_forward(
    capture: Capture,
    sites_of: Mapping[str, Sequence[str]],
    kind: type[nn.Module],
    site_of: Mapping[str, str],
    options: EmitOptions,
) -> Callable[..., Any]:
    """Make ``forward``: of the graph of both modes, or of that of the mode at each call.

    Args:
        capture: of the model.
        sites_of: bank path -> the site names that it generates, in the bank's order.
        kind: class of the model.
        site_of: every name of a generated weight in the model -> its site.
        options: of the emission.
    """
    whole = _lend_all(kind, site_of) if site_of else kind.forward

    def write(mode: ModeGraph) -> Callable[..., Any]:
        if "" in mode.leaves:
            return whole
        filename = f"<npas_fx graph {next(_SOURCES)} of {kind.__name__}>"
        graph = rewrite(mode.graph, sites_of)
        return make_forward(capture.call, graph, filename)

    if len(capture.modes) == 1:
        forward = write(capture.modes[0])
    else:
        forward = _choose_by_mode(capture, write)
    if options.on_guard == "error":
        return forward
    changed = [changed_before_guards(mode.graph, capture.skeleton) for mode in capture.modes]
    shapes: dict[str, Any] = {}
    for mode in capture.modes:
        shapes |= assumed_shapes(mode.graph, capture.skeleton, mode.leaves)
    return fall_back(forward, whole, sorted(set().union(*changed)), shapes)


def _choose_by_mode(
    capture: Capture, write: Callable[[ModeGraph], Callable[..., Any]]
) -> Callable[..., Any]:
    paths = list(capture.modes[0].flags)
    code_of = {tuple(mode.flags.values()): write(mode) for mode in capture.modes}

    def forward(self: EmittedModule, *args: Any, **kwargs: Any) -> Any:
        now = tuple([self.get_submodule(path).training for path in paths])
        if now not in code_of:  # a mixture of the two modes
            code_of[now] = write(_trace_mixture(capture, dict(zip(paths, now, strict=True))))
        return code_of[now](self, *args, **kwargs)

    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    parameters = [first, *capture.call.signature.parameters.values()]
    vars(forward)["__signature__"] = capture.call.signature.replace(parameters=parameters)
    return forward


def _trace_mixture(capture: Capture, flags: Mapping[str, bool]) -> ModeGraph:
    try:
        return capture.trace(flags)
    except UntraceableError as err:
        odd = [path or "the model" for path, flag in flags.items() if flag is not flags[""]]
        raise GuardError(
            f"the model's code differs between train and eval mode, and {', '.join(odd[:3])} "
            f"is not in the mode of the model, which cannot be traced ({err}); call train() or "
            "eval() of the model"
        ) from err


def _lend_all(kind: type[nn.Module], site_of: Mapping[str, str]) -> Callable[..., Any]:
    """Make a ``forward`` that runs the one of the model's class, with generated weights."""
    names, sites = list(site_of), list(site_of.values())

    @functools.wraps(kind.forward)
    def forward(self: EmittedModule, *args: Any, **kwargs: Any) -> Any:
        assert isinstance(self, BanksAside)
        live = live_weights_of(self)
        with live.call(is_forward=True), lend(self, names, live.read_all(sites)):
            return kind.forward(self, *args, **kwargs)

    return forward


def _keep_class(store: nn.Module, forward: Callable[..., Any]) -> EmittedModule:
    """Make an emitted module of the model itself, which goes on as an instance of its class."""
    kind = type(store)
    members = {**names_of(kind), "forward": forward}
    store.__class__ = type(kind.__name__, (EmittedModule, BanksAside, kind), members)
    assert isinstance(store, EmittedModule)
    return store


def _new_module(kind: type[nn.Module], forward: Callable[..., Any]) -> EmittedModule:
    members = {"forward": forward, "__module__": __name__, "_version": kind._version}
    module: EmittedModule = type(f"Shared{kind.__name__}", (EmittedModule,), members)()
    return module


def _mirror(
    source: nn.Module,
    path: str,
    target: nn.Module,
    leaves: Mapping[str, str],
    generated: frozenset[str],
    done: dict[int, nn.Module],
) -> None:
    """Give ``target`` what ``source`` owns, but for generated weights; leaves are taken whole."""
    done[id(source)] = target
    target.training = source.training
    prefix = f"{path}." if path else ""
    for name, parameter in source._parameters.items():
        if prefix + name not in generated:
            target.register_parameter(name, parameter)
    for name, buffer in source._buffers.items():
        is_persistent = name not in source._non_persistent_buffers_set
        target.register_buffer(name, buffer, persistent=is_persistent)
    for name, child in source._modules.items():
        if child is None:
            target.add_module(name, None)
        elif id(child) in done:
            target.add_module(name, done[id(child)])  # one module under two names
        elif prefix + name in leaves:
            done[id(child)] = child
            inside = f"{prefix}{name}."
            empty_slots(child, [n.removeprefix(inside) for n in generated if n.startswith(inside)])
            target.add_module(name, child)
        else:
            container = nn.Module()
            vars(container)["_version"] = child._version  # that state dicts tell to old code
            target.add_module(name, container)
            _mirror(child, prefix + name, container, leaves, generated, done)
