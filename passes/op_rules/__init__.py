"""How a leaf module shows its weights: one rule for each class with a functional form."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from npas_fx.passes.op_rules.conv import lower_conv
from npas_fx.passes.op_rules.embedding import lower_embedding
from npas_fx.passes.op_rules.linear import lower_linear
from npas_fx.passes.op_rules.rule import Refusal, Rule

OP_RULES: Mapping[type[nn.Module], Rule] = {
    nn.Linear: lower_linear,
    nn.Conv1d: lower_conv,
    nn.Conv2d: lower_conv,
    nn.Conv3d: lower_conv,
    nn.Embedding: lower_embedding,
}

__all__ = ["OP_RULES", "Refusal", "Rule"]
