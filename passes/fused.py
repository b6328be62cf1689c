"""Which weights are fused: several of equal shape that are applied as one, such as q, k and v."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from npas_fx.passes.flow import is_question
from npas_fx.passes.guards import check_guard
from npas_fx.passes.op_rules.attention import attention
from npas_fx.passes.opaque import call_opaque
from npas_fx.passes.purity import can_be_fixed

_NUMBERS = (2, 3, 4)  # of parts
# A graph knows no shapes, so these are tried: sizes before the features, and behind them. A cut or
# a reshape that does not fit them fails; no number of parts divides them.
_SHAPES = (((5,), ()), ((5, 7), ()), ((5, 7, 11), ()), ((5,), (7, 11)))
_MOST_STEPS = 8  # from the input of a product back to the value that says all sizes


class Fused(NamedTuple):
    """Of how many equal weights one is made, and along which axis these lie."""

    num_parts: int
    axis: int


class _Product(NamedTuple):
    """How an operation applies a weight: its arguments, and along which axis the outputs lie."""

    names: tuple[str, ...]
    value: str
    weight: str
    axis: int


_MATMUL = _Product(("input", "other"), "input", "other", 1)
_PRODUCTS: Mapping[Any, _Product] = {
    functional.linear: _Product(("input", "weight", "bias"), "input", "weight", 0),
    torch.addmm: _Product(("input", "mat1", "mat2"), "mat1", "mat2", 1),
    torch.mm: _Product(("input", "mat2"), "input", "mat2", 1),
    **dict.fromkeys((torch.matmul, operator.matmul, "matmul"), _MATMUL),
}
_MOVING = (
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t"),
    *("chunk", "split", "tensor_split", "unbind", "select", "narrow"),
)
_MOVES = {operator.getitem, *_MOVING, *(getattr(torch, k) for k in _MOVING if hasattr(torch, k))}
# What they give has the features of their first argument in the same places.
_KEEPS = {functional.dropout, "contiguous", "clone", "to", "type_as", "float", torch.clone}
_KEEPING_MODULES = (nn.Dropout, nn.Identity)
_NORMS = (nn.LayerNorm, nn.RMSNorm)
_SUMS = (operator.add, torch.add, "add")


def find_fused(reads_of: Mapping[str, Sequence[fx.Node]], skeleton: nn.Module) -> dict[str, Fused]:
    """Find the weights that are several of equal shape, one after the other.

    These are the joint projection of ``nn.MultiheadAttention``, and the weight of a product whose
    features are cut into 2 to 4 equal stretches, each of which is used by itself.

    Args:
        reads_of: name of the weight -> the nodes that read it, all in one graph.
        skeleton: the model without its values.

    Returns:
        Name of the weight -> what it is made of. A weight of which this is not certain, or on which
        its uses disagree, is not among them.
    """
    graphs = [read.graph for reads in reads_of.values() for read in reads]
    place = {node: k for graph in graphs[:1] for k, node in enumerate(graph.nodes)}
    fused = {}
    for name, reads in reads_of.items():
        uses = [(use, read) for read in reads for use in read.users if not is_question(use)]
        found = {_find_parts(use, read, skeleton, place) for use, read in uses}
        parts = found.pop() if len(found) == 1 else None
        if parts is not None:
            fused[name] = parts
    return fused


def _find_parts(
    use: fx.Node, read: fx.Node, skeleton: nn.Module, place: Mapping[fx.Node, int]
) -> Fused | None:
    """What a weight is made of, as far as one operation tells; None where it is whole."""
    args: Any = use.args
    if use.target is attention:
        places = [k for k, weight in enumerate(args[3]) if weight is read]
        return Fused(3, 0) if places == [0] else None
    if use.target is call_opaque:
        leaf, names, weights = args[:3]
        path = "" if leaf is None else f"{leaf.target}."
        called = [path + name for name, w in zip(names, weights, strict=True) if w is read]
        return Fused(3, 0) if called and all(_is_joint(name, skeleton) for name in called) else None
    product = _PRODUCTS.get(use.target)
    shape = skeleton.get_parameter(str(read.target)).shape
    if product is None or len(shape) != 2:
        return None
    given = {**dict(zip(product.names, args, strict=False)), **use.kwargs}
    value, axis = given.get(product.value), product.axis
    if given.get(product.weight) is not read or not isinstance(value, fx.Node):
        return None
    number = _count_parts(use, value, shape[1 - axis], shape[axis], skeleton, place)
    return None if number == 1 else Fused(number, axis)


def _is_joint(name: str, skeleton: nn.Module) -> bool:
    """Whether a weight is that with which ``nn.MultiheadAttention`` projects q, k and v."""
    path, _, attribute = name.rpartition(".")
    owner = skeleton.get_submodule(path)
    return isinstance(owner, nn.MultiheadAttention) and attribute == "in_proj_weight"


def _count_parts(
    product: fx.Node,
    value: fx.Node,
    inputs: int,
    outputs: int,
    skeleton: nn.Module,
    place: Mapping[fx.Node, int],
) -> int:
    """Count the parts of a weight by what happens to its outputs; 1 where it is not certain.

    The sizes to which these are reshaped may come from the shape of the value that the product is
    given, or of one before it. The first of which all follow is taken.
    """
    start: fx.Node | None = value
    for _ in range(_MOST_STEPS):
        if start is None:
            break
        found = set()
        for before, behind in _SHAPES:
            tried = torch.empty(*before, inputs, *behind, device="meta")
            trial = _Trial(skeleton, place, start, tried)
            try:
                found.add(trial.count_parts(product, value, inputs, outputs))
            except _UnknownError:
                break  # whatever the shape
            except Exception:  # the value has another shape
                continue
        if found:
            return found.pop() if len(found) == 1 else 1
        start = next((node for node in start.all_input_nodes if node.op != "get_attr"), None)
    return 1


class _UnknownError(Exception):
    """A value that does not follow from the one that is tried."""


class _Trial:
    """What operations give on the meta device, if a value of a graph is this.

    Args:
        skeleton: the model without its values.
        place: of each node in the graph.
        start: the node of the value.
        tried: what it is taken to be.
    """

    def __init__(
        self, skeleton: nn.Module, place: Mapping[fx.Node, int], start: fx.Node, tried: Tensor
    ) -> None:
        self.skeleton = skeleton
        self.place = place
        self.start = start
        self.known: dict[fx.Node, Any] = {start: tried}

    def count_parts(self, product: fx.Node, value: fx.Node, inputs: int, outputs: int) -> int:
        """Count the equal stretches of features that are used apart; 1 if there are none.

        Raises:
            _UnknownError: further values matter, or what code does that is not torch's.
            Exception: an operation does not fit what is tried.
        """
        given = self.of(value)
        if given.shape[-1] != inputs:
            raise ValueError("the weight does not fit")
        # A view of this tells by its strides which features it holds; none of them takes memory.
        features = torch.empty(outputs, device="meta")
        self.known[product] = features.expand(*given.shape[:-1], outputs)
        for number in _NUMBERS:
            if outputs % number == 0 and self._is_cut(product, features, outputs // number):
                return number
        return 1

    def of(self, node: fx.Node) -> Any:
        """What a node gives; raises as ``count_parts`` does."""
        if node not in self.known:
            kept = self._kept(node)
            self.known[node] = self._run(node) if kept is None else self.of(kept)
        return self.known[node]

    def _kept(self, node: fx.Node) -> fx.Node | None:
        """The argument of an operation whose features stay where they are, if there is one."""
        sources = [source for source in node.args if isinstance(source, fx.Node)]
        if node.target in _KEEPS or isinstance(self._module(node), _KEEPING_MODULES):
            return sources[0]
        if node.target in _SUMS and len(sources) == 2:
            values = [source for source in sources if source.op != "get_attr"]
            return values[0] if len(values) == 1 else None  # the other one is a bias, or alike
        return None

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.skeleton.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _run(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            owned = operator.attrgetter(str(node.target))(self.skeleton)
            if not isinstance(owned, Tensor):
                raise _UnknownError
            return owned.to("meta")
        if self.place[node] < self.place[self.start]:
            raise _UnknownError
        if isinstance(self._module(node), _NORMS):
            return self.of(node.all_input_nodes[0])  # of the same shape
        if node.target not in _MOVES and not _is_of_torch(node):
            raise _UnknownError
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.of)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _is_cut(self, product: fx.Node, features: Tensor, length: int) -> bool:
        """Whether all stretches of so many features are used, and nothing else of them is."""
        used: set[int] = set()
        waiting = [product]
        while waiting:
            for user in waiting.pop().users:
                if is_question(user) or user.target in (check_guard, len):
                    continue
                if user.target not in _MOVES and self._kept(user) is None:
                    return False  # it uses several parts, or parts of them, as one
                made = self.of(user)
                if not isinstance(made, Tensor):  # but a tuple of them
                    waiting.append(user)
                    continue
                held = _find_held(made, features)
                parts = {feature // length for feature in held}
                if len(parts) > 1:
                    waiting.append(user)
                elif len(held) < max(length, 2):  # one row is no matrix
                    return False
                elif user.users:
                    used |= parts
        return len(used) * length == len(features)


def _find_held(tensor: Tensor, features: Tensor) -> set[int]:
    """Which features a tensor that is made of them holds."""
    if tensor.untyped_storage()._cdata != features.untyped_storage()._cdata:
        raise ValueError("a copy, which mixes features and what is before them")
    steps = tensor.stride()
    sizes = [n if step else 1 for n, step in zip(tensor.shape, steps, strict=True)]
    numbers = torch.arange(len(features), device="cpu")
    return set(numbers.as_strided(sizes, steps, tensor.storage_offset()).flatten().tolist())


def _is_of_torch(node: fx.Node) -> bool:
    """Whether torch runs an operation, and gives the same each time."""
    home = getattr(node.target, "__module__", None) or "torch"
    is_torch = home.partition(".")[0] in ("torch", "_operator", "builtins")
    return (node.op == "call_method" or is_torch) and can_be_fixed(node)
