"""Symbolic tracing with torch.fx that refuses what it would otherwise get silently wrong."""

from __future__ import annotations

import builtins
import dis
import operator
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

from npas_fx.errors import CaptureError
from npas_fx.passes.call import CallSignature
from npas_fx.passes.skeleton import named_tensors

_LOCK = threading.Lock()

# Called without a traced value, these would run while tracing and leave a constant behind: a random
# draw that is the same at every call, a buffer that in-place operations change for good.
_FACTORIES = (
    *("arange", "as_tensor", "bartlett_window", "blackman_window", "empty", "eye", "from_numpy"),
    *("full", "hamming_window", "hann_window", "linspace", "logspace", "normal", "ones", "rand"),
    *("randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"),
)

_IN_PLACE = (
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
)

# Attributes and methods of a tensor that are no tensors.
_PLAIN_ATTRIBUTES = frozenset({"shape", "dtype", "device", "ndim", "layout", "requires_grad"})
_PLAIN_METHODS = frozenset({"size", "dim", "numel", "item", "tolist", "stride", "ndimension"})


class CapturedProxy(fx.Proxy):
    """A traced value; one that stands for a parameter or buffer answers questions on its shape."""

    def __init__(
        self, node: fx.Node, tracer: fx.proxy.TracerBase, known: Tensor | None = None
    ) -> None:
        super().__init__(node, tracer)
        self._known = known

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __getattr__(self, name: str) -> Any:
        if self._known is not None and name in ("shape", "dtype", "ndim"):
            return getattr(self._known, name)
        return super().__getattr__(name)

    def __len__(self) -> int:
        if self._known is None:
            raise TraceError("len() of a traced value is not known while tracing")
        return len(self._known)

    def size(self, dim: int | None = None) -> Any:
        """Shape of a parameter or buffer, or a node that asks for it."""
        if self._known is None:
            args = (self,) if dim is None else (self, dim)
            return self.tracer.create_proxy("call_method", "size", args, {})
        return self._known.shape if dim is None else self._known.shape[dim]

    def dim(self) -> Any:
        """Rank of a parameter or buffer, or a node that asks for it."""
        if self._known is None:
            return self.tracer.create_proxy("call_method", "dim", (self,), {})
        return self._known.dim()

    def numel(self) -> Any:
        """Number of elements of a parameter or buffer, or a node that asks for it."""
        if self._known is None:
            return self.tracer.create_proxy("call_method", "numel", (self,), {})
        return self._known.numel()

    @property
    def is_tensor(self) -> bool:
        """Whether the value is a tensor, as far as the operation that makes it tells."""
        if self.node.op == "call_method":
            return self.node.target not in _PLAIN_METHODS
        if self.node.op == "call_function":
            if self.node.target is getattr:
                return self.node.args[1] not in _PLAIN_ATTRIBUTES
            if self.node.target is operator.getitem:
                source = self.node.args[0]
                assert isinstance(source, fx.Node)
                return CapturedProxy(source, self.tracer).is_tensor
        return True


def _in_place(target: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: CapturedProxy, other: Any) -> Any:
        # fx records `y += 1` as `y = y + 1`, and an alias of y misses the change.
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


for _name in _IN_PLACE:
    setattr(CapturedProxy, f"__{_name}__", _in_place(getattr(operator, _name)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """The trace of one mode.

    Attributes:
        graph: with the modules of torch.nn as calls.
        steps: module path -> what its own forward does, calls of submodules being one step each;
            without constants, so that two modes that differ in these only have equal steps.
        asked_training: paths of the modules whose ``training`` flag was read.
    """

    graph: fx.Graph
    steps: Mapping[str, Sequence[Any]]
    asked_training: frozenset[str]


class _Frame:
    """One call of a module while it is traced: numbers for the values that its code sees."""

    def __init__(self, path: str, arguments: Iterable[fx.Node], steps: list[Any]) -> None:
        self.path = path
        self.steps = steps
        self.tokens: dict[fx.Node, Any] = {}
        for argument in arguments:
            self.tokens.setdefault(argument, ("argument", len(self.tokens)))
        steps.append("called")

    def add(self, node: fx.Node) -> None:
        """Note an operation of the module's own code."""
        if node.op == "get_attr":
            return  # read once, wherever it comes first
        self.steps.append((node.op, node.target, self.shape(node.args), self.shape(node.kwargs)))
        self.tokens[node] = ("step", len(self.steps))

    def shape(self, value: Any) -> Any:
        """Describe arguments without constants."""
        if isinstance(value, fx.Node):
            token = value.target if value.op == "get_attr" else self.tokens.get(value, "result")
            return ("node", token)
        if isinstance(value, (tuple, list)):
            return (type(value), *map(self.shape, value))
        if isinstance(value, Mapping):
            return tuple((key, self.shape(item)) for key, item in value.items())
        if isinstance(value, slice):
            return ("slice", *map(self.shape, (value.start, value.stop, value.step)))
        return "constant" if isinstance(value, (bool, int, float)) else repr(value)


class Tracer(fx.Tracer):
    """Trace one mode of a model.

    Leaves are the modules of torch.nn (but containers), and every module that owns nothing which
    could be shared: no parameter of two or more dimensions in it or below it. So norms, dropout and
    activations of any library stay module calls.
    """

    proxy_buffer_attributes = True  # an update of a buffer is recorded, not run

    def __init__(self, signature: CallSignature, leaves: frozenset[str]) -> None:
        super().__init__()
        self.signature = signature
        self.extra_leaves = leaves
        self.asked_training: set[nn.Module] = set()
        self.names: dict[int, str] = {}
        self.steps: dict[str, list[Any]] = {}
        self._frames: list[_Frame] = []
        self._state: tuple[Any, ...] = ()

    def trace_mode(self, root: nn.Module) -> Trace:
        """Trace ``root`` as it is now; it may be left with traced values in its attributes."""
        self.names = {
            id(tensor): name
            for source in (root.named_buffers(), root.named_parameters())
            for name, tensor in source
        }
        self._state = _ambient_state()
        self._frames = [_Frame("", (), self.steps.setdefault("", []))]
        with _patches(self):
            graph = self.trace(root)
        paths = {module: path for path, module in root.named_modules()}
        asked = frozenset(paths[module] for module in self.asked_training if module in paths)
        return Trace(graph=graph, steps=self.steps, asked_training=asked)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Make the graph's inputs; constants of the call are guarded by a node each."""
        proxies = {
            name: self.create_proxy("placeholder", name, (), {}) for name in self.signature.names
        }

        def call_root(root: nn.Module) -> Any:
            args, kwargs = self.signature.rebuild(proxies, self)
            return root.forward(*args, **kwargs)

        return call_root, [self.root]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Say whether a module stays a call."""
        if module_qualified_name in self.extra_leaves:
            return True
        if super().is_leaf_module(m, module_qualified_name):
            return True
        return not isinstance(m, nn.Sequential) and owns_nothing_shareable(m)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Record or trace the call of a module."""
        if m not in (self.submodule_paths or {}):
            if any(True for _ in named_tensors(m)):
                raise CaptureError(
                    f"a {type(m).__name__} with weights is called but is no submodule of the "
                    "model: register it (in __init__, as an attribute or in a ModuleList)"
                )
            return forward(*args, **kwargs)  # made in forward, like nn.Softmax(dim=1)(x)
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        if m._backward_hooks or m._backward_pre_hooks:
            raise CaptureError(
                f"{path!r} has a backward hook, which a graph cannot keep; remove it and register "
                "it on the emitted module instead"
            )
        arguments: list[fx.Node] = []
        fx.node.map_aggregate((args, kwargs), lambda value: _note_node(value, arguments))
        caller = self._frames[-1]
        caller.steps.append(("enter", path, tuple(map(caller.shape, arguments))))
        self._frames.append(_Frame(path, arguments, self.steps.setdefault(path, [])))
        result = super().call_module(m, forward, args, kwargs)
        self._frames.pop()
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Give a traced value for a parameter or buffer."""
        name = self.names.get(id(attr_val)) if isinstance(attr_val, Tensor) else None
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy(
                "get_attr",
                name,
                (),
                {},
                proxy_factory_fn=lambda node: CapturedProxy(node, self, attr_val),
            )
        return parameter_proxy_cache[name]

    def proxy(self, node: fx.Node) -> CapturedProxy:
        """Wrap a node."""
        return CapturedProxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a node, unless it would lose a context manager of the user's code."""
        if self._state != _ambient_state():
            raise CaptureError(
                "forward switches gradients or autocast on or off (torch.no_grad, enable_grad, "
                "autocast) around traced operations, which a graph does not record; do so around "
                "the call of the model, or inside a submodule without weights of its own"
            )
        node = super().create_node(*args, **kwargs)
        self._frames[-1].add(node)
        return node

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Answer a question of control flow: an ``assert`` becomes a node, others are refused."""
        frame = sys._getframe(2)
        if _is_assert(frame):
            where = f"assertion at {frame.f_code.co_filename}:{frame.f_lineno}"
            self.create_proxy("call_function", torch._assert, (obj, where), {})
            return True
        raise TraceError(
            "forward branches on a value that depends on its inputs; give the model one way "
            "through, or put the branch into a module without weights of its own"
        )

    def create_arg(self, a: Any) -> Any:
        """Turn a Python value into an argument of a node."""
        if isinstance(a, fx.Proxy) and a.tracer is not self:
            raise CaptureError(
                "forward reads a value that an earlier call left on the module; pass it as an "
                "argument, or keep it in a buffer"
            )
        return super().create_arg(a)


def _is_assert(frame: FrameType) -> bool:
    """Whether the truth value that ``frame`` asks for decides an ``assert``."""
    coming = [i for i in dis.get_instructions(frame.f_code) if i.offset >= frame.f_lasti]
    jump = next((k for k, i in enumerate(coming) if "IF_TRUE" in i.opname), len(coming))
    # CPython 3.12 and later have a TO_BOOL before the jump, 3.13 may have a cache entry in between.
    return jump <= 1 and any("ASSERT" in f"{i.opname} {i.argrepr}" for i in coming[jump + 1 :][:2])


def _note_node(value: Any, found: list[fx.Node]) -> Any:
    if isinstance(value, fx.Proxy):
        found.append(value.node)
    return value


def owns_nothing_shareable(module: nn.Module) -> bool:
    """Whether no parameter in or below ``module`` has two or more dimensions.

    A module that refers to others behind torch's back (in a list, say) could read their weights.
    """
    if any(parameter.dim() > 1 for parameter in module.parameters()):
        return False
    return not any(_hides_tensors(value) for part in module.modules() for value in _plain(part))


def _plain(module: nn.Module) -> Iterator[Any]:
    for name, value in vars(module).items():
        if not (name.startswith("_") and name in _MODULE_FIELDS):
            yield value


_MODULE_FIELDS = frozenset(vars(nn.Module()))


def _hides_tensors(value: Any) -> bool:
    if isinstance(value, (list, tuple, set)):
        return any(_hides_tensors(item) for item in value)
    if isinstance(value, dict):
        return any(_hides_tensors(item) for item in value.values())
    return isinstance(value, (nn.Module, nn.Parameter))


def _ambient_state() -> tuple[Any, ...]:
    autocast = (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"))
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


@contextmanager
def _patches(tracer: Tracer) -> Iterator[None]:
    """Change Python and torch, for this trace only, where they would hide something from it."""
    if not _LOCK.acquire(blocking=False):
        raise CaptureError("another capture is running in this process; wait until it is done")
    try:
        with ExitStack() as stack:
            for name in _FACTORIES:
                wrapped = _recorded(tracer, getattr(torch, name))
                stack.enter_context(mock.patch.object(torch, name, wrapped))
            stack.enter_context(mock.patch.object(builtins, "isinstance", _isinstance))
            stack.enter_context(
                mock.patch.object(torch.autograd.Function, "apply", classmethod(_refuse_function))
            )
            stack.enter_context(
                mock.patch.object(nn.Module, "training", _training_of(tracer), create=True)
            )
            stack.enter_context(_unchanged_random_state())
            yield
    finally:
        _LOCK.release()


def _recorded(tracer: Tracer, factory: Callable[..., Any]) -> Callable[..., Any]:
    def record(*args: Any, **kwargs: Any) -> Any:
        return tracer.create_proxy("call_function", factory, args, kwargs)

    return record


_plain_isinstance = builtins.isinstance


def _isinstance(value: Any, kind: Any) -> bool:
    # A proxy is no Tensor, so user code would take the wrong branch without a word.
    if type(value) is CapturedProxy and not _plain_isinstance(value, kind):
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.split(".")[0] not in ("torch", "npas_fx"):
            kinds = kind if _plain_isinstance(kind, tuple) else (kind,)
            return Tensor in kinds and value.is_tensor
    return _plain_isinstance(value, kind)


def _refuse_function(cls: type, *args: Any, **kwargs: Any) -> Any:
    raise CaptureError(
        f"it calls the torch.autograd.Function {cls.__name__}, whose backward a graph would lose; "
        "put the call into a module without weights of its own"
    )


def _training_of(tracer: Tracer) -> property:
    def read(module: nn.Module) -> bool:
        tracer.asked_training.add(module)
        flag: bool = vars(module)["training"]
        return flag

    def write(module: nn.Module, mode: bool) -> None:
        vars(module)["training"] = mode

    return property(read, write)


@contextmanager
def _unchanged_random_state() -> Iterator[None]:
    """Refuse a trace that drew random numbers, and put the generators back in any case."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
        drawn = (
            random.getstate() != states[0]
            or repr(np.random.get_state()) != repr(states[1])
            or not torch.equal(torch.get_rng_state(), states[2])
        )
        if drawn:
            raise CaptureError(
                "forward draws random numbers in Python, which a graph would repeat at each call; "
                "draw them with torch functions, or in a submodule without weights of its own"
            )
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def failing_module(tracer: Tracer) -> str:
    """Path of the innermost module whose call was being traced when tracing failed."""
    paths = [path for path, _ in tracer.module_stack.values()]
    return paths[-1] if paths else ""


def source_line(err: BaseException) -> str:
    """Name the last line outside torch and npas_fx that an error passed through."""
    found = ""
    for frame, line in _frames(err):
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] not in ("torch", "npas_fx", "contextlib", "unittest"):
            found = f"{frame.f_code.co_filename}:{line}"
    return found


def _frames(err: BaseException) -> Iterator[tuple[Any, int]]:
    traceback = err.__traceback__
    while traceback is not None:
        yield traceback.tb_frame, traceback.tb_lineno
        traceback = traceback.tb_next
