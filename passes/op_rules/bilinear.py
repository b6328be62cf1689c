"""``nn.Bilinear`` as ``bilinear(input1, input2, weight, bias)``."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx, nn
from torch.nn import functional

from npas_fx.passes.op_rules.rule import Refusal


def lower_bilinear(
    graph: fx.Graph, call: fx.Node, module: nn.Bilinear, read: Callable[[str], fx.Node | None]
) -> fx.Node | Refusal:
    """Write ``z = bilinear(x, y)`` with its weight and bias as nodes."""
    given = {**dict(zip(("input1", "input2"), call.args, strict=False)), **call.kwargs}
    args = (given["input1"], given["input2"], read("weight"), read("bias"))
    return graph.call_function(functional.bilinear, args)
