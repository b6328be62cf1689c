"""Replace the reads of shared weights by calls of the banks that generate them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from operator import getitem

from torch import fx


def generate_weights(graph: fx.Graph, sites_of: Mapping[str, Sequence[str]]) -> fx.Graph:
    """Replace all reads of shared weights by one call for each bank.

    Before ``w = get_attr[fc.weight]``; after ``b = call_module[bank]()``, ``w = b[0]``.

    Args:
        graph: in which every weight is read by ``get_attr``; it is not changed.
        sites_of: bank path -> the site names that it generates, in the bank's order.

    A site may be read in the graph of another mode only.
    """
    graph = copy.deepcopy(graph)
    reads: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            reads.setdefault(node.target, []).append(node)
    body = next(node for node in graph.nodes if node.op != "placeholder")
    replaced: list[fx.Node] = []
    for bank, sites in sites_of.items():
        read = [(k, site) for k, site in enumerate(sites) if site in reads]
        if not read:
            continue
        with graph.inserting_before(body):
            weights = graph.call_module(bank)
            items = [graph.call_function(getitem, (weights, k)) for k, _ in read]
        for (_, site), weight in zip(read, items, strict=True):
            weight.meta = dict(reads[site][0].meta)
            for node in reads[site]:
                node.replace_all_uses_with(weight)
            replaced += reads[site]
    for node in replaced:  # last: `body` may be one of them
        graph.erase_node(node)
    graph.lint()
    return graph
