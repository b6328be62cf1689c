"""What an op rule is, and what all of them need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import fx, nn


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a module stays a call, for the user to read."""

    reason: str


class Rule(Protocol):
    """Write the call of a module as a function of its weights."""

    def __call__(
        self, graph: fx.Graph, call: fx.Node, module: Any, read: Callable[[str], fx.Node | None]
    ) -> fx.Node | Refusal:
        """Insert the nodes that do what ``call`` does, before it.

        Args:
            graph: it is inserted into, at the insertion point that is set.
            call: the ``call_module`` node.
            module: the module that it calls, of exactly the class that the rule is for.
            read: name of one of its parameters -> a new node that reads it, None if it has none.

        Returns:
            The node that takes the place of ``call``, or why it must stay.
        """


def only_input(call: fx.Node) -> Any:
    """The one argument of a call such as ``linear(input)``, given by position or by name."""
    return call.args[0] if call.args else call.kwargs["input"]


def own_hooks(module: nn.Module) -> str:
    """Name the first kind of hook that is registered on ``module``; empty if there is none."""
    for kind in ("forward_pre", "forward", "backward_pre", "backward"):
        if getattr(module, f"_{kind}_hooks"):
            return f"{kind} hook"
    return ""
