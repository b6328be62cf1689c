"""The context managers of torch's that the code which is being traced is in."""

from __future__ import annotations

from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import fx

from npas_fx.passes.contexts import ambient_state, leave, write_enter
from npas_fx.passes.raising_branches import is_with


class Entered:
    """Records what code enters and leaves, so that a graph does the same.

    Args:
        create: adds an operation with its arguments to the graph.
    """

    def __init__(self, create: Callable[[Callable[..., Any], tuple[Any, ...]], fx.Node]) -> None:
        self._create = create
        self._state: tuple[Any, ...] = ()  # of gradients and autocast, as the graph has it
        self._contexts: list[tuple[Any, fx.Node | None, FrameType | None]] = []

    def begin(self) -> None:
        """Take what is switched on now for what the caller of the model has."""
        self._state = ambient_state()

    def __len__(self) -> int:
        return len(self._contexts)

    def enter(self, context: Any, frame: FrameType) -> None:
        """Record that code has entered a context manager, in a frame."""
        operation, node = write_enter(context, self._state[0]), None
        if operation is not None and self._have_operations():
            self._state = ambient_state()
            node = self._create(*operation)
        self._contexts.append((context, node, frame if is_with(frame) else None))

    def leave(self, context: Any) -> None:
        """Record that code has left it."""
        if self._contexts and self._contexts[-1][0] is context:
            _, node, _ = self._contexts.pop()
            if node is not None:
                self._state = ambient_state()
                self._create(leave, (node,))

    def are_recorded(self) -> bool:
        """Whether a graph has all that is switched now."""
        return self._have_operations() and self._state == ambient_state()

    def includes(self, kinds: tuple[type, ...]) -> bool:
        """Whether code is in a context manager of one of these classes."""
        return any(issubclass(type(context), kinds) for context, _, _ in self._contexts)

    def nodes(self) -> list[fx.Node]:
        """The operations that have entered what code is in."""
        return [node for _, node, _ in self._contexts if node is not None]

    def frames(self) -> list[FrameType | None]:
        """Where code has entered them by ``with``; None where it has otherwise."""
        return [frame for _, _, frame in self._contexts]

    def note(self) -> Callable[[], None]:
        """Note where code is; what is returned takes back what comes after."""
        number, state = len(self._contexts), self._state

        def put_back() -> None:
            del self._contexts[number:]
            self._state = state

        return put_back

    def _have_operations(self) -> bool:
        return all(node is not None for _, node, _ in self._contexts)
