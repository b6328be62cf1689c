"""What type of value a node makes, as far as its operation tells."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

# While tracing, the names stand for patches.
_FINFO, _IINFO, _SIZE, _BROADCAST_SHAPES = (
    *(torch.finfo, torch.iinfo, torch.Size, torch.broadcast_shapes),
)
_BUILTIN = (type(torch.add), type(Tensor.add), type(operator.add))
_SEVERAL_OUTPUTS = (
    *(nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.AdaptiveLogSoftmaxWithLoss),
    nn.Transformer,
)

# Type of what an attribute or a method of a tensor gives, where it is no tensor.
_ATTRIBUTES: Mapping[str, type] = {
    **{"shape": torch.Size, "dtype": torch.dtype, "device": torch.device, "ndim": int},
    **{"layout": torch.layout, "requires_grad": bool, "is_cuda": bool},
}
_METHODS: Mapping[str, type] = {"dim": int, "numel": int, "ndimension": int, "tolist": list}
# Methods and functions that may give several tensors, or none.
_UNKNOWN = frozenset(
    (
        *("aminmax", "chunk", "cummax", "cummin", "frexp", "hsplit", "item", "kthvalue", "max"),
        *("median", "min", "mode", "multi_head_attention_forward", "qr", "slogdet", "sort"),
        *("split", "split_with_sizes", "std_mean", "stride", "svd", "tensor_split", "topk"),
        *("unbind", "unique", "unsafe_chunk", "unsafe_split", "var_mean", "vsplit", "__call__"),
        *("meshgrid", "broadcast_tensors", "atleast_1d", "atleast_2d", "atleast_3d", "where"),
    )
)


def made_type(
    node: fx.Node, root: nn.Module, input_type: Callable[[str], type | None]
) -> type | None:
    """Type of the value that a node makes; None where its operation does not tell.

    Args:
        node: of a graph that is being traced.
        root: owns the modules that the graph calls.
        input_type: name of an input of the model -> its type, None if it is not known.
    """

    def made_by(value: Any) -> type | None:
        return made_type(value, root, input_type) if isinstance(value, fx.Node) else type(value)

    if node.op == "placeholder":
        return input_type(str(node.target))
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        if isinstance(module, nn.Identity) and node.args:
            return made_by(node.args[0])
        return _module_type(module)
    if node.op == "get_attr":
        return Tensor
    if node.op == "call_method":
        if node.target == "size":
            return _SIZE if len(node.args) + len(node.kwargs) == 1 else int
        return None if node.target in _UNKNOWN else _METHODS.get(str(node.target), Tensor)
    if node.target is getattr and node.args[1] in _ATTRIBUTES:
        return _ATTRIBUTES[str(node.args[1])]
    made = [made_by(arg) for arg in node.args]
    if node.target is getattr:
        return Tensor if made[0] is Tensor else None
    return _function_type(node.target, made)


def _module_type(module: nn.Module) -> type | None:
    gives_one = type(module).__module__.startswith("torch.nn.modules.") and not (
        isinstance(module, _SEVERAL_OUTPUTS) or getattr(module, "return_indices", False)
    )
    return Tensor if gives_one else None


def _function_type(target: Any, made: Sequence[type | None]) -> type | None:
    if target is operator.getitem:
        if made[0] is _SIZE:
            return _SIZE if made[1] is slice else int
        return made[0] if made[0] is Tensor else None
    module = getattr(target, "__module__", None) or ""
    if module == "_operator":
        if Tensor in made:
            return Tensor
        is_whole = target in (operator.add, operator.sub, operator.mul, operator.floordiv)
        return int if is_whole and set(made) == {int} else None
    if target in (_FINFO, _IINFO):
        return target  # type: ignore[no-any-return]
    if target in (_SIZE, _BROADCAST_SHAPES):
        return _SIZE
    is_torch = module.split(".")[0] == "torch" or isinstance(target, _BUILTIN)
    return Tensor if is_torch and target.__name__ not in _UNKNOWN else None
