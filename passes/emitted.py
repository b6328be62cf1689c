"""Emitted modules, and what they know about themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from npas_fx.errors import NPASError
from npas_fx.ir import Plan
from npas_fx.passes.capture import Capture
from npas_fx.passes.closures import deepcopy_with_closures

_STATE = "_npas_fx"


@dataclass(frozen=True, slots=True, kw_only=True)
class EmitOptions:
    """How a module is emitted.

    Attributes:
        emit: ``"graph"``, or ``"module"`` for the user's own class over the banks.
        on_guard: of a graph, what it does where it was not captured for a call: ``"error"``, or
            ``"fallback"`` to the code of the user's class.
        calls: paths of modules that are called whatever could be traced of them; the root (``""``)
            for the model's own ``forward``.
    """

    emit: str = "graph"
    on_guard: str = "error"
    calls: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, values in (("emit", ("graph", "module")), ("on_guard", ("error", "fallback"))):
            if getattr(self, name) not in values:
                known = ", ".join(map(repr, values))
                raise NPASError(f"{name}={getattr(self, name)!r} is not known; there are {known}")

    @property
    def keeps_code(self) -> bool:
        """Whether the code of the user's class may run on generated weights."""
        return self.emit == "module" or self.on_guard == "fallback"


@dataclass(frozen=True, slots=True, kw_only=True)
class Emission:
    """What an emitted module knows about itself; shared by its copies.

    Attributes:
        plan: which banks it has.
        capture: what it was made from.
        banks: name of the submodule that holds the banks.
        bank_of: name of a shared site -> its bank's name in there and its place in the bank.
        options: how it was emitted.
    """

    plan: Plan
    capture: Capture
    banks: str
    bank_of: Mapping[str, tuple[str, int]]
    options: EmitOptions

    def __deepcopy__(self, memo: dict[int, Any]) -> Emission:
        return self


class EmittedModule(nn.Module):
    """A module made by ``npas_fx.apply``; each has a class of its own, with its own ``forward``.

    It owns the kept parameters, buffers and modules under the names that they had, and the banks
    under one more name. ``plan`` is its plan, unless the model has an attribute of that name.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep the class out of registries that the user's classes may have."""

    def train(self, mode: bool = True) -> EmittedModule:
        """Set the mode as the model's own ``train`` would, which may keep parts frozen."""
        super().train(mode)
        captured = emission_of(self).capture
        skeleton = captured.skeleton
        skeleton.train(mode)
        own = dict(self.named_parameters(remove_duplicate=False))
        frozen = {item.name for item in captured.inventory.kept if not item.is_trainable}
        for name, parameter in skeleton.named_parameters():
            if name in own and parameter.requires_grad == (name in frozen):
                own[name].requires_grad_(parameter.requires_grad)
        flags = {path: module.training for path, module in skeleton.named_modules()}
        for path, module in self.named_modules():
            if path in flags:
                module.training = flags[path]
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> EmittedModule:
        """Copy all tensors; plan and graph are shared."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(deepcopy_with_closures(vars(self), self, memo))
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled, with the way to do it."""
        raise TypeError(
            "an emitted module has code of its own and cannot be pickled; use npas_fx.save(shared, "
            "folder), or keep its plan and its state_dict()"
        )


def emission_of(module: EmittedModule) -> Emission:
    """What an emitted module knows about itself."""
    emission: Emission = vars(module)[_STATE]
    return emission


def note_emission(module: EmittedModule, emission: Emission) -> None:
    """Let a module know about itself."""
    vars(module)[_STATE] = emission
    if not hasattr(module, "plan"):
        vars(module)["plan"] = emission.plan
