"""One call of a module while it is traced: its steps, and the training flags behind them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx


class Frame:
    """One call of a module while it is traced: numbers for the values that its code sees.

    Args:
        arguments: the traced values among the arguments of the call.
        steps: the steps of the module's code, which are added to.
        asked: paths of the modules whose flag the calls around this one have read.
    """

    def __init__(
        self, arguments: Iterable[fx.Node], steps: list[Any], asked: Iterable[str]
    ) -> None:
        self.steps = steps
        self.asked = set(asked)
        self.tokens: dict[fx.Node, Any] = {}
        for argument in arguments:
            self.tokens.setdefault(argument, ("argument", len(self.tokens)))
        steps.append("called")

    def add(self, node: fx.Node) -> None:
        """Note an operation of the module's own code."""
        if node.op == "get_attr":
            return  # read once, wherever it comes first
        self.steps.append((node.op, node.target, self.shape(node.args), self.shape(node.kwargs)))
        self.tokens[node] = ("step", len(self.steps))

    def shape(self, value: Any) -> Any:
        """Describe arguments without constants."""
        if isinstance(value, fx.Node):
            token = value.target if value.op == "get_attr" else self.tokens.get(value, "result")
            return ("node", token)
        if isinstance(value, (tuple, list)):
            return (type(value), *map(self.shape, value))
        if isinstance(value, Mapping):
            return tuple((key, self.shape(item)) for key, item in value.items())
        if isinstance(value, slice):
            return ("slice", *map(self.shape, (value.start, value.stop, value.step)))
        return "constant" if isinstance(value, (bool, int, float)) else repr(value)
