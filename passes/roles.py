"""What the graph, not the name, says a weight does, and how deep in the network it does it."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import fx
from torch.nn import functional

_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_CONVS = {functional.conv1d, functional.conv2d, functional.conv3d}


def is_question(node: fx.Node) -> bool:
    """Whether an operation asks a tensor for its device or alike, and uses none of its values."""
    return node.target is getattr and node.args[1] in ("device", "dtype", "shape", "is_cuda")


def find_kind(reads: Sequence[fx.Node]) -> str:
    """Name the operation that reads a weight: ``linear``, ``conv``, ``embedding`` or ``raw``."""
    targets = [user.target for read in reads for user in read.users if user.op == "call_function"]
    if functional.embedding in targets:
        return "embedding"
    if functional.linear in targets:
        return "linear"
    return "conv" if _CONVS.intersection(targets) else "raw"


def find_roles(
    graph: fx.Graph,
    reads_of: Mapping[str, Sequence[fx.Node]],
    shape_of: Mapping[str, Sequence[int]],
) -> dict[str, tuple[str, float]]:
    """Find the role and the depth of each weight.

    Roles: ``embedding``; ``depthwise`` (a convolution with one input channel a group); ``stem``
    and ``head`` (no other weight before, or behind); ``residual_writer`` (what it makes is added to
    the residual stream), ``shortcut`` (the shorter of two branches that are added);
    ``parallel_projection`` (others read the same value: q, k, v); ``residual_reader``; ``other``.

    Args:
        graph: in which every weight is read by a ``get_attr`` node.
        reads_of: name of the weight -> the nodes that read it.
        shape_of: name of the weight -> its shape.

    Returns:
        Name of the weight -> its role, and its depth from 0 to 1 along the longest path.
    """
    return _Roles(graph, reads_of).find(shape_of)


class _Roles:
    def __init__(self, graph: fx.Graph, reads_of: Mapping[str, Sequence[fx.Node]]) -> None:
        read = {node: name for name, nodes in reads_of.items() for node in nodes}
        self.applied: dict[fx.Node, list[str]] = {}  # operation -> weights that it applies
        self.operations: dict[str, list[fx.Node]] = {name: [] for name in reads_of}
        constant: dict[fx.Node, list[str]] = {}  # no input of the model takes part -> its weights
        self.before: dict[fx.Node, int] = {}  # operations that apply a weight, as a bit set
        self.depth: dict[fx.Node, int] = {}
        self.bit: dict[fx.Node, int] = {}
        for node in graph.nodes:
            sources = node.all_input_nodes
            weights = [name for source in sources for name in constant.get(source, [])]
            if node.op == "get_attr" or (sources and all(s in constant for s in sources)):
                weights = [] if is_question(node) else weights
                constant[node] = weights + ([read[node]] if node in read else [])
                continue
            self.before[node] = self.depth[node] = 0
            for source in sources:
                self.before[node] |= self.before.get(source, 0)
                self.depth[node] = max(self.depth[node], self.depth.get(source, 0))
            if weights and node.op != "output":
                self.applied[node] = weights
                self.bit[node] = 1 << len(self.bit)
                self.before[node] |= self.bit[node]
                self.depth[node] += 1
                for name in weights:
                    self.operations[name].append(node)
        self.has_successor = 0
        for node, bit in self.bit.items():
            self.has_successor |= self.before[node] & ~bit
        self.writers: dict[fx.Node, str] = {}
        self.streams: set[fx.Node] = set()
        for node in graph.nodes:
            if node.target in _ADD and len(node.all_input_nodes) == 2 and node in self.depth:
                self._note_sum(node, *node.all_input_nodes)

    def _note_sum(self, node: fx.Node, left: fx.Node, right: fx.Node) -> None:
        if left not in self.depth or right not in self.depth:
            return
        for branch, other in ((left, right), (right, left)):
            last = self._last_operation(branch)
            if last is None or self.before[other] & self.bit[last]:
                continue  # the other branch starts from it: this one is the stream itself
            is_longer = self.depth[branch] >= self.depth[other]
            self.writers.setdefault(last, "residual_writer" if is_longer else "shortcut")
            self.streams.add(node)
            if not self.before[other] & ~self.before[branch]:  # the branch starts from it
                self._note_stream(other)

    def _note_stream(self, node: fx.Node) -> None:
        """Note a value and those that it was made from without weights, back to a weight's."""
        sources = [node]
        while len(sources) == 1:
            self.streams.add(sources[0])
            if sources[0] in self.applied:
                return
            sources = [source for source in sources[0].all_input_nodes if source in self.depth]

    def _last_operation(self, node: fx.Node) -> fx.Node | None:
        """Walk back from a value through norms, activations and alike to the last weight."""
        while node not in self.applied:
            sources = [source for source in node.all_input_nodes if source in self.depth]
            if len(sources) != 1:
                return None
            node = sources[0]
        return node

    def _reads_stream(self, node: fx.Node) -> bool:
        sources = [source for source in node.all_input_nodes if source in self.depth]
        while len(sources) == 1:
            if sources[0] in self.streams:
                return True
            if sources[0] in self.applied:
                return False
            sources = [source for source in sources[0].all_input_nodes if source in self.depth]
        return False

    def find(self, shape_of: Mapping[str, Sequence[int]]) -> dict[str, tuple[str, float]]:
        deepest = max(self.depth.values(), default=1)
        readers = Counter(node.all_input_nodes[0] for node in self.applied)
        found = {}
        for name, operations in self.operations.items():
            # Deepest and shallowest use alike say where a weight that is used often is.
            depths = [(self.depth[node] - 1) / max(deepest - 1, 1) for node in operations]
            depth = sum(depths) / len(depths) if depths else 0.0
            found[name] = self._role(operations, shape_of[name], readers), depth
        return found

    def _role(
        self, operations: Sequence[fx.Node], shape: Sequence[int], readers: Counter[fx.Node]
    ) -> str:
        if not operations:
            return "other"
        if any(node.target is functional.embedding for node in operations):
            return "embedding"
        node = operations[0]
        if node.target in _CONVS and shape[1] == 1 and _groups(node) > 1:
            return "depthwise"
        if all(self.before[node] == self.bit[node] for node in operations):
            return "stem"
        if not any(self.bit[node] & self.has_successor for node in operations):
            return "head"
        if node in self.writers:
            return self.writers[node]
        if readers[node.all_input_nodes[0]] > 1:
            return "parallel_projection"
        return "residual_reader" if self._reads_stream(node) else "other"


def _groups(node: fx.Node) -> int:
    groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    return groups if isinstance(groups, int) else 1
