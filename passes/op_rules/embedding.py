"""``nn.Embedding`` as ``embedding(input, weight, …)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.nn import functional

from npas_fx.passes.op_rules.rule import Refusal, only_input


def lower_embedding(
    graph: fx.Graph, call: fx.Node, module: nn.Embedding, read: Callable[[str], fx.Node | None]
) -> fx.Node | Refusal:
    """Write ``y = embedding(ids)`` with its weight as a node."""
    if module.max_norm is not None:
        return Refusal("embedding with max_norm, which rewrites its weight in place")
    if module.sparse:
        return Refusal("embedding with sparse gradients")
    options: dict[str, Any] = {
        "padding_idx": module.padding_idx,
        "scale_grad_by_freq": module.scale_grad_by_freq,
    }
    return graph.call_function(functional.embedding, (only_input(call), read("weight")), options)
