"""``nn.Linear`` as ``linear(input, weight, bias)``."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx, nn
from torch.nn import functional

from npas_fx.passes.op_rules.rule import Refusal, only_input


def lower_linear(
    graph: fx.Graph, call: fx.Node, module: nn.Linear, read: Callable[[str], fx.Node | None]
) -> fx.Node | Refusal:
    """Write ``y = linear(x)`` with its weight and bias as nodes."""
    args = (only_input(call), read("weight"), read("bias"))
    return graph.call_function(functional.linear, args)
