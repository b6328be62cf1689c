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


class MadeTypes:
    """Types of the values of one trace, each found once.

    Args:
        root: gives the module that owns the modules which the graph calls.
        input_type: name of an input of the model -> its type, None if it is not known.
    """

    def __init__(
        self, root: Callable[[], nn.Module], input_type: Callable[[str], type | None]
    ) -> None:
        self._root = root
        self._input_type = input_type
        self._known: dict[fx.Node, type | None] = {}

    def of(self, node: fx.Node) -> type | None:
        """Type of the value that a node makes; None where its operation does not tell."""
        waiting = [node]  # no recursion: a loop in the model may make a long chain
        while waiting:
            each = waiting[-1]
            told_by = self._told_by(each)
            missing = [s for s in told_by if isinstance(s, fx.Node) and s not in self._known]
            if missing:
                waiting += missing
            else:
                made = [self._known[s] if isinstance(s, fx.Node) else type(s) for s in told_by]
                self._known[waiting.pop()] = self._made(each, made)
        return self._known[node]

    def _told_by(self, node: fx.Node) -> Sequence[Any]:
        """The arguments whose types tell that of the value."""
        if node.op == "call_module":
            is_identity = isinstance(self._module_of(node), nn.Identity)
            return node.args[:1] if is_identity else ()
        if node.op == "call_method":
            return node.args[:1]
        is_told = node.target is getattr and node.args[1] in _ATTRIBUTES
        return () if is_told or node.op != "call_function" else node.args

    def _module_of(self, node: fx.Node) -> nn.Module:
        return self._root().get_submodule(str(node.target))

    def _made(self, node: fx.Node, made: Sequence[type | None]) -> type | None:
        if node.op == "placeholder":
            return self._input_type(str(node.target))
        if node.op == "call_module":
            return made[0] if made else _module_type(self._module_of(node))
        if node.op == "get_attr":
            return Tensor
        if node.op == "call_method":
            return _method_type(node, made[0])
        if node.target is getattr:
            known = _ATTRIBUTES.get(str(node.args[1]))
            return known or (Tensor if made[0] is Tensor else None)
        return _function_type(node.target, made)


def _method_type(node: fx.Node, owner: type | None) -> type | None:
    if node.target == "size":
        return _SIZE if len(node.args) + len(node.kwargs) == 1 else int
    if node.target in _METHODS:
        return _METHODS[str(node.target)]
    return Tensor if owner is Tensor and node.target not in _UNKNOWN else None


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


def takes_part(node: fx.Node) -> bool:
    """Whether an operation takes a part of a value, or what a method gives of it."""
    is_read = node.op == "call_function" and node.target in (operator.getitem, getattr)
    return is_read or node.op == "call_method"
