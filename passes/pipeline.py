"""The order of all passes, from the captured graph to the one that is emitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from npas_fx.passes.generate_weights import generate_weights


def rewrite(graph: fx.Graph, sites_of: Mapping[str, Sequence[str]]) -> fx.Graph:
    """Run all passes.

    Args:
        graph: as captured.
        sites_of: bank path -> the site names that it generates, in the bank's order.
    """
    return generate_weights(graph, sites_of)
