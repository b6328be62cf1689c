"""How a leaf module shows its weights: one rule for each class with a functional form."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from npas_fx.passes.op_rules.attention import lower_attention
from npas_fx.passes.op_rules.bilinear import lower_bilinear
from npas_fx.passes.op_rules.conv import lower_conv
from npas_fx.passes.op_rules.conv_transpose import lower_conv_transpose
from npas_fx.passes.op_rules.embedding import lower_embedding, lower_embedding_bag
from npas_fx.passes.op_rules.linear import lower_linear
from npas_fx.passes.op_rules.recurrent import lower_recurrent
from npas_fx.passes.op_rules.recurrent_cell import lower_recurrent_cell
from npas_fx.passes.op_rules.rule import Refusal, Rule

OP_RULES: Mapping[type[nn.Module], Rule] = {
    nn.Linear: lower_linear,
    nn.Bilinear: lower_bilinear,
    nn.Conv1d: lower_conv,
    nn.Conv2d: lower_conv,
    nn.Conv3d: lower_conv,
    nn.ConvTranspose1d: lower_conv_transpose,
    nn.ConvTranspose2d: lower_conv_transpose,
    nn.ConvTranspose3d: lower_conv_transpose,
    nn.Embedding: lower_embedding,
    nn.EmbeddingBag: lower_embedding_bag,
    nn.MultiheadAttention: lower_attention,
    nn.LSTM: lower_recurrent,
    nn.GRU: lower_recurrent,
    nn.RNN: lower_recurrent,
    nn.LSTMCell: lower_recurrent_cell,
    nn.GRUCell: lower_recurrent_cell,
    nn.RNNCell: lower_recurrent_cell,
}

__all__ = ["OP_RULES", "Refusal", "Rule"]
