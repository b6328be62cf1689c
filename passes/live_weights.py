"""Live weights: modules of the user's own classes, whose weights are made when they are read."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from npas_fx.banks import Bank
from npas_fx.errors import GuardError
from npas_fx.passes.opaque import without_checkpoints

_READER = "_npas_fx_reader"


class LiveWeights:
    """Generates the weights of sites for whoever reads them.

    Inside a call each bank generates once, for all that read its weights there; again where its
    tensors have changed since, where gradients are wanted now and were not then, and where backward
    has gone through its weights. Outside of calls it generates at each read.

    Args:
        banks: name of each bank -> the bank.
        place_of: name of a site -> its bank's name and its place in the bank.
    """

    def __init__(self, banks: nn.ModuleDict, place_of: Mapping[str, tuple[str, int]]) -> None:
        self.banks = banks
        self.place_of = place_of
        self._here = _Here()

    def __deepcopy__(self, memo: dict[int, Any]) -> LiveWeights:
        # What is made in a call that is running stays with that call.
        return LiveWeights(copy.deepcopy(self.banks, memo), self.place_of)

    def read(self, site: str) -> Tensor:
        """Generate the weight of a site, or take it from the call that is running."""
        name, place = self.place_of[site]
        call = self._here.call
        if call is None:
            weight: Tensor = self.banks[name]()[place]
            return weight
        made = call.made.get(name)
        if made is None or made.is_stale():
            bank = self.banks[name]
            assert isinstance(bank, Bank)
            with torch.set_grad_enabled(call.has_grad or torch.is_grad_enabled()):
                made = call.made[name] = _Made(bank)
        return made.weights[place]

    def is_in_call(self) -> bool:
        """Whether this thread is in a call."""
        return self._here.call is not None

    def is_in_forward(self) -> bool:
        """Whether this thread is in a call that is a ``forward``."""
        call = self._here.call
        return call is not None and call.is_forward

    @contextmanager
    def call(self, *, is_forward: bool) -> Iterator[None]:
        """Let banks generate once from here on; there may be calls inside calls.

        Args:
            is_forward: whether the code is to find just the parameters that the plain model has.

        Raises:
            GuardError: a weight was changed in place, which would be lost.
        """
        outer = self._here.call
        call = self._here.call = outer or _Call()
        was_forward, call.is_forward = call.is_forward, is_forward or call.is_forward
        try:
            if outer or torch.compiler.is_compiling():
                yield
            else:
                with without_checkpoints():
                    yield
                self._refuse_changes(call)
        finally:
            call.is_forward = was_forward
            self._here.call = outer

    def _refuse_changes(self, call: _Call) -> None:
        for site, (name, place) in self.place_of.items():
            if name in call.made and call.made[name].is_changed(place):
                raise GuardError(
                    f"{site} was changed in place, but it is generated anew at each call and the "
                    "change would be lost; make it before the model is transformed, or list the "
                    "weight in exclude"
                )


class _Call:
    """The outermost call of a thread."""

    def __init__(self) -> None:
        self.made: dict[str, _Made] = {}  # name of a bank -> what it has generated last
        self.has_grad = torch.is_grad_enabled()
        self.is_forward = False


class _Here(threading.local):
    call: _Call | None = None  # the outermost one that this thread is in


class _Made:
    """Weights that a bank has generated, and what tells whether they are still those it would."""

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self.weights: tuple[Tensor, ...] = bank()
        self.has_grad = any(weight.requires_grad for weight in self.weights)
        self.spent: list[bool] = []
        self.state: list[_State] = []
        if not torch.compiler.is_compiling():
            self._look()

    def is_stale(self) -> bool:
        """Whether the bank is to generate again."""
        if torch.is_grad_enabled() and not self.has_grad and _wants_grad(self.bank):
            return True
        return not torch.compiler.is_compiling() and (bool(self.spent) or self._has_moved())

    def is_changed(self, place: int) -> bool:
        """Whether somebody has written into a weight, not by way of the bank."""
        return not self._has_moved() and self.versions[place] != _version_of(self.weights[place])

    def _look(self) -> None:
        self.state = _state_of(self.bank)
        self.versions = [_version_of(weight) for weight in self.weights]
        # Nothing that the hook holds may lead back to the weights: no collector sees that cycle.
        spend = functools.partial(_note, self.spent)
        for weight in self.weights:
            if weight.grad_fn is not None:
                weight.register_hook(spend)  # type: ignore[no-untyped-call]

    def _has_moved(self) -> bool:
        if not self.state:  # made in compiled code, which cannot look, a moment ago
            self._look()
        now = _state_of(self.bank)
        # Tensors are kept and compared themselves: the address of one that is gone may come again.
        return any(
            old[0] is not new[0] or old[1:] != new[1:] or new[1] is None
            for old, new in zip(self.state, now, strict=True)
        )


def _note(seen: list[bool], _: Tensor) -> None:
    seen.append(True)


_State: TypeAlias = tuple[Tensor, "int | None", "int | None"]


def _wants_grad(bank: Bank) -> bool:
    return any(parameter.requires_grad for parameter in bank.parameters())


def _state_of(bank: Bank) -> list[_State]:
    return [(tensor, _version_of(tensor), _data_of(tensor)) for tensor in bank.tensors().values()]


def _version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written to; None where torch does not count."""
    return None if tensor.is_inference() else tensor._version


def _data_of(tensor: Tensor) -> int | None:
    """Where the data of a tensor is, which ``.data =`` changes; None where it has none."""
    try:
        return tensor.data_ptr()
    except RuntimeError:  # inside torch.func transforms, or without values
        return None


@dataclass(frozen=True, slots=True)
class _Reader:
    """What a module knows of generated weights.

    Attributes:
        live: generates them.
        site_of: name of each of its own parameters that is generated -> the site.
        firsts: one site of each bank that the module, or those below it, read.
    """

    live: LiveWeights
    site_of: Mapping[str, str]
    firsts: Sequence[str]


def bind(
    root: nn.Module,
    live: LiveWeights,
    site_of: Mapping[str, str],
    bases: tuple[type[nn.Module], ...],
) -> None:
    """Let the modules of a tree read generated weights, whoever calls them.

    A module that has some, or has modules below it that do, gets a class derived from its own: with
    a property for each weight, and with methods that are calls of ``live``.

    Args:
        root: of the tree; the slots of generated weights are emptied.
        live: generates them.
        site_of: every name of a generated weight in the tree -> its site.
        bases: of the class of the root, before its own.
    """
    derived: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}
    for path, module in list(root.named_modules()):
        prefix = f"{path}." if path else ""
        firsts = {
            live.place_of[site][0]: site
            for name, site in site_of.items()
            if name.startswith(prefix)
        }
        if not firsts and path:
            continue
        own = {n: site_of[prefix + n] for n in module._parameters if prefix + n in site_of}
        module._parameters.update(dict.fromkeys(own))
        vars(module).pop("_flat_weights", None)  # see _RECURRENT
        vars(module)[_READER] = _Reader(live, own, tuple(firsts.values()))
        kind = type(module)
        if not path:
            module.__class__ = _derive(f"Shared{kind.__name__}", (*bases, _Live, kind), own)
            continue
        key = kind, tuple(own)
        if key not in derived:
            derived[key] = _derive(kind.__name__, (_Live, kind), own)
        module.__class__ = derived[key]


class _Live(nn.Module):
    """What derived classes have in common."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep the class out of registries that the user's classes may have."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Those that are trained; in ``forward`` those of the plain model, generated ones too."""
        reader = vars(self).get(_READER)
        if reader is None or not reader.live.is_in_forward():
            return super().named_parameters(*args, **kwargs)
        found: Iterator[Any] = self._named_members(_read_all, *args, **kwargs)
        return found


def _read_all(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, parameter in module._parameters.items():
        yield name, getattr(module, name) if parameter is None else parameter


def _derive(name: str, bases: tuple[type, ...], weights: Iterable[str]) -> type[nn.Module]:
    """Make a class of modules that read generated weights; the last base is the user's."""
    kind = bases[-1]
    members: dict[str, Any] = {"__module__": kind.__module__, "__doc__": kind.__doc__}
    for base in reversed(kind.__mro__):
        if base not in (nn.Module, object):
            methods = {n: f for n, f in vars(base).items() if _is_method(n, f)}
            members |= {n: _call_of(f, is_forward=n == "forward") for n, f in methods.items()}
    members["__call__"] = _call_of(kind.__call__, is_forward=True)
    members.update({weight: _read_of(weight) for weight in weights})
    if issubclass(kind, nn.RNNBase):
        members |= _RECURRENT
    return type(name, bases, members)


def _is_method(name: str, function: object) -> bool:
    """Whether a class has a method of its own there, none that torch's modules have too."""
    return (
        isinstance(function, FunctionType)
        and (name == "forward" or not hasattr(nn.Module, name))
        and not name.startswith("__")
        and not inspect.isgeneratorfunction(function)
        and not inspect.iscoroutinefunction(function)
        and not inspect.isasyncgenfunction(function)
    )


def _call_of(function: Callable[..., Any], *, is_forward: bool) -> Callable[..., Any]:
    """Make a method that is a call of the live weights."""

    @functools.wraps(function)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        reader = vars(self).get(_READER)
        if reader is None:  # one that the user's code has made of our class
            return function(self, *args, **kwargs)
        live = reader.live
        if live.is_in_forward() or (live.is_in_call() and not is_forward):
            return function(self, *args, **kwargs)
        with live.call(is_forward=is_forward):
            if torch.compiler.is_compiling():
                for site in reader.firsts:  # before control flow, whose branches are graphs
                    live.read(site)
            return function(self, *args, **kwargs)

    made: Any = call
    made.__code__ = made.__code__.replace()  # torch.compile counts what it compiles for each code
    return call


def _read_of(name: str) -> property:
    def read(self: nn.Module) -> Any:
        own = self._parameters.get(name)
        reader = vars(self).get(_READER)
        if own is not None:
            return own  # that the user has put there since
        if reader is None or name not in self._parameters:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return reader.live.read(reader.site_of[name])

    return property(read)


def _read_flat(self: nn.RNNBase) -> list[Any]:
    return [getattr(self, name, None) for name in self._flat_weights_names]


def _do_nothing(self: nn.RNNBase, *_: Any) -> None:
    """Take the place of what keeps the weights of a recurrent module in a list."""


_RECURRENT: Mapping[str, Any] = {
    "_flat_weights": property(_read_flat, _do_nothing),
    "_update_flat_weights": _do_nothing,
    "flatten_parameters": _do_nothing,
}
