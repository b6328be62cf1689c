"""The values that nodes really have, by running a copy of the model."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from npas_fx.passes.contexts import SWITCHES, OpenContexts
from npas_fx.passes.probes import Probes
from npas_fx.passes.rebinding import REBINDS, note_bindings
from npas_fx.passes.rollback import RandomState
from npas_fx.passes.tensor_trees import map_tensors

# Else contexts would have to be left again, and a copy of the model serves several runs.
NOT_RUN = (*SWITCHES, *REBINDS)


class RealValues:
    """The values that the nodes of one trace really have, by running a copy of the model.

    Args:
        probes: of the model that is traced.
        run: runs a function while nothing is recorded.
        contexts: that the nodes are in.
    """

    def __init__(
        self, probes: Probes, run: Callable[[Callable[[], Any]], Any], contexts: OpenContexts
    ) -> None:
        self.probes = probes
        self.run = run
        self.contexts = contexts
        self._known: dict[tuple[int, bool], dict[fx.Node, Any]] = {}  # of each set of inputs
        self._root: nn.Module | None = None

    def forget(self) -> None:
        """Forget what was run: some of it was taken back."""
        self._known.clear()
        self._root = None

    def of(self, node: fx.Node, probe: int, *, is_shuffled: bool = False) -> Any:
        """The value of a node; all nodes before it run in order, since they may change tensors.

        Args:
            node: of the graph.
            probe: number of the probe.
            is_shuffled: whether the elements of each input change places, for other data that a
                model may be given: numbers stay in their range, and masks stay masks.

        Raises:
            Exception: whatever the model raises.
        """
        return self.run(partial(self._run_until, node, probe, is_shuffled))

    @torch.no_grad()
    def _run_until(self, node: fx.Node, probe: int, is_shuffled: bool) -> Any:
        self._root = root = self._root or self.probes.real_root()
        if root is None:
            raise ValueError("the model has no values")
        key = (probe, is_shuffled)
        if key not in self._known:
            inputs = self.probes.real_inputs(probe)
            if is_shuffled:
                inputs = map_tensors(_shuffle, inputs)
            given = [each for each in node.graph.nodes if each.op == "placeholder"]
            self._known[key] = {each: inputs.get(str(each.target)) for each in given}
        known = self._known[key]
        random = RandomState()
        try:
            for each in node.graph.nodes:
                if each.target in NOT_RUN:
                    known[each] = None
                elif each not in known:
                    read = known.__getitem__
                    with self.contexts.around(each, read, has_gradients=False):
                        known[each] = run_node(each, root, read)
                if each is node:
                    break
        finally:
            random.put_back()
        return known[node]


def _shuffle(tensor: Tensor) -> Tensor:
    order = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(0))
    return tensor.flatten()[order.to(tensor.device)].view(tensor.shape)


def run_node(node: fx.Node, root: nn.Module, read: Callable[[fx.Node], Any]) -> Any:
    """Do what a node does, with modules, parameters and buffers of ``root``."""
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(root)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), read)
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        put_back = note_bindings(module)  # `root` serves further runs and traces
        try:
            return module(*args, **kwargs)
        finally:
            put_back()
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)
