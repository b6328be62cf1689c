"""``nn.LSTMCell``, ``nn.GRUCell`` and ``nn.RNNCell`` as a function of input, state and weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from npas_fx.passes.op_rules.rule import Refusal

_FUNCTION: dict[str, Callable[..., Any]] = {
    "LSTM": torch._VF.lstm_cell,
    "GRU": torch._VF.gru_cell,
    "RNN_TANH": torch._VF.rnn_tanh_cell,
    "RNN_RELU": torch._VF.rnn_relu_cell,
}
_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def lower_recurrent_cell(
    graph: fx.Graph, call: fx.Node, module: nn.RNNCellBase, read: Callable[[str], fx.Node | None]
) -> fx.Node | Refusal:
    """Write ``state = cell(x, state)`` with its weights and biases as nodes."""
    given = {**dict(zip(("input", "hx"), call.args, strict=False)), **call.kwargs}
    mode = type(module).__name__.removesuffix("Cell")
    if isinstance(module, nn.RNNCell):
        mode = f"{mode}_{module.nonlinearity.upper()}"
    weights = [read(name) for name in _WEIGHTS]
    args = (given["input"], given.get("hx"), weights, mode, module.hidden_size)
    return graph.call_function(recurrent_cell, args)


def recurrent_cell(
    values: Tensor, state: Any, weights: Sequence[Tensor | None], mode: str, size: int
) -> Any:
    """Make one step for a batch, or for one sequence.

    Args:
        values: ``(B, n)`` or ``(n,)``.
        state: ``(B, m)`` or ``(m,)``; of an LSTM two of them; None for zeros.
        weights: of input and state, then their biases.
        mode: which function.
        size: ``m``.

    Returns:
        The next state, in the form of the input.

    Raises:
        ValueError: an input has another number of dimensions.
    """
    is_lstm = mode == "LSTM"
    given = [] if state is None else list(state) if is_lstm else [state]
    for each in (values, *given):
        if each.dim() not in (1, 2):
            raise ValueError(f"{mode} cell: expected 1 or 2 dimensions, got {each.dim()}")
    is_single = values.dim() == 1
    if is_single:
        values, given = values.unsqueeze(0), [each.unsqueeze(0) for each in given]
    if state is None:
        given = [values.new_zeros(values.shape[0], size)] * (2 if is_lstm else 1)
    made = _FUNCTION[mode](values, tuple(given) if is_lstm else given[0], *weights)
    if not is_single:
        return made
    return tuple(each.squeeze(0) for each in made) if is_lstm else made.squeeze(0)
