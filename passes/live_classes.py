"""Modules of the user's own classes, whose weights are generated when they are read."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import nn

from npas_fx.passes.live_weights import LiveWeights

_READER = "_npas_fx_reader"


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
        key = type(module), tuple(own)
        if not path:
            module.__class__ = _derive((*bases, _Live, type(module)), own)
        elif key in derived:
            module.__class__ = derived[key]
        else:
            module.__class__ = derived[key] = _derive((_Live, type(module)), own)


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


def _derive(bases: tuple[type, ...], weights: Iterable[str]) -> type[nn.Module]:
    """Make a class of modules that read generated weights; the last base is the user's."""
    kind = bases[-1]
    members = names_of(kind)
    for name in {name for base in kind.__mro__ for name in vars(base)}:
        found = inspect.getattr_static(kind, name)
        if _is_method(name, found):
            members[name] = _call_of(found, is_forward=name == "forward")
    members["__call__"] = _call_of(kind.__call__, is_forward=True)
    members.update({weight: _read_of(weight) for weight in weights})
    if issubclass(kind, nn.RNNBase):
        members |= _RECURRENT
    return type(kind.__name__, bases, members)


def names_of(kind: type) -> dict[str, Any]:
    """What a class derived from ``kind`` is called: the same, for code that looks at names."""
    return {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}


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
    reader = vars(self).get(_READER)
    weights: dict[str, Any] = {}
    if reader is not None:
        # torch.compile does not look into recurrent modules: all at once, it makes one graph.
        empty = [n for n, own in self._parameters.items() if own is None and n in reader.site_of]
        sites = [reader.site_of[name] for name in empty]
        weights = dict(zip(empty, reader.live.read_all(sites), strict=True))
    names = self._flat_weights_names
    return [weights[n] if n in weights else getattr(self, n, None) for n in names]


def _do_nothing(self: nn.RNNBase, *_: Any) -> None:
    """Take the place of what keeps the weights of a recurrent module in a list."""


_RECURRENT: Mapping[str, Any] = {
    "_flat_weights": property(_read_flat, _do_nothing),
    "_update_flat_weights": _do_nothing,
    "flatten_parameters": _do_nothing,
}
