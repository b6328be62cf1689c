"""``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` as a function of their input, state and weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence

from npas_fx.passes.op_rules.rule import Refusal

_FUNCTION: dict[str, Callable[..., Any]] = {
    "LSTM": torch._VF.lstm,
    "GRU": torch._VF.gru,
    "RNN_TANH": torch._VF.rnn_tanh,
    "RNN_RELU": torch._VF.rnn_relu,
}


def lower_recurrent(
    graph: fx.Graph, call: fx.Node, module: nn.RNNBase, read: Callable[[str], fx.Node | None]
) -> fx.Node | Refusal:
    """Write ``y = lstm(x, state)`` with its weights and biases as nodes."""
    given = {**dict(zip(("input", "hx"), call.args, strict=False)), **call.kwargs}
    settings = (
        *(module.mode, module.hidden_size, module.proj_size, module.num_layers, module.bias),
        *(module.dropout, module.bidirectional, module.batch_first),
    )
    weights = [read(name) for names in module._all_weights for name in names]
    is_training = graph.get_attr(f"{call.target}.training")
    args = (given["input"], given.get("hx"), weights, settings, is_training)
    return graph.call_function(recurrent, args)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it fails on what these modules call
def recurrent(
    values: Tensor | PackedSequence,
    state: Any,
    weights: Sequence[Tensor],
    settings: tuple[Any, ...],
    is_training: bool,
) -> tuple[Any, Any]:
    """Run all layers over a batch of sequences, over one sequence, or over packed ones.

    Args:
        values: ``(T, B, n)``, ``(B, T, n)`` if batches come first, ``(T, n)``, or packed.
        state: ``(layers, B, m)`` or ``(layers, m)``; of an LSTM two of them; None for zeros.
        weights: of all layers, in the order of ``torch.nn``.
        settings: what the module was made with.
        is_training: whether values between layers are dropped.

    Returns:
        Values and state of the last layer and step, in the form of the input.
    """
    mode, size, projected, layers, has_bias, dropout, is_bidirectional, is_batch_first = settings
    options = (list(weights), has_bias, layers, dropout, is_training, is_bidirectional)

    def start(like: Tensor, batch: int) -> list[Tensor]:
        if state is not None:
            return list(state) if mode == "LSTM" else [state]
        rows = layers * (2 if is_bidirectional else 1)
        sizes = (projected or size, size) if mode == "LSTM" else (size,)
        return [like.new_zeros(rows, batch, each) for each in sizes]

    def run(
        data: Sequence[Tensor], first: list[Tensor], *rest: bool
    ) -> tuple[Tensor, list[Tensor]]:
        begin = tuple(first) if mode == "LSTM" else first[0]
        result, *left = _FUNCTION[mode](*data, begin, *options, *rest)
        return result, left

    if isinstance(values, PackedSequence):
        data, sizes, order, back = values
        first = start(data, int(sizes[0]))
        if state is not None and order is not None:
            first = [each.index_select(1, order) for each in first]
        result, left = run((data, sizes), first)
        if back is not None:
            left = [each.index_select(1, back) for each in left]
        made: Any = values._replace(data=result)
    elif values.dim() == 2:
        axis = 0 if is_batch_first else 1
        first = start(values, 1)
        if state is not None:
            first = [each.unsqueeze(1) for each in first]
        result, left = run((values.unsqueeze(axis),), first, is_batch_first)
        made, left = result.squeeze(axis), [each.squeeze(1) for each in left]
    else:
        batch = values.shape[0 if is_batch_first else 1]
        made, left = run((values,), start(values, batch), is_batch_first)
    return made, tuple(left) if mode == "LSTM" else left[0]
