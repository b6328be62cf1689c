"""``nn.Embedding`` and ``nn.EmbeddingBag`` as ``embedding[_bag](input, weight, …)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.nn import functional

from npas_fx.passes.op_rules.rule import Refusal, only_input
from npas_fx.passes.opaque import why_plain


def lower_embedding(
    graph: fx.Graph, call: fx.Node, module: nn.Embedding, read: Callable[[str], fx.Node | None]
) -> fx.Node | Refusal:
    """Write ``y = embedding(ids)`` with its weight as a node."""
    if why := why_plain(module):
        return Refusal(why)
    options: dict[str, Any] = {
        "padding_idx": module.padding_idx,
        "scale_grad_by_freq": module.scale_grad_by_freq,
    }
    return graph.call_function(functional.embedding, (only_input(call), read("weight")), options)


def lower_embedding_bag(
    graph: fx.Graph, call: fx.Node, module: nn.EmbeddingBag, read: Callable[[str], fx.Node | None]
) -> fx.Node | Refusal:
    """Write ``y = bag(ids, offsets, per_sample_weights)`` with its weight as a node."""
    if why := why_plain(module):
        return Refusal(why)
    names = ("input", "offsets", "per_sample_weights")
    options: dict[str, Any] = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    args = (options.pop("input"), read("weight"))
    options |= {
        "mode": module.mode,
        "scale_grad_by_freq": module.scale_grad_by_freq,
        "include_last_offset": module.include_last_offset,
        "padding_idx": module.padding_idx,
    }
    return graph.call_function(functional.embedding_bag, args, options)
