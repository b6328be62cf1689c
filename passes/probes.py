"""Probes: what values have in a few example runs, found without arithmetic when code asks."""

from __future__ import annotations

import copy
import logging
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils import _pytree as pytree

from npas_fx.passes.contexts import SWITCHES, OpenContexts
from npas_fx.passes.fixed_values import FixedValues
from npas_fx.passes.functions import ApplyFunction
from npas_fx.passes.history import forgets_calls
from npas_fx.passes.objects import is_plain_object
from npas_fx.passes.purity import can_be_fixed
from npas_fx.passes.python_state import read_state
from npas_fx.passes.rebinding import REBINDS, note_bindings
from npas_fx.passes.rollback import RandomState
from npas_fx.passes.skeleton import clone, copy_with, named_tensors

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
Call = Callable[[nn.Module, Mapping[str, Any]], Any]  # runs a module on inputs by name
# Else contexts would have to be left again, and a copy of the model serves several runs.
_NOT_RUN = (*SWITCHES, *REBINDS)
_NEEDS_DATA = (DataDependentOutputException, DynamicOutputShapeException)


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What a call of a model has changed.

    Attributes:
        tensors: names of parameters and buffers whose values were set.
        bound: those of them that are other tensors now, or none.
        modules: paths of modules that have something new in their attributes.
    """

    tensors: frozenset[str]
    bound: frozenset[str]
    modules: frozenset[str]


class Probes:
    """A model and a few sets of inputs, all of tensors without values.

    The inputs are the example, the same with other numbers of rows, and further examples: so that
    what depends on the size of a batch, or on what differs between the examples, is seen to.

    Args:
        model: it is not run; it may be on the meta device.
        inputs: name of each input of the graph -> its value in the example.
        further: the same of each further example.

    Attributes:
        derived: which of the probes the user has not given; they may not fit the model.
    """

    def __init__(
        self, model: nn.Module, inputs: Mapping[str, Any], *further: Mapping[str, Any]
    ) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.flags: dict[str, bool] = {}
        self._model: nn.Module | None = model
        self._changes: dict[bool, Changes | None] = {}  # in each mode
        self._forgets: bool | None = None
        self.buffer_names = frozenset(name for name, _ in model.named_buffers())
        self._examples = [inputs, *further]
        tensors = tensors_in(inputs)
        batches = Counter(tensor.shape[0] for tensor in tensors if tensor.dim())
        self._batch = batches.most_common(1)[0][0] if batches else 0
        self._rows = _choose_rows(self._batch)
        self.derived = range(1, len(self._rows))
        self.inputs = [map_tensors(self._faker(n), inputs) for n in self._rows]
        self.inputs += [map_tensors(self.fake, each) for each in further]

    def root(self) -> nn.Module:
        """The model without values, in the mode that ``flags`` tell; made when it is needed."""
        for path, flag in self.flags.items():
            self._root.get_submodule(path).training = flag
        return self._root

    @cached_property
    def _root(self) -> nn.Module:
        assert self._model is not None
        return copy_with(self._model, lambda _, tensor: self.fake(tensor))

    def drop_values(self, *, is_over: bool) -> None:
        """Let go of the model and of the examples.

        Args:
            is_over: nothing is asked any more; else what needs values is not known from here on.
        """
        if not is_over:
            self._root  # noqa: B018  # made while the model is there
        self._model = None
        self._examples = []

    def fake(self, tensor: Tensor, num_rows: int | None = None) -> Tensor:
        """Make a tensor of the same shape and type, perhaps with another number of rows."""
        shape = tensor.shape if num_rows is None else (num_rows, *tensor.shape[1:])
        device = "cpu" if tensor.is_meta else tensor.device
        with self.mode:
            fake = torch.empty(shape, dtype=tensor.dtype, device=device)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
        return fake.requires_grad_(tensor.requires_grad)

    def _faker(self, num_rows: int) -> Callable[[Tensor], Tensor]:
        return lambda tensor: self.fake(tensor, num_rows if self._is_batch(tensor) else None)

    def _is_batch(self, tensor: Tensor) -> bool:
        return tensor.dim() > 0 and tensor.shape[0] == self._batch

    def real_root(self) -> nn.Module | None:
        """A copy of the model with its values, in the mode that ``flags`` tell, if it has some."""
        if self._model is None or _is_meta(self._model):
            return None
        root = copy_with(self._model, lambda _, tensor: clone(tensor))
        for path, flag in self.flags.items():
            root.get_submodule(path).training = flag
        return root

    def find_changes(self, call: Call, is_training: bool) -> Changes | None:
        """Find what calls of the model change, by calling copies; None where that fails.

        Args:
            call: runs a module on inputs by name.
            is_training: the mode.
        """
        if is_training not in self._changes:
            self._changes[is_training] = self._find_all_changes(call, is_training)
        return self._changes[is_training]

    def find_fixed_buffers(self, call: Call) -> dict[str, Tensor]:
        """Find the buffers that calls of the model update in neither mode."""
        if self._model is None:
            return {}
        changes = [self.find_changes(call, is_training) for is_training in (True, False)]
        if None in changes:
            return {}
        updated = {name for each in changes if each is not None for name in each.tensors}
        return {name: b for name, b in self._model.named_buffers() if name not in updated}

    def forgets_calls(self, call: Call) -> bool:
        """Whether no call of the model depends on those before it, as far as is tried.

        Tried are all probes in both modes, also a little shorter than they are.

        Args:
            call: runs a module on inputs by name.
        """
        if self._forgets is None and self._model is not None and not _is_meta(self._model):
            model = self._model

            def run(root: nn.Module, probe: int, size: int, is_training: bool) -> Any:
                inputs = map_tensors(partial(_crop, size), self.real_inputs(probe))
                return call(root.train(is_training), inputs)

            sizes = (0, *self._frequent_sizes())  # the first crops nothing
            ways = product(range(len(self.inputs)), sizes, (True, False))
            self._forgets = forgets_calls(
                lambda: copy_with(model, lambda _, tensor: clone(tensor)),
                [partial(run, probe=p, size=s, is_training=mode) for p, s, mode in ways],
            )
        return bool(self._forgets)

    def _frequent_sizes(self) -> list[int]:
        """What may be the length of the inputs, or the size of pictures."""
        sizes = Counter(
            size for tensor in tensors_in(self._examples) for size in tensor.shape[1:] if size > 1
        )
        return [size for size, _ in sizes.most_common(2)]

    def _find_all_changes(self, call: Call, is_training: bool) -> Changes | None:
        if self._model is None or _is_meta(self._model):
            return None
        given = [probe for probe in range(len(self.inputs)) if probe not in self.derived]
        found = [self._find_changes(self._model, call, is_training, probe) for probe in given]
        changes = [each for each in found if each is not None]
        if len(changes) < len(found):
            return None
        return Changes(
            tensors=frozenset[str]().union(*(each.tensors for each in changes)),
            bound=frozenset[str]().union(*(each.bound for each in changes)),
            modules=frozenset[str]().union(*(each.modules for each in changes)),
        )

    def _find_changes(
        self,
        model: nn.Module,
        call: Call,
        is_training: bool,
        probe: int,
    ) -> Changes | None:
        root = copy_with(model, lambda _, tensor: clone(tensor)).train(is_training)
        before = {name: (tensor, tensor._version) for name, tensor in named_tensors(root)}
        state = read_state(root)
        random = RandomState()
        try:
            with torch.no_grad():
                call(root, self.real_inputs(probe))
        except Exception:  # the oracle will say so
            return None
        finally:
            random.put_back()
        known, tensors, now = (
            dict(named_tensors(model)),
            dict(named_tensors(root)),
            read_state(root),
        )
        bound = frozenset(
            name for name, (tensor, _) in before.items() if tensors.get(name) is not tensor
        )
        return Changes(
            tensors=bound.union(
                name
                for name, (tensor, version) in before.items()
                if tensor._version != version  # which .data does not count
                or not _is_same(tensor, known[name])
            ),
            bound=bound,
            modules=frozenset(
                path
                for path, name in state.keys() | now.keys()
                if state.get((path, name)) != now.get((path, name))
            ),
        )

    def real_inputs(self, probe: int) -> dict[str, Any]:
        """The inputs of a probe with values: an example, or rows of the first, some twice."""
        further = probe - len(self._rows)
        rows = None if further >= 0 else torch.arange(self._rows[probe]) % max(self._batch, 1)
        example = self._examples[max(0, further + 1)]

        def real(tensor: Tensor) -> Tensor:
            copied = tensor.detach().clone()
            if rows is None or not self._is_batch(tensor):
                return copied
            return copied[rows.to(tensor.device)]

        return {name: map_tensors(real, copy.deepcopy(value)) for name, value in example.items()}


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Copy a value with other tensors in it: in containers and in objects of the user's classes."""
    copies: dict[int, Any] = {}

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if not (isinstance(leaf, dict) or is_plain_object(leaf)):
            return leaf
        if id(leaf) not in copies:
            try:
                made = copy.copy(leaf)
            except Exception:  # of a class with rules of its own
                return leaf
            copies[id(leaf)] = made
            if isinstance(leaf, dict):  # of a class that torch does not know
                for key, item in leaf.items():
                    dict.__setitem__(made, key, of_any(item))
            if hasattr(leaf, "__dict__"):
                vars(made).update({name: of_any(item) for name, item in vars(leaf).items()})
        return copies[id(leaf)]

    def of_any(item: Any) -> Any:
        return pytree.tree_map(of_leaf, item)

    return of_any(value)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a value, as ``map_tensors`` finds them."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, value)
    return found


def _crop(size: int, tensor: Tensor) -> Tensor:
    """Leave out the last element along each dimension of a size, but for the rows."""
    for dim in range(1, tensor.dim()):
        if tensor.shape[dim] == size:
            tensor = tensor.narrow(dim, 0, size - 1)
    return tensor


def _is_same(one: Tensor, other: Tensor) -> bool:
    try:
        return one.dtype == other.dtype and torch.equal(one, other)
    except RuntimeError:
        return False  # of tensors that cannot be compared, such as sparse ones


def _is_meta(model: nn.Module) -> bool:
    return any(tensor.is_meta for _, tensor in named_tensors(model))


def _choose_rows(batch: int) -> tuple[int, ...]:
    """The number of rows of each probe; next to a single row, which broadcasts, two others."""
    if batch == 1:
        return 1, 2, 3
    return (batch, batch + 1) if batch else (0,)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from logging, as errors, that an operation does not fit a probe."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled


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
        if node.target in _NOT_RUN:
            return None
        random = RandomState() if _is_own_code(node, self.root) else None
        try:
            with self.probes.mode, self.contexts.around(node, read):
                return _run_node(node, self.root, read)
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
            return _run_node(node, nn.Module(), read)


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
                if each.target in _NOT_RUN:
                    known[each] = None
                elif each not in known:
                    read = known.__getitem__
                    with self.contexts.around(each, read, has_gradients=False):
                        known[each] = _run_node(each, root, read)
                if each is node:
                    break
        finally:
            random.put_back()
        return known[node]


def _shuffle(tensor: Tensor) -> Tensor:
    order = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(0))
    return tensor.flatten()[order.to(tensor.device)].view(tensor.shape)


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


def _run_node(node: fx.Node, root: nn.Module, read: Callable[[fx.Node], Any]) -> Any:
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
