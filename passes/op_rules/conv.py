"""``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d`` as ``convNd(input, weight, bias, …)``."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx, nn
from torch.nn import functional

from npas_fx.passes.op_rules.rule import Refusal, only_input

_FUNCTION = {
    nn.Conv1d: functional.conv1d,
    nn.Conv2d: functional.conv2d,
    nn.Conv3d: functional.conv3d,
}


def lower_conv(
    graph: fx.Graph,
    call: fx.Node,
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d,
    read: Callable[[str], fx.Node | None],
) -> fx.Node | Refusal:
    """Write ``y = conv(x)`` with its weight and bias as nodes."""
    source, padding = only_input(call), module.padding
    if module.padding_mode != "zeros":
        # The class pads first, by amounts that it keeps in the order that `pad` wants.
        amounts = tuple(module._reversed_padding_repeated_twice)
        source = graph.call_function(
            functional.pad, (source, amounts), {"mode": module.padding_mode}
        )
        padding = (0,) * len(module.kernel_size)
    weight, bias = read("weight"), read("bias")
    args = (source, weight, bias, module.stride, padding, module.dilation, module.groups)
    return graph.call_function(_FUNCTION[type(module)], args)
