"""``nn.ConvTranspose1d`` to ``3d`` as ``conv_transposeNd(input, weight, bias, …)``."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx, nn
from torch.nn import functional

from npas_fx.passes.op_rules.rule import Refusal, only_input

_FUNCTION = {
    nn.ConvTranspose1d: functional.conv_transpose1d,
    nn.ConvTranspose2d: functional.conv_transpose2d,
    nn.ConvTranspose3d: functional.conv_transpose3d,
}


def lower_conv_transpose(
    graph: fx.Graph,
    call: fx.Node,
    module: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d,
    read: Callable[[str], fx.Node | None],
) -> fx.Node | Refusal:
    """Write ``y = conv_transpose(x)`` with its weight and bias as nodes."""
    if len(call.args) > 1 or "output_size" in call.kwargs:
        return Refusal(f"{type(module).__name__} with an output size")
    args = (
        *(only_input(call), read("weight"), read("bias")),
        *(module.stride, module.padding, module.output_padding, module.groups, module.dilation),
    )
    return graph.call_function(_FUNCTION[type(module)], args)
