"""Live weights: generated when they are read, in one call only once."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from npas_fx.banks import Bank
from npas_fx.errors import GuardError
from npas_fx.passes.opaque import without_checkpoints


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
        return self.read_all([site])[0]

    def read_all(self, sites: Sequence[str]) -> list[Tensor]:
        """Read the weights of several sites; ``torch.compile`` can make one graph of that."""
        call = self._here.call
        weights: list[Tensor] = []
        for site in sites:
            name, place = self.place_of[site]
            if call is None:
                weights.append(self.banks[name]()[place])
                continue
            made = call.made.get(name)
            if made is None or made.is_stale():
                bank = self.banks[name]
                assert isinstance(bank, Bank)
                with torch.set_grad_enabled(call.has_grad or torch.is_grad_enabled()):
                    made = call.made[name] = _Made(bank)
            weights.append(made.weights[place])
        return weights

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

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # see _Made
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
    def __init__(self) -> None:
        # Set, not a default of the class: torch.compile guards which attributes there are.
        self.call: _Call | None = None  # the outermost one that this thread is in


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

    # What keeps the books runs between the graphs of a call that torch.compile has had to break.
    # It would compile it, with a graph and a recompilation for each tensor that is looked at.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _look(self) -> None:
        self.state = _state_of(self.bank)
        self.versions = [_version_of(weight) for weight in self.weights]
        # Nothing that the hook holds may lead back to the weights: no collector sees that cycle.
        spend = functools.partial(_note, self.spent)
        for weight in self.weights:
            if weight.grad_fn is not None:
                weight.register_hook(spend)  # type: ignore[no-untyped-call]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
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
