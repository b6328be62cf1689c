"""Probes: a few example runs of a model, which answer what its code asks while it is traced."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    FakeTensorMode,
)

from npas_fx.passes.history import forgets_calls
from npas_fx.passes.python_state import read_state
from npas_fx.passes.rollback import RandomState
from npas_fx.passes.skeleton import clone, copy_with, named_tensors
from npas_fx.passes.tensor_trees import map_tensors, tensors_in

Call = Callable[[nn.Module, Mapping[str, Any]], Any]  # runs a module on inputs by name


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
