"""What the graph, not the name, says a weight does, and how deep in the network it does it."""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import networkx as nx
import torch
from torch import fx

from npas_fx.passes.flow import KINDS, Flow
from npas_fx.passes.op_rules.attention import attention
from npas_fx.passes.opaque import call_opaque

_SUMS: set[Any] = {operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub}
_SUMS |= {"add", "add_", "sub", "sub_"}
_CATS: set[Any] = {torch.cat, torch.concat, torch.concatenate}
SEVERAL = (call_opaque, attention)  # operations that may apply several weights
_ORDER = ("embedding", "linear", "conv", "attention projection", "recurrent", "raw")
_PRODUCTS: set[Any] = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The part that a weight plays.

    Attributes:
        kind: the operation that applies it: ``linear``, ``conv``, ``embedding``, ``attention
            projection``, ``recurrent``, or ``raw`` for any other.
        role: the first of these that fits one of its uses:

            - ``embedding``: a table that is looked up, or added or joined to values as it is;
            - ``depthwise``: a convolution with one input channel a group;
            - ``stem``, ``head``: no other weight before it, or behind it;
            - ``residual_writer``: what it makes is added to the residual stream, or becomes it;
            - ``shortcut``: the one weight of the shorter of two branches that are added;
            - ``parallel_projection``: several weights, or parts of one, project the same value and
              come together again before another weight (query, key and value; gate and up);
            - ``residual_reader``: it reads the residual stream;
            - ``other``.

            The residual stream is what a branch that starts from a value is added or joined to:
            that value, and the result.
        depth: 0 at the input, 1 at the output, along the longest path; the mean over its uses.
    """

    kind: str
    role: str
    depth: float


def find_parts(
    graph: fx.Graph,
    reads_of: Mapping[str, Sequence[fx.Node]],
    shape_of: Mapping[str, Sequence[int]],
    kind_of: Mapping[str, str] | None = None,
) -> dict[str, Part]:
    """Find the part that each weight plays.

    Args:
        graph: in which every weight is read by a ``get_attr`` node.
        reads_of: name of the weight -> the nodes that read it.
        shape_of: name of the weight -> its shape.
        kind_of: name of the weight -> what the module that owns it applies it as, for weights that
            an opaque call applies.

    Returns:
        Name of the weight -> its part, without those that are vectors in all but their shape:
        scales, class tokens and alike.
    """
    flow = Flow(graph, reads_of)
    kinds = {name: _kind(flow, name, (kind_of or {}).get(name)) for name in reads_of}
    vectors = {name for name in reads_of if _is_vector(shape_of[name], reads_of[name], kinds[name])}
    tables = {name for name in reads_of if kinds[name] == "raw" and _is_table(flow, name)}
    applied = {node for node, weights in flow.weights_of.items() if set(weights) - tables - vectors}
    structure = _Structure(flow, applied)
    deepest = max(structure.depth.values(), default=1)

    def depth_of(name: str) -> float:
        # A table is no step of its own: it is where the sum is that it goes into.
        steps = [
            structure.depth[use] - structure.num_steps(use) + _place(flow, use, name)
            for use in flow.uses_of[name]
        ]
        return min(sum(steps) / max(len(steps), 1) / max(deepest - 1, 1), 1.0)

    return {
        name: Part(
            kind=kinds[name],
            role="embedding"
            if name in tables or kinds[name] == "embedding"
            else structure.role(flow.uses_of[name], shape_of[name]),
            depth=depth_of(name),
        )
        for name in reads_of
        if name not in vectors
    }


def _kind(flow: Flow, name: str, of_owner: str | None) -> str:
    kinds = {
        of_owner if of_owner and node.target in SEVERAL else KINDS.get(node.target, "raw")
        for node in flow.uses_of[name]
    }
    return min(kinds, key=_ORDER.index, default="raw")


def _place(flow: Flow, use: fx.Node, name: str) -> int:
    """Place of a weight among those that an operation applies."""
    return flow.weights_of[use].index(name) if use.target in SEVERAL else 0


def _is_vector(shape: Sequence[int], reads: Sequence[fx.Node], kind: str) -> bool:
    """Whether one dimension at most is larger than 1, and no layer is made of it as it is."""
    users = [user.target for read in reads for user in read.users]
    is_layer = any(target in KINDS for target in users) or (call_opaque in users and kind != "raw")
    return math.prod(shape) == max(shape, default=1) and not is_layer


def _is_table(flow: Flow, name: str) -> bool:
    uses = flow.uses_of[name]
    is_added = bool(uses) and all(node.target in _SUMS | _CATS for node in uses)
    return is_added or name in flow.looked_up


class _Structure:
    """Which values a residual stream is made of, and which operations read and write it.

    Sets of operations are bit sets (a network has thousands, and each value needs the set of those
    before it): bit ``k`` stands for the ``k``-th *event*, an operation that applies a weight or a
    *join*, where a branch comes back to the value that it started from.
    """

    def __init__(self, flow: Flow, applied: set[fx.Node]) -> None:
        self.flow = flow
        self.applied = applied.intersection(flow.graph)  # operations that apply a weight
        self.depth: dict[fx.Node, int] = {}  # operations on the longest path here, with its own
        self.events: list[fx.Node] = []
        self.bit: dict[fx.Node, int] = {}
        self.before: dict[fx.Node, int] = {}  # operations before a value
        self.last: dict[fx.Node, int] = {}  # events before it with no other event in between
        self.writers = self.shortcuts = self.parallel = self.in_branch = self.stream = 0
        started_from: list[fx.Node] = []  # the values that branches start from
        for node in flow.graph:
            values = flow.values(node)
            self.before[node] = _union(self.before[value] for value in values)
            self.last[node] = _union(self.last[value] for value in _ungated(values, node, self))
            self.depth[node] = max((self.depth[value] for value in values), default=0)
            if node in self.applied:
                self._add_event(node)
                self.before[node] |= self.bit[node]
                self.depth[node] += self.num_steps(node)
            elif len(values) > 1:
                started = self._join(node, values)
                if started is None:
                    self._note_meeting(node, values)
                else:
                    started_from += started
                    self._add_event(node)
                    self.stream |= self.bit[node]
        for value in started_from:
            trunk = self.last[value] & ~self.in_branch
            self.stream |= trunk
            self.writers |= trunk
        self.has_successor = _union(map(self._earlier, self.applied))
        self._note_split_projections()

    def num_steps(self, node: fx.Node) -> int:
        """Count the weights that an operation applies, one after the other for all we know."""
        if node not in self.applied:
            return 0
        return len(self.flow.weights_of[node]) if node.target in SEVERAL else 1

    def _add_event(self, node: fx.Node) -> None:
        self.bit[node] = self.last[node] = 1 << len(self.events)
        self.events.append(node)

    def _join(self, node: fx.Node, values: Sequence[fx.Node]) -> list[fx.Node] | None:
        """Note what comes together; give the values that branches started from, None if none."""
        if not self.flow.from_input.issuperset(values):
            return None  # positions that are added, or alike
        if node.target in _SUMS and len(values) == 2:
            left, right = values
            own = self.before[left] & ~self.before[right], self.before[right] & ~self.before[left]
            if all(own):
                return self._note_branches(values, own)
            branches = {
                value: only
                for value, other, only in zip(values, reversed(values), own, strict=True)
                if only and (self.before[other] or self.is_made_from(value, other))
            }
        elif node.target in _CATS:
            branches = {}
            for value in values:
                before = self.before[value]
                earlier = [v for v in values if self.before[v] | before != self.before[v]]
                start = _union(self.before[other] for other in earlier)
                if earlier and start | before == before:
                    branches[value] = before & ~start
        else:
            return None
        if not branches:
            return None
        for value, only in branches.items():
            self.in_branch |= only
            self.writers |= self.last[value] & only
        return [value for value in values if value not in branches]

    def _note_branches(self, values: Sequence[fx.Node], own: Sequence[int]) -> list[fx.Node]:
        """Note two branches that are added; one with a single, shallower weight is a shortcut."""
        starts = [self._start_of(only) for only in own]
        self.stream |= starts[0] & starts[1]
        depths = [self.depth[value] for value in values]
        for value, only, depth in zip(values, own, depths, strict=True):
            self.in_branch |= only
            if only.bit_count() == 1 and depth < max(depths):
                self.shortcuts |= only
            else:
                self.writers |= self.last[value] & only
        return []

    def _start_of(self, branch: int) -> int:
        """Events that the first operations of a branch read."""
        return _union(map(self._given, self._first_in(branch)))

    def _first_in(self, branch: int) -> list[fx.Node]:
        return [node for node in self._events_in(branch) if not self._earlier(node) & branch]

    def is_made_from(self, value: fx.Node, source: fx.Node) -> bool:
        """Whether all that is done to make a value begins with another one.

        That the same operations are before both is not enough: what is before the angles of a
        rotary embedding is before the queries that they turn.
        """
        own = self.before[value] & ~self.before[source]
        if not own or self.before[source] & ~self.before[value]:
            return False
        return all(nx.has_path(self.flow.graph, source, node) for node in self._first_in(own))

    def _given(self, node: fx.Node) -> int:
        return _union(self.last[value] for value in self.flow.values(node))

    def _earlier(self, node: fx.Node) -> int:
        return self.before[node] & ~self.bit[node]

    def _note_meeting(self, node: fx.Node, values: Sequence[fx.Node]) -> None:
        """Note operations on one value, or on what norms and alike make of it, that meet here."""
        meeting = _union(self.last[value] for value in values)
        on: dict[object, int] = defaultdict(int)
        for event in self._events_in(meeting):
            if event in self.applied:
                on[self._given(event) or tuple(self.flow.values(event))] |= self.bit[event]
        for together in on.values():
            if together.bit_count() > 1:
                self.parallel |= together

    def _note_split_projections(self) -> None:
        """Note operations whose result is taken apart, and the parts come together again."""
        between = nx.subgraph_view(self.flow.graph, filter_node=lambda node: node not in self.bit)
        for operation in self.applied:
            node, parts = operation, []
            while True:
                users = list(self.flow.graph.successors(node))
                parts = [user for user in users if _is_piece(user)]
                if len(users) != 1 or users[0] in self.bit or self.flow.values(users[0]) != [node]:
                    break
                node = users[0]
            reached = [{part, *nx.descendants(between, part)} for part in parts if part in between]
            if any(not one.isdisjoint(other) for one, other in combinations(reached, 2)):
                self.parallel |= self.bit[operation]

    def _events_in(self, events: int) -> Iterator[fx.Node]:
        while events:
            yield self.events[(events & -events).bit_length() - 1]
            events &= events - 1

    def role(self, operations: Sequence[fx.Node], shape: Sequence[int]) -> str:
        """Find the role of a weight that is no table."""
        operations = [node for node in operations if node in self.applied]
        if any(self.num_steps(node) > 1 for node in operations):
            return "other"  # what its weights do is not seen
        mine = _union(self.bit[node] for node in operations)
        given = _union(map(self._given, operations))
        is_first = all(
            not self._earlier(node) and node in self.flow.from_input for node in operations
        )
        fits = {
            "depthwise": any(map(_is_grouped, operations)) and shape[1] == 1,
            "stem": is_first,
            "head": not mine & self.has_successor,
            "residual_writer": mine & self.writers,
            "shortcut": mine & self.shortcuts,
            "parallel_projection": mine & self.parallel,
            "residual_reader": given & self.stream,
        }
        return next((role for role, is_it in fits.items() if operations and is_it), "other")


def _union(sets: Iterable[int]) -> int:
    union = 0
    for each in sets:
        union |= each
    return union


def _ungated(values: Sequence[fx.Node], node: fx.Node, structure: _Structure) -> Sequence[fx.Node]:
    """Leave out a factor that was made from the other one: squeeze and excitation, or alike."""
    if node.target in _PRODUCTS and len(values) == 2:
        for gated, gate in (values, reversed(values)):
            if structure.is_made_from(gate, gated):
                return [gated]
    return values


def _is_piece(node: fx.Node) -> bool:
    return node.target in (operator.getitem, torch.narrow, "narrow", "select")


def _is_grouped(node: fx.Node) -> bool:
    groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    return KINDS.get(node.target) == "conv" and isinstance(groups, int) and groups > 1
