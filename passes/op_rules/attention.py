"""``nn.MultiheadAttention`` as a function of its inputs and weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional

from npas_fx.passes.op_rules.rule import Refusal

_ARGUMENTS = (
    *("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask"),
    *("average_attn_weights", "is_causal"),
)
_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
_OTHERS = ("in_proj_bias", "bias_k", "bias_v", "out_proj.bias")


def lower_attention(
    graph: fx.Graph,
    call: fx.Node,
    module: nn.MultiheadAttention,
    read: Callable[[str], fx.Node | None],
) -> fx.Node | Refusal:
    """Write ``y, _ = attention(query, key, value)`` with its weights and biases as nodes."""
    if type(module.out_proj).__name__ != "NonDynamicallyQuantizableLinear":
        return Refusal(f"{type(module).__name__} with an output projection of its own")
    given = {**dict(zip(_ARGUMENTS, call.args, strict=False)), **call.kwargs}
    inputs = [given.pop(name) for name in _ARGUMENTS[:3]]
    weights = [read(name) for name in _WEIGHTS]
    others = [read(name) for name in _OTHERS]
    settings = (
        *(module.embed_dim, module.num_heads, module.add_zero_attn, module.dropout),
        module.batch_first,
    )
    is_training = graph.get_attr(f"{call.target}.training")
    args = (*inputs, weights, others, settings, is_training)
    return graph.call_function(attention, args, given)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: tuple[Any, ...],
    others: tuple[Any, ...],
    settings: tuple[Any, ...],
    is_training: bool,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run attention over a batch of sequences, or over one.

    Args:
        query: ``(T, B, n)``; ``(B, T, n)`` if batches come first; ``(T, n)``.
        key: ``(S, B, k)`` and alike.
        value: ``(S, B, v)`` and alike.
        weights: of the joint projection, of those of query, key and value, and of the output.
        others: bias of the projections, bias of keys and of values, bias of the output.
        settings: what the module was made with.
        is_training: whether attention weights are dropped.
        options: masks, and what of the attention weights is wanted.

    Returns:
        The output in the form of the query; attention weights, if they are wanted.
    """
    size, heads, adds_zero, dropout, is_batch_first = settings
    is_turned = is_batch_first and query.dim() == 3
    if is_turned:
        # The same tensor stays the same: the joint projection of torch.nn asks for that.
        turned = {id(each): each.transpose(1, 0) for each in (query, key, value)}
        query, key, value = (turned[id(each)] for each in (query, key, value))
    joint, of_query, of_key, of_value, output = weights
    bias, bias_k, bias_v, output_bias = others
    result, attended = functional.multi_head_attention_forward(
        query,
        key,
        value,
        size,
        heads,
        joint,
        bias,
        bias_k,
        bias_v,
        adds_zero,
        dropout,
        output,
        output_bias,
        training=is_training,
        use_separate_proj_weight=joint is None,
        q_proj_weight=of_query,
        k_proj_weight=of_key,
        v_proj_weight=of_value,
        **options,
    )
    return result.transpose(1, 0) if is_turned else result, attended
