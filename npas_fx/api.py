"""The public functions; each is a handful of calls, one for each step."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from npas_fx import storage
from npas_fx.build import build_banks, check_plan, give_birth
from npas_fx.errors import CaptureWarning, NPASError, PlanError, VerificationError
from npas_fx.find_wrong import find_wrong_modules
from npas_fx.generators import GENERATORS, Generator
from npas_fx.generators.generator import TEMPLATE_NAMES
from npas_fx.ir import BankPlan, Inventory, Plan
from npas_fx.passes.capture import Capture, capture
from npas_fx.passes.emit import emit as emit_module
from npas_fx.passes.emitted import EmitOptions, EmittedModule, emission_of
from npas_fx.passes.examples import read_examples
from npas_fx.passes.rebinding import carry_buffers, names_set_by_calls
from npas_fx.passes.refuse_models import refuse_changes_by_train
from npas_fx.passes.skeleton import clone, copy_with, device_of, empty_like
from npas_fx.patterns import Patterns
from npas_fx.planning import (
    Profiler,
    make_frontier,
    make_plan,
    nameable_generators,
    resolve_generators,
)
from npas_fx.rules import Groups, apply_rules
from npas_fx.solvers import Solver
from npas_fx.verify import all_weights, generate
from npas_fx.verify import verify as run_oracle

_Examples: TypeAlias = tuple[Any, Mapping[str, Any] | None, Sequence[Any]]
_NO_EXAMPLES: _Examples = (None, None, ())
# Of verification; after the last the model's own forward is called.
_MOST_ROUNDS = 3


@torch.inference_mode(False)  # what it makes must be trainable
def transform(
    model: nn.Module,
    budget: object,
    *,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    more_examples: Sequence[Any] = (),
    include: Patterns = None,
    exclude: Patterns = None,
    keep_private: Patterns = None,
    same_bank: Groups = None,
    different_bank: Groups = None,
    max_banks: int | None = None,
    pin: Sequence[BankPlan] | None = None,
    profile: str | Profiler = "structure",
    generators: Sequence[str | Generator] | None = None,
    solver: str | Solver = "cp_sat",
    emit: str = "graph",
    on_guard: str = "error",
    verify: bool = True,
    seed: int = 0,
) -> EmittedModule:
    """Bring a model under a parameter budget: ``apply(model, plan(model, budget, …))``.

    Args:
        model: any module; it is not changed.
        budget: how many trainable parameters the result may own: a share of the model's own
            (``0.25``, ``1.5``, ``"25%"``), a number of them (``3_500_000``, ``"3.5M"``), or their
            bytes (``"14MB"``).
        example_inputs: a tensor, or a tuple of positional arguments of ``forward``. They say which
            optional arguments are used, they answer what the model's code asks about shapes and
            types, and the result is verified on them.
        example_kwargs: keyword arguments, likewise.
        more_examples: further examples, of another length or image size, say: where the model's
            code does with one of them what it does not with another, that part is called as it is,
            so that the result works for all. A list; each item is like ``example_inputs``, or a
            dict where only ``example_kwargs`` is given, or a pair of the two where both are.
        include: names, globs or compiled regular expressions; only these weights may be shared.
        exclude: these stay as they are; wins over ``include``.
        keep_private: these stay parameters of their own, but count as weights that might not.
        same_bank: groups of weights; those of one group end in one bank, others may join them.
        different_bank: groups of weights; no two of a group end in one bank.
        max_banks: how many banks of two or more weights there may be; others are not counted.
        pin: banks of an earlier plan, perhaps edited; the plan has each of them as it is, with its
            weights, generator and size.
        profile: name of a profile, or a function from an inventory to a profile.
        generators: names or objects of the generators that banks may follow; by default those in
            ``npas_fx.generators.DEFAULT_GENERATORS``.
        solver: name of a solver, or a function from a planning problem to a selection.
        emit: ``"graph"`` for one small module that runs the captured graph, or ``"module"`` for an
            instance of the model's own class: its methods, attributes and ``isinstance`` work, and
            its modules read weights that are generated as they are read.
        on_guard: what a graph does where it was not captured for a call: ``"error"`` raises
            ``GuardError``, ``"fallback"`` runs the code of the model's class, which is then kept.
        verify: whether to run the original and the result on the example inputs, in both modes.
            Where a graph computes something else, the modules at fault are called as they are, at
            last the model itself, with a ``CaptureWarning``.
        seed: of the new banks.

    Returns:
        A module with the signature of ``model`` that owns what is kept under its own names, and
        the banks. Weights that are kept or dedicated have the values that they have in ``model``;
        shared ones start fresh, with its mean and standard deviation each.

    Raises:
        BudgetError: the budget cannot be understood.
        InfeasibleBudgetError: it cannot be met; ``.smallest`` says what can.
        RuleError: a rule matches nothing, or rules contradict each other, so that no budget would
            do.
        CaptureError: the model is wrapped, compiled or uninitialised, or fails on the example.
        VerificationError: the result computes something else than the model would.

    Source: Plummer et al., Neural Parameter Allocation Search, ICLR 2022.
    """
    # Where verification makes the module be captured again, the rules are read again.
    include, exclude, keep_private = map(_hold, (include, exclude, keep_private))
    same_bank, different_bank, pin = map(_hold, (same_bank, different_bank, pin))
    generators = _hold(generators)

    def make(options: EmitOptions) -> EmittedModule:
        captured = _capture(model, example_inputs, example_kwargs, more_examples, options)
        rules = apply_rules(
            captured.inventory,
            include=include,
            exclude=exclude,
            keep_private=keep_private,
            same_bank=same_bank,
            different_bank=different_bank,
            max_banks=max_banks,
            pin=pin,
            generators=_pinnable(generators),
        )
        chosen = make_plan(rules, budget, profile=profile, generators=generators, solver=solver)
        return _emit(model, captured, chosen, generators, seed, options)

    examples = (example_inputs, example_kwargs, more_examples) if verify else _NO_EXAMPLES
    return _make_verified(make, model, examples, seed, EmitOptions(emit=emit, on_guard=on_guard))


def _pinnable(generators: Sequence[str | Generator] | None) -> Mapping[str, Generator]:
    return GENERATORS if generators is None else resolve_generators(generators)


def _hold(given: Any) -> Any:
    """Read iterators to the end, those in a list or tuple too; all else stays as it is."""
    if isinstance(given, Iterator):
        given = list(given)
    return [_hold(each) for each in given] if type(given) in (list, tuple) else given


def plan(
    model: nn.Module,
    budget: object,
    *,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    more_examples: Sequence[Any] = (),
    include: Patterns = None,
    exclude: Patterns = None,
    keep_private: Patterns = None,
    same_bank: Groups = None,
    different_bank: Groups = None,
    max_banks: int | None = None,
    pin: Sequence[BankPlan] | None = None,
    profile: str | Profiler = "structure",
    generators: Sequence[str | Generator] | None = None,
    solver: str | Solver = "cp_sat",
    emit: str = "graph",
    on_guard: str = "error",
) -> Plan:
    """Choose which weights of a model share which bank under a budget.

    The model may be on the meta device. Arguments and errors are those of ``transform``.

    Returns:
        The plan: print it, write it with ``to_json``, edit it, and hand it to ``apply``.
    """
    (made,) = plan_frontier(
        model,
        [budget],
        example_inputs=example_inputs,
        example_kwargs=example_kwargs,
        more_examples=more_examples,
        include=include,
        exclude=exclude,
        keep_private=keep_private,
        same_bank=same_bank,
        different_bank=different_bank,
        max_banks=max_banks,
        pin=pin,
        profile=profile,
        generators=generators,
        solver=solver,
        emit=emit,
        on_guard=on_guard,
    )
    return made


def plan_frontier(
    model: nn.Module,
    budgets: Sequence[object],
    *,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    more_examples: Sequence[Any] = (),
    include: Patterns = None,
    exclude: Patterns = None,
    keep_private: Patterns = None,
    same_bank: Groups = None,
    different_bank: Groups = None,
    max_banks: int | None = None,
    pin: Sequence[BankPlan] | None = None,
    profile: str | Profiler = "structure",
    generators: Sequence[str | Generator] | None = None,
    solver: str | Solver = "cp_sat",
    emit: str = "graph",
    on_guard: str = "error",
) -> list[Plan]:
    """Choose the banks for many budgets at once, to see what each is worth.

    All plans on one side of the model's size are chosen from the same candidates, and the solver
    goes on from one to the next, so this takes less than a call of ``plan`` for each. ``budgets``
    are in any form that ``transform`` takes; the model may be on the meta device; other arguments
    and errors are those of ``transform``.

    Returns:
        The plans in the order of the budgets. Of two budgets in the same resource, parameters or
        bytes, the larger one has no higher a ``certificate.objective``.
    """
    options = EmitOptions(emit=emit, on_guard=on_guard)
    captured = _capture(model, example_inputs, example_kwargs, more_examples, options)
    rules = apply_rules(
        captured.inventory,
        include=include,
        exclude=exclude,
        keep_private=keep_private,
        same_bank=same_bank,
        different_bank=different_bank,
        max_banks=max_banks,
        pin=pin,
        generators=_pinnable(generators),
    )
    return make_frontier(rules, budgets, profile=profile, generators=generators, solver=solver)


def inspect(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    more_examples: Sequence[Any] = (),
) -> Inventory:
    """Say what a model is made of, before any planning.

    The model may be on the meta device. It is not run; with an example, a copy of it is where its
    code asks what shapes and types alone do not tell.

    Args:
        model: any module; it is not changed.
        example_inputs: as for ``transform``.
        example_kwargs: as for ``transform``.
        more_examples: as for ``transform``.

    Returns:
        The inventory: print it for its sites by kind and role, what stays and why, the blocks that
        are repeated, the modules that are not traced into, with the reason and the line, and the
        share of the parameters that can be generated; or read its fields.

    Raises:
        CaptureError: the model is wrapped, compiled or uninitialised.
    """
    return capture(_refuse_emitted(model), example_inputs, example_kwargs, more_examples).inventory


@torch.inference_mode(False)  # what it makes must be trainable
def apply(
    model: nn.Module,
    plan: Plan,
    *,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    more_examples: Sequence[Any] = (),
    generators: Sequence[str | Generator] | None = None,
    emit: str = "graph",
    on_guard: str = "error",
    verify: bool = True,
    seed: int = 0,
) -> EmittedModule:
    """Emit the module that a plan describes.

    Args:
        model: the one that was planned, or another of its architecture; it is not changed.
        plan: from ``plan``, or read from a file and perhaps edited.
        example_inputs: as for ``transform``.
        example_kwargs: as for ``transform``.
        more_examples: as for ``transform``.
        generators: those of the plan that are neither built in nor registered.
        emit: as for ``transform``; the same for the plan.
        on_guard: likewise.
        verify: as for ``transform``.
        seed: of the new banks.

    Raises:
        PlanError: the plan does not fit the model.
        CaptureError: as for ``transform``.
        VerificationError: as for ``transform``.
    """

    def make(options: EmitOptions) -> EmittedModule:
        captured = _capture(model, example_inputs, example_kwargs, more_examples, options)
        return _emit(model, captured, plan, generators, seed, options)

    examples = (example_inputs, example_kwargs, more_examples) if verify else _NO_EXAMPLES
    return _make_verified(make, model, examples, seed, EmitOptions(emit=emit, on_guard=on_guard))


def _make_verified(
    make: Callable[[EmitOptions], EmittedModule],
    model: nn.Module,
    examples: _Examples,
    seed: int,
    options: EmitOptions,
) -> EmittedModule:
    """Make a module; where a graph is not what the model's code is, one that calls that code.

    The modules that are found to be wrong are called first, at last the model's own ``forward``.
    Without examples nothing is verified.

    Raises:
        VerificationError: no graph is to blame.
    """
    emitted, blamed, rounds = make(options), None, 0
    if examples[0] is None and examples[1] is None:
        return emitted
    while (error := _find_error(emitted, model, examples, seed)) is not None:
        blamed, rounds = blamed or error, rounds + 1
        if options.emit == "module" or "" in emission_of(emitted).capture.leaves:
            raise blamed
        wrong = frozenset[str]()
        if rounds < _MOST_ROUNDS:
            wrong = find_wrong_modules(emitted, model, read_examples(*examples), seed)
        options = replace(options, calls=(*options.calls, *sorted(wrong)) if wrong else ("",))
        try:
            emitted = make(options)
        except NPASError:
            raise blamed from None
    if blamed is not None:
        is_whole = options.calls == ("",)
        called = "its own forward" if is_whole else ", ".join(options.calls)
        warnings.warn(
            f"a graph of the model computes something else than its code ({blamed}); {called} "
            f"{'is' if len(options.calls) == 1 else 'are'} called instead, so the result is right"
            f"{', but roles of weights are not known' if is_whole else ''}",
            CaptureWarning,
            stacklevel=3,
        )
    return emitted


def _find_error(
    emitted: EmittedModule, model: nn.Module, examples: _Examples, seed: int
) -> VerificationError | None:
    try:
        run_oracle(emitted, model, *examples, seed=seed)
    except VerificationError as err:
        return err
    return None


def _capture(
    model: nn.Module,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None,
    more_examples: Sequence[Any],
    options: EmitOptions,
) -> Capture:
    given = _refuse_emitted(model), example_inputs, example_kwargs, more_examples
    if options.emit == "graph" and isinstance(model, nn.Module):
        refuse_changes_by_train(model)
    return capture(*given, keeps_code=options.keeps_code, calls=options.calls)


def _emit(
    model: nn.Module,
    captured: Capture,
    plan: Plan,
    generators: Sequence[str | Generator] | None,
    seed: int,
    options: EmitOptions,
) -> EmittedModule:
    known = nameable_generators(generators)
    check_plan(plan, captured.inventory, known)
    if any(tensor.is_meta for tensor in model.parameters()):
        raise PlanError(
            "the model is on the meta device and has no values to emit; move it to a real device "
            "with to_empty and initialise it, or load a saved module with npas_fx.load"
        )
    weights = {site.name: model.get_parameter(site.name) for site in captured.inventory.sites}
    banks = build_banks(plan, captured.inventory, known)
    give_birth(banks, plan, weights, seed)
    shared = {name for bank in plan.banks if not bank.is_dedicated for name in bank.sites}
    store = copy_with(model, lambda name, t: empty_like(t, "meta") if name in shared else clone(t))
    return emit_module(captured, plan, store, banks, options)


def plan_of(shared: nn.Module) -> Plan:
    """Find the plan of an emitted module, also after deepcopy, compile, DDP and load.

    Raises:
        TypeError: the module was not made by npas_fx.
    """
    return emission_of(_unwrap(shared)).plan


def weights_of(shared: nn.Module) -> dict[str, Tensor]:
    """Generate the weights of all shared sites, for a penalty on them or to look at them.

    Args:
        shared: an emitted module, perhaps compiled or wrapped in DDP.

    Returns:
        Name of each site in a shared bank -> its weight, in the site's shape and dtype; gradients
        flow into the bank. What is kept or dedicated is a parameter as before, and not among them.

    Raises:
        TypeError: the module was not made by npas_fx.
    """
    return generate(_unwrap(shared))


@torch.inference_mode(False)  # what it makes must be trainable
def materialize(shared: nn.Module, model: nn.Module | None = None) -> nn.Module:
    """Write the generated weights back into the plain architecture.

    Args:
        shared: an emitted module, perhaps compiled or wrapped in DDP; it is not changed.
        model: an instance of the architecture to copy, meta device allowed; by default the
            structure kept when the model was transformed.

    Returns:
        An instance of the user's class with plain weights, equal bit for bit to those that
        ``shared`` generates in eval mode without autocast, in the modes that ``shared`` is in.

    Raises:
        PlanError: ``model`` is of another architecture.
    """
    emitted = _unwrap(shared)
    skeleton = emission_of(emitted).capture.skeleton if model is None else model
    with torch.no_grad():
        weights = generate(emitted)
    values = {**_values(emitted), **all_weights(emitted, weights)}
    trainable = {name: t.requires_grad for name, t in emitted.named_parameters()}
    set_by_calls = names_set_by_calls(skeleton)

    def restore(name: str, tensor: Tensor) -> Tensor:
        value = values.get(name)
        is_set = not isinstance(tensor, nn.Parameter) and name.rpartition(".")[2] in set_by_calls
        if is_set and value is None:
            return tensor  # until the buffers are carried
        if value is None or (value.shape != tensor.shape and not is_set):
            found = "nothing" if value is None else f"the shape {list(value.shape)}"
            raise PlanError(
                f"the model wants {name} of shape {list(tensor.shape)}, the emitted module has "
                f"{found}; pass an instance of the architecture that was transformed"
            )
        copied = value.detach().clone(memory_format=torch.contiguous_format)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(copied, requires_grad=trainable.get(name, True))
        return copied

    plain = copy_with(skeleton, restore)
    carry_buffers(emitted, plain)
    flags = {path: part.training for path, part in emitted.named_modules(remove_duplicate=False)}
    for path, part in plain.named_modules():
        part.training = flags.get(path, emitted.training)
    return plain


def save(shared: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save an emitted module: its plan, what was captured and with which inputs, all its tensors.

    The example inputs are stored as they were given: tensors, numbers, strings, and lists, tuples
    and dicts of these. What else there is in them has to be passed to ``load`` again.

    Args:
        shared: an emitted module, perhaps compiled or wrapped in DDP.
        folder: is made if need be; files in it that an earlier save wrote are replaced.

    Raises:
        StorageError: the folder cannot be written; what an earlier save wrote is then still there.

    Warns:
        StorageWarning: the folder cannot hold one of the example inputs.
    """
    storage.write_folder(_unwrap(shared), folder)


@torch.inference_mode(False)  # what it makes must be trainable
def load(
    folder: str | os.PathLike[str],
    model: nn.Module,
    *,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    more_examples: Sequence[Any] | None = None,
    generators: Sequence[str | Generator] | None = None,
) -> EmittedModule:
    """Load what ``save`` wrote; nothing is unpickled.

    Args:
        folder: written by ``save``.
        model: an instance of the architecture; its values are not used, and it may be on the meta
            device, unless its code asks buffers for their values.
        example_inputs: in place of those in the folder; needed where it does not hold them.
        example_kwargs: likewise; what of the two is not passed then is not in the example.
        more_examples: likewise; of the same form.
        generators: those of the plan that are neither built in nor registered.

    Returns:
        The emitted module, bit for bit, in the modes of ``model``, on its device (a model on the
        meta device is loaded to the CPU).

    Raises:
        StorageError: a file is missing or damaged, the folder does not hold the example inputs, or
            ``model`` is of another architecture.
    """
    read = storage.read_plan(folder)
    storage.refuse_meta_constants(model)
    options = storage.read_options(folder)
    passed = {
        "example_inputs": example_inputs,
        "example_kwargs": example_kwargs,
        "more_examples": more_examples,
    }
    inputs = storage.read_inputs(folder, passed, device_of(_refuse_emitted(model)))
    captured = _capture(model, **inputs, options=options)
    storage.check_report(folder, captured)
    known = nameable_generators(generators)
    check_plan(read, captured.inventory, known)
    shared = {name for bank in read.banks if not bank.is_dedicated for name in bank.sites}

    def allocate(name: str, tensor: Tensor) -> Tensor:
        if name in shared:
            return empty_like(tensor, "meta")
        return empty_like(tensor, "cpu" if tensor.is_meta else tensor.device)

    is_meta = any(site.device.type == "meta" for site in captured.inventory.sites)
    device = torch.device("cpu") if is_meta else None
    banks = build_banks(read, captured.inventory, known, device)
    emitted = emit_module(captured, read, copy_with(model, allocate), banks, options)
    storage.fill_tensors(emitted, folder)
    return emitted


def param_groups(shared: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Group the parameters of an emitted module for an optimizer.

    Args:
        shared: an emitted module, perhaps compiled or wrapped in DDP.
        lr: learning rate of all groups; change a group's own afterwards.
        weight_decay: of templates and of all plain parameters.

    Returns:
        Groups named ``banks`` (templates), ``coefficients`` (all else of banks, gains too; no
        weight decay, which would pull the weights that they mix towards zero twice) and ``rest``
        (the parameters that the model itself had); each trainable parameter is in exactly one,
        empty groups are left out.
    """
    emitted = _unwrap(shared)
    prefix = f"{emission_of(emitted).banks}."
    groups: dict[str, list[nn.Parameter]] = {"banks": [], "coefficients": [], "rest": []}
    for name, parameter in emitted.named_parameters():
        if parameter.requires_grad:
            if not name.startswith(prefix):
                kind = "rest"
            else:
                is_template = name.rpartition(".")[2].startswith(TEMPLATE_NAMES)
                kind = "banks" if is_template else "coefficients"
            groups[kind].append(parameter)
    return [
        {
            "params": parameters,
            "name": name,
            "lr": lr,
            "weight_decay": 0.0 if name == "coefficients" else weight_decay,
        }
        for name, parameters in groups.items()
        if parameters
    ]


def _values(module: nn.Module) -> dict[str, Tensor]:
    kinds = (module.named_parameters, module.named_buffers)
    return {name: tensor for named in kinds for name, tensor in named(remove_duplicate=False)}


def _unwrap(module: nn.Module) -> EmittedModule:
    """Take an emitted module out of torch.compile and data-parallel wrappers."""
    inner = module
    while not isinstance(inner, EmittedModule):
        wrapped = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if not isinstance(wrapped, nn.Module):
            raise TypeError(
                f"this {type(module).__name__} was not made by npas_fx.transform, apply or load"
            )
        inner = wrapped
    return inner


def _refuse_emitted(model: nn.Module) -> nn.Module:
    if isinstance(model, EmittedModule):
        raise NPASError(
            "the model was already transformed; transform npas_fx.materialize(model) instead, or "
            "the model that it was made from"
        )
    return model
