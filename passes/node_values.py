"""The values that nodes have in the probes, found without arithmetic when code asks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from typing import Any

from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.utils import _pytree as pytree

from npas_fx.passes.contexts import OpenContexts
from npas_fx.passes.fixed_values import FixedValues
from npas_fx.passes.functions import ApplyFunction
from npas_fx.passes.probes import Call, Probes
from npas_fx.passes.purity import can_be_fixed
from npas_fx.passes.real_values import NOT_RUN, RealValues, run_node
from npas_fx.passes.rollback import RandomState
from npas_fx.passes.tensor_trees import map_tensors

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

_LEN = len  # while tracing, the name stands for a patch
_NEEDS_DATA = (DataDependentOutputException, DynamicOutputShapeException)


class Values:
    """The values that the nodes of one trace have in the probes.

    Args:
        probes: of the model that is traced.
        run: runs a function while nothing is recorded.
        call: runs a module on inputs by name.
        contexts: that the nodes are in.
    """

    def __init__(
        self,
        probes: Probes,
        run: Callable[[Callable[[], Any]], Any],
        call: Call,
        contexts: OpenContexts,
    ) -> None:
        self.probes = probes
        self.run = run
        self.contexts = contexts
        self.alive = list(range(len(probes.inputs)))
        self.keeps_order = False  # whether a shape changes in place, so that all are run in order
        self.real = RealValues(probes, run, contexts)
        self.of_data: set[fx.Node] = set()  # numbers and sizes that may depend on data
        self.of_fixed: set[fx.Node] = set()  # whose value or shape depends on that of buffers
        self._known: dict[fx.Node, dict[int, Any] | None] = {}
        self._fixed = FixedValues(
            probes.buffer_names,
            partial(probes.find_fixed_buffers, call),
            self._known,
            self.of_data,
            self._run_fixed,
        )

    def fixed_of(self, node: fx.Node) -> list[Any] | None:
        """Values of a node with their data, one for each probe; None where calls may change it."""
        try:
            with self.contexts.around():
                return [self.run(partial(self._fixed.of, node, probe)) for probe in self.alive]
        except Exception:
            return None

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
        """Nodes that the value of a node depends on, in order, which have not been evaluated."""
        if self.keeps_order:
            # Also those behind it, which may have changed it since.
            return [each for each in node.graph.nodes if each not in self._known]
        order: dict[fx.Node, None] = {}
        waiting = [node]
        while waiting:
            each = waiting[-1]
            sources = self.contexts.sources(each)
            missing = [s for s in sources if s not in self._known and s not in order]
            if missing:
                waiting += missing
            else:
                waiting.pop()
                if each not in self._known:
                    order[each] = None
        return list(order)

    def _evaluate(self, node: fx.Node) -> dict[int, Any] | None:
        if any(self._known[source] is None for source in self.contexts.sources(node)):
            return None
        known = {}
        needs_data = False
        for probe in list(self.alive):
            try:
                with _quiet():
                    known[probe] = self.run(partial(self._compute, node, probe))
            except Exception as err:  # it needs values, or so many rows do not fit the model
                if isinstance(err, _NEEDS_DATA):
                    with suppress(Exception), _quiet():
                        known[probe] = self.run(partial(self._compute_from_fixed, node, probe))
                        self.of_fixed.add(node)
                        continue
                try:
                    known[probe] = self.run(partial(self._compute_from_data, node, probe))
                except Exception:
                    if probe not in self.probes.derived:
                        return None
                    self.alive.remove(probe)
                else:
                    needs_data |= isinstance(err, _NEEDS_DATA)
        if self._may_depend_on_data(node, needs_data):
            self.of_data.add(node)
        if not self.of_fixed.isdisjoint(node.all_input_nodes):
            self.of_fixed.add(node)
        return known

    def _may_depend_on_data(self, node: fx.Node, needs_data: bool) -> bool:
        """Whether a number, or the sizes of a tensor, may be others for other data.

        Args:
            node: its inputs have been told apart already.
            needs_data: whether it could not be computed without.
        """
        if needs_data and node.op != "call_module":
            return True
        is_behind = not self.of_data.isdisjoint(node.all_input_nodes) and not _asks_kind(node)
        return (needs_data or is_behind) and not self._keeps_sizes(node)

    def _keeps_sizes(self, node: fx.Node) -> bool:
        """Whether a value consists of tensors, of the same sizes also where the data are others."""
        try:
            values = [self.real.of(node, 0), self.real.of(node, 0, is_shuffled=True)]
        except Exception:
            return False
        (one, form), (other, other_form) = map(pytree.tree_flatten, values)
        return form == other_form and all(map(_is_alike, one, other))

    def _compute_from_fixed(self, node: fx.Node, probe: int) -> Any:
        """Compute a node with the data of what is fixed: of itself, or the numbers it is given."""
        with suppress(LookupError):
            return map_tensors(self.probes.fake, self._fixed.of(node, probe))
        numbers = {}
        for source in node.all_input_nodes:
            with suppress(LookupError):
                value = self._fixed.of(source, probe)
                if isinstance(value, Tensor) and value.dim() == 0:
                    numbers[source] = value.item()
        if not numbers or not can_be_fixed(node):
            raise LookupError("it needs other data, or may have done something until then")
        return self._compute(node, probe, numbers)

    def _compute_from_data(self, node: fx.Node, probe: int) -> Any:
        return map_tensors(self.probes.fake, self.real.of(node, probe))

    def _compute(
        self, node: fx.Node, probe: int, numbers: Mapping[fx.Node, Any] | None = None
    ) -> Any:
        def read(source: fx.Node) -> Any:
            if numbers is not None and source in numbers:
                return numbers[source]
            return self._known_in(probe, source)

        if node.op == "placeholder":
            given = self.probes.inputs[probe][str(node.target)]
            return map_tensors(self.probes.fake, given)  # whose shape may change
        if node.target in NOT_RUN:
            return None
        random = RandomState() if _is_own_code(node, self.root) else None
        try:
            with self.probes.mode, self.contexts.around(node, read):
                return run_node(node, self.root, read)
        finally:
            if random is not None:
                random.put_back()

    def _known_in(self, probe: int, source: fx.Node) -> Any:
        known = self._known[source]
        assert known is not None
        return known[probe]

    def _run_fixed(self, node: fx.Node, probe: int, read: Callable[[fx.Node], Any]) -> Any:
        known = partial(self._known_in, probe)
        with self.contexts.around(node, known, has_gradients=False):
            return run_node(node, nn.Module(), read)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from logging, as errors, that an operation does not fit a probe."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled


def _is_alike(one: Any, other: Any) -> bool:
    """Whether two values are tensors of the same kind and sizes, or both None."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return one is None and other is None


def _is_own_code(node: fx.Node, root: nn.Module) -> bool:
    """Whether code runs that is not torch's, and may draw Python's or NumPy's random numbers."""
    if node.op != "call_module":
        return isinstance(node.target, ApplyFunction)
    parts = root.get_submodule(str(node.target)).modules()
    return any(not part.__module__.startswith("torch.nn.") for part in parts)


def _asks_kind(node: fx.Node) -> bool:
    """Whether an operation asks a tensor for what does not depend on its data nor on its size."""
    kinds = ("ndim", "dtype", "device", "layout")
    if node.target is _LEN:  # of a shape
        (sized,) = node.all_input_nodes
        return sized.target == "size" or (sized.target is getattr and sized.args[1] == "shape")
    return node.target == "dim" or (node.target is getattr and node.args[1] in kinds)
