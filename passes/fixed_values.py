"""Fixed values: data that is made of sizes, constants and buffers that no call updates."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from npas_fx.passes.purity import can_be_fixed
from npas_fx.passes.rollback import RandomState


class FixedValues:
    """The data of those nodes of one trace that no input's data, weight or random number is in.

    Args:
        names: of all buffers.
        read_buffers: gives those that no call updates, by name; may take long.
        known: node -> what it is known to have in each probe, without data.
        of_data: nodes whose value or shape may depend on data all the same.
        run_node: computes a node in a probe, given what reads its arguments.
    """

    def __init__(
        self,
        names: Collection[str],
        read_buffers: Callable[[], Mapping[str, Tensor]],
        known: Mapping[fx.Node, Mapping[int, Any] | None],
        of_data: set[fx.Node],
        run_node: Callable[[fx.Node, int, Callable[[fx.Node], Any]], Any],
    ) -> None:
        self._names = names
        self._read_buffers = read_buffers
        self._known = known
        self._of_data = of_data
        self._run_node = run_node

    @torch.no_grad()
    def of(self, node: fx.Node, probe: int) -> Any:
        """The value of a node; only what it is made of is computed.

        Raises:
            LookupError: it is not fixed.
            Exception: whatever the operations raise.
        """
        values: dict[fx.Node, Any] = {}
        random = RandomState()
        try:
            for each in self._find_parts(node):
                if self._is_size(each):
                    values[each] = self._known[each][probe]  # type: ignore[index]
                elif each.op == "get_attr":
                    values[each] = self._read_buffers()[str(each.target)].clone()
                else:
                    values[each] = self._run_node(each, probe, values.__getitem__)
        finally:
            random.put_back()
        return values[node]

    def _find_parts(self, node: fx.Node) -> list[fx.Node]:
        """What a node is made of, itself last."""
        found: set[fx.Node] = set()
        waiting = [node]
        while waiting:
            each = waiting.pop()
            if each in found:
                continue
            found.add(each)
            if not self._is_size(each):
                is_weight = each.op == "get_attr" and each.target not in self._names
                if is_weight or not can_be_fixed(each):
                    raise LookupError(f"{node} is not fixed, for {each} is not")
                waiting += each.all_input_nodes
        return [each for each in node.graph.nodes if each in found]

    def _is_size(self, node: fx.Node) -> bool:
        """Whether a value is a number or alike, and known without data."""
        known = self._known.get(node)
        leaves = pytree.tree_leaves(list(known.values())) if known else []
        return (
            bool(known)
            and node not in self._of_data
            and not any(isinstance(leaf, Tensor) for leaf in leaves)
        )
