"""Questions that code asks of traced values, answered by the probes and guarded in the graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, MutableSequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from npas_fx.passes.call_state import CHANGING
from npas_fx.passes.contexts import OpenContexts
from npas_fx.passes.guards import OF_DATA, QUESTIONS, check_guard, describe, user_line
from npas_fx.passes.node_values import RESHAPING, Values
from npas_fx.passes.probes import Call, Probes
from npas_fx.passes.purity import IN_PLACE_FUNCTIONS
from npas_fx.passes.value_types import takes_part

if TYPE_CHECKING:
    from npas_fx.passes.proxy import CapturedProxy

UNKNOWN: Any = object()
# What is asked of a value that depends on data, and yet does not.
_OF_STRUCTURE = ("is None", "len", "type", "keys", "has key", "has attribute")
_DESCRIBED = {
    **{"len": "len({})", "is None": "({} is None)", "type": "type({})"},
    **{"keys": "the keys of {}", "has key": "({1!r} in {0})"},
    "has attribute": "hasattr({}, {!r})",
}
_FUNCTIONS = {*IN_PLACE_FUNCTIONS, operator.setitem}
_METHODS = CHANGING | {"sort", "reverse"}
_ANSWERS = (bool, int, float, str, tuple, torch.dtype, torch.device, torch.layout, type(None))


class Questions:
    """Answers what the code of one trace asks.

    Args:
        probes: of the model; without them nothing is known.
        call: runs a module on inputs by name.
    """

    def __init__(self, probes: Probes | None, call: Call) -> None:
        self.is_asking = False  # code of the model may run for an answer, and not for the graph
        self._probes = probes
        self._call = call
        self._contexts = OpenContexts()
        self._values = None if probes is None else Values(probes, self._run, call, self._contexts)
        self._varying: set[fx.Node] = set()  # nodes that depend on an input of the model
        self._changing: set[fx.Node] = set()  # nodes that change a shape or a container
        self._guards: set[tuple[fx.Node, str, str]] = set()

    def note(self, node: fx.Node, entered: list[fx.Node]) -> None:
        """Note a node that was added, and which nodes have entered the contexts that it is in."""
        self._contexts.note(node, entered)
        if node.op == "placeholder" or not self._varying.isdisjoint(node.all_input_nodes):
            self._varying.add(node)
        if self._values is not None and (
            node.target in RESHAPING or self._may_change_container(node)
        ):
            self._changing.add(node)
            self._guards.clear()  # the same question may have another answer from here on
            self._values.keeps_order = True

    def _may_change_container(self, node: fx.Node) -> bool:
        """Whether a node may change a dict or a list, of the inputs or that a module has given."""
        if node.op == "call_module":
            return any(self._is_container(each, "placeholder") for each in node.all_input_nodes)
        is_change = node.target in (_METHODS if node.op == "call_method" else _FUNCTIONS)
        return is_change and self._is_container(
            node.all_input_nodes[0], "placeholder", "call_module"
        )

    def _is_container(self, node: fx.Node, *made_by: str) -> bool:
        source = node
        while takes_part(source) and source.all_input_nodes:
            source = source.all_input_nodes[0]
        values = self.values_of(node) if source.op in made_by else None
        return any(isinstance(value, (Mapping, MutableSequence)) for value in values or ())

    def forget(self, nodes: set[fx.Node]) -> None:
        """Forget nodes that were taken back."""
        self._varying -= nodes
        if self._values is not None:
            self._values.real.forget()
        self._guards = {guard for guard in self._guards if guard[0] not in nodes}
        if self._probes is not None and not self._changing.isdisjoint(nodes):
            self._changing -= nodes
            self._values = Values(self._probes, self._run, self._call, self._contexts)
            self._values.keeps_order = True

    def values_of(self, node: fx.Node) -> list[Any] | None:
        """Values of a node in the probes; None where they are not known."""
        return None if self._values is None else self._values.of(node)

    def depends_on_data(self, node: fx.Node) -> bool:
        """Whether a value is known from real data only, of which others may give another one."""
        return self._values is not None and node in self._values.of_data

    def is_fixed(self, node: fx.Node) -> bool:
        """Whether the data of a value are known: it is made of sizes, constants and buffers."""
        if self._values is None or self._values.of(node) is None:
            return False
        return self._values.fixed_of(node) is not None

    def may_vary(self, node: fx.Node) -> bool:
        """Whether another call may have another value here."""
        return node in self._varying or self.depends_on_data(node)

    def _is_of_fixed(self, node: fx.Node) -> bool:
        return self._values is not None and node in self._values.of_fixed

    def ask(self, proxy: CapturedProxy, question: str, *about: Any) -> Any:
        """Answer a question about a value if all probes agree, with a guard where it may vary.

        Args:
            proxy: the value.
            question: one of ``QUESTIONS``.
            about: what it names, such as a key.

        Returns:
            The answer; ``UNKNOWN`` if the probes cannot tell, or differ.
        """
        node = proxy.node
        values = self.values_of(node)
        if values is None:
            return UNKNOWN
        if self.depends_on_data(node) and (
            question not in _OF_STRUCTURE or any(isinstance(value, Tensor) for value in values)
        ):
            return UNKNOWN  # another batch of data may have another answer
        is_of_data = question in OF_DATA and any(isinstance(value, Tensor) for value in values)
        if is_of_data:
            values = self._values.fixed_of(node) if self._values is not None else None
            if values is None:
                return UNKNOWN
        try:
            answers = [self._run(partial(QUESTIONS[question], value, *about)) for value in values]
        except Exception:  # of a tensor, whose values are not known; or the user's own mistake
            return UNKNOWN
        first = answers[0]
        if not isinstance(first, _ANSWERS) or not all(
            type(answer) is type(first) and answer == first for answer in answers
        ):
            return UNKNOWN
        guard = (node, question, repr((first, *about)))
        may_vary = is_of_data or node in self._varying or self._is_of_fixed(node)
        if may_vary and guard not in self._guards:
            self._guards.add(guard)
            what = _DESCRIBED.get(question, "{}").format(describe(node), *about)
            args = (proxy, question, first, what, user_line(), *about)
            proxy.tracer.create_proxy("call_function", check_guard, args, {})
        return first

    def _run(self, function: Callable[[], Any]) -> Any:
        before, self.is_asking = self.is_asking, True
        try:
            return function()
        finally:
            self.is_asking = before
