"""Probes: what values have in a few example runs, found without arithmetic when code asks."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from npas_fx.passes.skeleton import copy_with

# Methods that change the shape of a tensor in place.
RESHAPING = frozenset(
    f"{name}_"
    for name in (
        "unsqueeze",
        "squeeze",
        "t",
        "transpose",
        "swapaxes",
        "swapdims",
        "resize",
        "resize_as",
    )
)


class Probes:
    """A model and a few sets of inputs, all of tensors without values.

    The inputs are the example, and the same with other numbers of rows: so that what depends on the
    size of a batch is seen to.

    Args:
        model: it is not run; it may be on the meta device.
        inputs: name of each input of the graph -> its value in the example.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.flags: dict[str, bool] = {}
        self._model = model
        self.inputs = [
            pytree.tree_map_only(Tensor, rows, dict(inputs)) for rows in self._make_rows(inputs)
        ]

    def root(self) -> nn.Module:
        """The model without values, in the mode that ``flags`` tell; made when it is needed."""
        for path, flag in self.flags.items():
            self._root.get_submodule(path).training = flag
        return self._root

    @cached_property
    def _root(self) -> nn.Module:
        return copy_with(self._model, lambda _, tensor: self.fake(tensor))

    def fake(self, tensor: Tensor, num_rows: int | None = None) -> Tensor:
        """Make a tensor of the same shape and type, perhaps with another number of rows."""
        shape = tensor.shape if num_rows is None else (num_rows, *tensor.shape[1:])
        device = "cpu" if tensor.is_meta else tensor.device
        with self.mode:
            fake = torch.empty(shape, dtype=tensor.dtype, device=device)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
        return fake.requires_grad_(tensor.requires_grad)

    def _make_rows(self, inputs: Mapping[str, Any]) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yield what makes an input of each probe; next to a single row, which broadcasts, two."""
        tensors = [v for v in pytree.tree_leaves(dict(inputs)) if isinstance(v, Tensor)]
        batches = Counter(tensor.shape[0] for tensor in tensors if tensor.dim())
        batch = batches.most_common(1)[0][0] if batches else 0
        yield self.fake
        for num_rows in (batch + 1, batch + 2) if batch == 1 else (batch + 1,) if batch else ():

            def fake(tensor: Tensor, num_rows: int = num_rows) -> Tensor:
                is_batch = tensor.dim() > 0 and tensor.shape[0] == batch
                return self.fake(tensor, num_rows if is_batch else None)

            yield fake


class Values:
    """The values that the nodes of one trace have in the probes.

    Args:
        probes: of the model that is traced.
        run: runs a function while nothing is recorded.
    """

    def __init__(self, probes: Probes, run: Callable[[Callable[[], Any]], Any]) -> None:
        self.probes = probes
        self.run = run
        self.alive = list(range(len(probes.inputs)))
        self.keeps_order = False  # whether a shape changes in place, so that all are run in order
        self._known: dict[fx.Node, dict[int, Any] | None] = {}

    @cached_property
    def root(self) -> nn.Module:
        """The model without values, in the mode of this trace."""
        return self.probes.root()

    def of(self, node: fx.Node) -> list[Any] | None:
        """Values of a node, one for each probe; None where they are not known."""
        for each in self._unknown_before(node):
            self._known[each] = self._evaluate(each)
        known = self._known[node]
        if known is None:
            return None
        return [known[probe] for probe in self.alive]

    def _unknown_before(self, node: fx.Node) -> list[fx.Node]:
        """Nodes that a node depends on, itself last, which have not been evaluated."""
        if self.keeps_order:
            nodes = list(node.graph.nodes)
            until = nodes[: nodes.index(node) + 1]
            return [each for each in until if each not in self._known]
        order: dict[fx.Node, None] = {}
        waiting = [node]
        while waiting:
            each = waiting[-1]
            missing = [s for s in each.all_input_nodes if s not in self._known and s not in order]
            if missing:
                waiting += missing
            else:
                waiting.pop()
                if each not in self._known:
                    order[each] = None
        return list(order)

    def _evaluate(self, node: fx.Node) -> dict[int, Any] | None:
        if any(self._known[source] is None for source in node.all_input_nodes):
            return None
        known = {}
        for probe in list(self.alive):
            try:
                known[probe] = self.run(partial(self._compute, node, probe))
            except Exception:  # it needs values, or another number of rows does not fit the model
                if probe == self.alive[0]:
                    return None
                self.alive.remove(probe)
        return known

    def _compute(self, node: fx.Node, probe: int) -> Any:
        def read(source: fx.Node) -> Any:
            known = self._known[source]
            assert known is not None
            return known[probe]

        if node.op == "placeholder":
            given = self.probes.inputs[probe][str(node.target)]
            return pytree.tree_map_only(Tensor, self.probes.fake, given)  # whose shape may change
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.root)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), read)
        with self.probes.mode:
            if node.op == "call_module":
                return self.root.get_submodule(str(node.target))(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            assert callable(node.target)
            return node.target(*args, **kwargs)
