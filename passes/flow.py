"""How values flow through a graph, and which operation applies which weight."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx
import torch
from torch import fx
from torch.nn import functional

from npas_fx.passes.op_rules.attention import attention
from npas_fx.passes.op_rules.recurrent import recurrent
from npas_fx.passes.op_rules.recurrent_cell import recurrent_cell

KINDS: dict[Any, str] = {
    functional.embedding: "embedding",
    functional.embedding_bag: "embedding",
    functional.linear: "linear",
    functional.bilinear: "linear",
    functional.conv1d: "conv",
    functional.conv2d: "conv",
    functional.conv3d: "conv",
    functional.conv_transpose1d: "conv",
    functional.conv_transpose2d: "conv",
    functional.conv_transpose3d: "conv",
    recurrent: "recurrent",
    recurrent_cell: "recurrent",
    attention: "attention projection",
}
_QUESTIONS = ("device", "dtype", "shape", "ndim", "is_cuda")
_SHAPE_METHODS = ("size", "dim", "numel", "nelement", "ndimension", "stride")


def is_question(node: fx.Node) -> bool:
    """Whether an operation asks a tensor for its shape or alike, and uses none of its values."""
    if node.op == "call_method":
        return node.target in _SHAPE_METHODS
    return node.target is getattr and node.args[1] in _QUESTIONS


class Flow:
    """How values flow that depend on the inputs; and which operation applies which weight.

    Between a weight and the operation that applies it may be others, of constants alone: a view, a
    lookup of positions, a resized table.
    """

    def __init__(self, graph: fx.Graph, reads_of: Mapping[str, Sequence[fx.Node]]) -> None:
        self.graph: nx.DiGraph[fx.Node] = nx.DiGraph()
        self.weights_of: dict[fx.Node, list[str]] = {}
        self.uses_of: dict[str, list[fx.Node]] = {name: [] for name in reads_of}
        self.looked_up: set[str] = set()  # by indices, on the way to what applies them
        self.from_input: set[fx.Node] = set()
        read = {node: [name] for name, nodes in reads_of.items() for node in nodes}
        constant: dict[fx.Node, list[str]] = {}  # -> the weights in it
        for node in graph.nodes:
            sources = node.all_input_nodes
            weights = [name for source in sources for name in constant.get(source, [])]
            is_applied = weights and node.target in KINDS
            is_constant = node.op != "placeholder" and all(s in constant for s in sources)
            if is_question(node):
                constant[node] = []
            elif is_constant and not is_applied:
                constant[node] = [*weights, *read.get(node, [])]
                if node.target in (operator.getitem, torch.index_select) and len(sources) > 1:
                    self.looked_up.update(weights)
            elif node.op != "output":
                values = [source for source in sources if source not in constant]
                self.graph.add_node(node)
                self.graph.add_edges_from((value, node) for value in values)
                if node.op == "placeholder" or not self.from_input.isdisjoint(values):
                    self.from_input.add(node)
                if weights:
                    self.weights_of[node] = weights
                    for name in dict.fromkeys(weights):
                        self.uses_of[name].append(node)

    def values(self, node: fx.Node) -> list[fx.Node]:
        """What an operation is given, without constants."""
        return list(self.graph.predecessors(node)) if node in self.graph else []
