"""Symbolic tracing with torch.fx that refuses what it would otherwise get silently wrong."""

from __future__ import annotations

import builtins
import dis
import inspect
import operator
import random
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, is_dataclass
from functools import partial
from types import FrameType, FunctionType, MethodType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list

from npas_fx.errors import CaptureError
from npas_fx.passes.call import CallSignature
from npas_fx.passes.skeleton import named_tensors

_LOCK = threading.Lock()
_plain_isinstance = builtins.isinstance
_BUILTIN = (type(torch.add), type(Tensor.add), type(operator.add))
_PLAIN_CONTAINERS = (dict, list, immutable_dict, immutable_list)
_SEVERAL_OUTPUTS = (
    *(nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.AdaptiveLogSoftmaxWithLoss),
    nn.Transformer,
)
_CONTEXTS = (
    *(torch.no_grad, torch.enable_grad, torch.set_grad_enabled, torch.inference_mode),
    torch.autocast,
)

# Called without a traced value, these would run while tracing and leave a constant behind: a random
# draw that is the same at every call, a buffer that in-place operations change for good.
_FACTORIES = (
    *("arange", "as_tensor", "bartlett_window", "blackman_window", "empty", "eye", "from_numpy"),
    *("full", "hamming_window", "hann_window", "linspace", "logspace", "normal", "ones", "rand"),
    *("randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices"),
    *("asarray", "kaiser_window", "zeros"),
)

_IN_PLACE = (
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
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
_OWN_FIELDS = frozenset({"node", "tracer", "_known"})


class CapturedProxy(fx.Proxy):
    """A traced value; one that stands for a parameter or buffer answers questions on its shape."""

    tracer: Tracer

    def __init__(self, node: fx.Node, tracer: Tracer, known: Tensor | None = None) -> None:
        super().__init__(node, tracer)
        self._known = known

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_is_param":
            raise self.tracer.refusal(
                "forward makes a parameter, or a module with weights; make it in __init__"
            )
        if name not in _OWN_FIELDS:
            raise self.tracer.refusal(
                f"forward assigns to the attribute {name!r} of a traced value, which a graph does "
                "not record; use an in-place method such as copy_ or requires_grad_"
            )
        super().__setattr__(name, value)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __getattr__(self, name: str) -> Any:
        if self._known is not None and name in ("shape", "dtype", "ndim"):
            return getattr(self._known, name)
        made = None if name.startswith("__") else self.made_type(assume_tensor=False)
        if made is not None:
            if not hasattr(made, name):
                raise AttributeError(f"{made.__name__!r} object has no attribute {name!r}")
            if not callable(getattr(made, name)):
                return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return super().__getattr__(name)

    def __len__(self) -> int:
        if self._known is None:
            raise self.tracer.refusal("len() of a traced value is not known while tracing")
        return len(self._known)

    def __hash__(self) -> int:
        made = self.made_type()
        if made is not None and not issubclass(made, Tensor):
            raise self.tracer.refusal(
                f"forward looks a traced {made.__name__} up in a set or a dict; it is not known "
                "while tracing"
            )
        return id(self)  # as a tensor

    def __str__(self) -> str:
        made = self.made_type()
        if made in (torch.dtype, torch.device):
            raise self.tracer.refusal(
                f"forward asks for the text of a traced {made.__name__}, not known while tracing"
            )
        return repr(self)

    def __format__(self, spec: str) -> str:
        return str(self)

    def __int__(self) -> int:
        raise self.tracer.refusal("forward makes a Python number of a traced value")

    def __float__(self) -> float:
        raise self.tracer.refusal("forward makes a Python number of a traced value")

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

    def is_instance(self, kind: Any) -> bool:
        """What ``isinstance`` says of the value that this one stands for."""
        if self._known is not None:
            return _plain_isinstance(self._known, kind)
        made = self.made_type()
        if made is None:
            raise self.tracer.refusal(
                "forward asks for the type of a value that is not known while tracing; put the "
                "question into a module without weights of its own"
            )
        return issubclass(made, kind)

    def made_type(self, *, assume_tensor: bool = True) -> type | None:
        """Type of the value, as far as the operation that makes it tells; None if it does not.

        Args:
            assume_tensor: whether an input of the model that no example tells about is a tensor.
        """
        return self.tracer.made_type(self.node, assume_tensor)


def _in_place(target: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: CapturedProxy, other: Any) -> Any:
        # fx records `y += 1` as `y = y + 1`, and an alias of y misses the change.
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


_IN_PLACE_FUNCTIONS = frozenset(getattr(operator, name) for name in _IN_PLACE)
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
        assumed_tensors: inputs that were taken for tensors when the model's code asked.
    """

    graph: fx.Graph
    steps: Mapping[str, Sequence[Any]]
    asked_training: frozenset[str]
    assumed_tensors: frozenset[str]


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

    Args:
        signature: how the model is called.
        leaves: paths of further modules that stay calls.
        exposed: names of buffers that are plain attributes in the model.
    """

    proxy_buffer_attributes = True  # an update of a buffer is recorded, not run

    def __init__(
        self, signature: CallSignature, leaves: frozenset[str], exposed: frozenset[str]
    ) -> None:
        super().__init__()
        self.signature = signature
        self.extra_leaves = leaves
        self.exposed = exposed
        self.asked_training: set[nn.Module] = set()
        self.assumed_tensors: set[str] = set()
        self.names: dict[int, str] = {}
        self.steps: dict[str, list[Any]] = {}
        self.thread = threading.get_ident()
        self.num_contexts = 0
        self._frames: list[_Frame] = []
        self._state: tuple[Any, ...] = ()
        self._refusal: CaptureError | None = None
        self._proxy_of: dict[str, CapturedProxy] = {}

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
        if self._refusal is not None:
            raise self._refusal  # the user's code caught it and went another way
        paths = {module: path for path, module in root.named_modules()}
        asked = frozenset(paths[module] for module in self.asked_training if module in paths)
        return Trace(
            graph=graph,
            steps=self.steps,
            asked_training=asked,
            assumed_tensors=frozenset(self.assumed_tensors),
        )

    def refusal(self, message: str) -> CaptureError:
        """Make an error to raise, and remember it: a ``try`` in user code may hide it."""
        self._refusal = self._refusal or CaptureError(message)
        return CaptureError(message)

    def made_type(self, node: fx.Node, assume_tensor: bool) -> type | None:
        """See ``CapturedProxy.made_type``."""
        if node.op == "placeholder":
            argument = str(node.target)
            if assume_tensor and argument not in self.signature.types:
                self.assumed_tensors.add(argument)
                return Tensor
            return self.signature.types.get(argument)
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            gives_one = type(module).__module__.startswith("torch.nn.modules.") and not (
                isinstance(module, _SEVERAL_OUTPUTS) or getattr(module, "return_indices", False)
            )
            return Tensor if gives_one else None
        if node.op == "get_attr":
            return Tensor
        if node.op == "call_method":
            if node.target == "size":
                return torch.Size if len(node.args) + len(node.kwargs) == 1 else int
            return None if node.target in _UNKNOWN else _METHODS.get(str(node.target), Tensor)
        if node.target is getattr:
            source, name = node.args
            assert isinstance(source, fx.Node)
            assert isinstance(name, str)
            if name in _ATTRIBUTES:
                return _ATTRIBUTES[name]
            return Tensor if self.made_type(source, assume_tensor) is Tensor else None
        return self._function_type(node, assume_tensor)

    def _function_type(self, node: fx.Node, assume_tensor: bool) -> type | None:
        target = node.target
        assert callable(target)
        made = [
            self.made_type(arg, assume_tensor) if isinstance(arg, fx.Node) else type(arg)
            for arg in node.args
        ]
        if target is operator.getitem:
            if made[0] is torch.Size:
                return torch.Size if made[1] is slice else int
            return made[0] if made[0] is Tensor else None
        module = getattr(target, "__module__", None) or ""
        if module == "_operator":
            if Tensor in made:
                return Tensor
            is_whole = target in (operator.add, operator.sub, operator.mul, operator.floordiv)
            return int if is_whole and set(made) == {int} else None
        is_torch = module.split(".")[0] == "torch" or isinstance(target, _BUILTIN)
        return Tensor if is_torch and target.__name__ not in _UNKNOWN else None

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Make the graph's inputs; constants of the call are guarded by a node each."""
        proxies = {
            name: self.create_proxy("placeholder", name, (), {}) for name in self.signature.names
        }

        def call_root(root: nn.Module) -> Any:
            args, kwargs = self.signature.rebuild(proxies)
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
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        if m not in (self.submodule_paths or {}):
            if any(True for _ in named_tensors(m)):
                raise self.refusal(
                    f"a {type(m).__name__} with weights is called but is no submodule of the "
                    "model: register it (in __init__, as an attribute or in a ModuleList)"
                )
            return forward(*args, **kwargs)  # made in forward, like nn.Softmax(dim=1)(x)
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        if m._backward_hooks or m._backward_pre_hooks:
            raise self.refusal(
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
        return self.read(name, attr_val)

    def read(self, name: str, tensor: Tensor) -> CapturedProxy:
        """Give the traced value of a parameter or buffer, which is read once."""
        if name not in self._proxy_of:
            node = self.create_node("get_attr", name, (), {})
            self._proxy_of[name] = CapturedProxy(node, self, tensor)
        return self._proxy_of[name]

    def proxy(self, node: fx.Node) -> CapturedProxy:
        """Wrap a node."""
        return CapturedProxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a node, unless it would lose a context manager of the user's code."""
        if self.num_contexts or self._state != _ambient_state():
            raise self.refusal(
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
        raise self.refusal(
            "forward branches on a value that depends on its inputs; give the model one way "
            "through, or put the branch into a module without weights of its own"
        )

    def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
        """Refuse to loop over a traced value."""
        raise self.refusal(
            "forward loops over a value that depends on its inputs, or unpacks it with a star; "
            "how long it is, is not known while tracing"
        )

    def create_arg(self, a: Any) -> Any:
        """Turn a Python value into an argument of a node."""
        if isinstance(a, fx.Proxy) and a.tracer is not self:
            raise self.refusal(
                "forward reads a value that an earlier call left on the module; pass it as an "
                "argument, or keep it in a buffer"
            )
        if isinstance(a, nn.Module):
            raise self.refusal(
                f"forward hands a module (a {type(a).__name__}) to another one as an argument, "
                "which a graph cannot; make it a submodule of the one that calls it"
            )
        if isinstance(a, (dict, list)) and type(a) not in _PLAIN_CONTAINERS:
            return self._create_container(a)
        try:
            if isinstance(a, torch.Generator):  # a copy of it would draw other numbers
                raise NotImplementedError
            return super().create_arg(a)
        except NotImplementedError as err:
            raise self.refusal(
                f"forward hands a {type(a).__name__} to a traced operation, which a graph cannot "
                "carry; put the operation into a module without weights of its own"
            ) from err

    def _create_container(self, a: dict[Any, Any] | list[Any]) -> fx.Node:
        """Add a node that makes a container of the user's own class, which a dict is not."""
        kind = type(a)
        if is_dataclass(a) and isinstance(a, dict):
            return self.create_node("call_function", kind, (), super().create_arg(dict(a)))
        if kind.__init__ not in (dict.__init__, OrderedDict.__init__, list.__init__):
            raise self.refusal(
                f"forward makes a {kind.__name__}, which a graph cannot make again; return a "
                "dict, a list, a tuple or a dataclass"
            )
        plain = dict(a) if isinstance(a, dict) else list(a)
        return self.create_node("call_function", kind, (super().create_arg(plain),), {})


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
    if any(parameter.dim() > 1 for _, parameter in module.named_parameters()):
        return False
    return not any(_hides_tensors(value) for part in module.modules() for value in _plain(part))


def _plain(module: nn.Module) -> Iterator[Any]:
    for name, value in vars(module).items():
        if not (name.startswith("_") and name in MODULE_FIELDS):
            yield value


MODULE_FIELDS = frozenset(vars(nn.Module()))


def _hides_tensors(value: Any) -> bool:
    if isinstance(value, (list, tuple, set)):
        return any(_hides_tensors(item) for item in value)
    if isinstance(value, dict):
        return any(_hides_tensors(item) for item in value.values())
    if isinstance(value, MethodType):
        return _hides_tensors(value.__self__)
    if isinstance(value, partial):
        return _hides_tensors((value.func, value.args, value.keywords))
    if isinstance(value, FunctionType):
        return any(map(_hides_tensors, inspect.getclosurevars(value).nonlocals.values()))
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
            stack.enter_context(mock.patch.object(torch, "is_tensor", _is_tensor))
            stack.enter_context(mock.patch.object(nn.Module, "parameters", _parameters_of(tracer)))
            stack.enter_context(mock.patch.object(nn.Module, "__setattr__", _set_attribute))
            for context in _CONTEXTS:
                for name, step in (("__enter__", 1), ("__exit__", -1)):
                    counted = _counted(tracer, getattr(context, name), step)
                    stack.enter_context(mock.patch.object(context, name, counted))
            stack.enter_context(
                mock.patch.object(torch.autograd.Function, "apply", _refuse_function(tracer))
            )
            stack.enter_context(
                mock.patch.object(nn.Module, "training", _training_of(tracer), create=True)
            )
            stack.enter_context(_unchanged_random_state())
            stack.callback(torch.set_grad_enabled, torch.is_grad_enabled())
            yield
    finally:
        _LOCK.release()


def _recorded(tracer: Tracer, factory: Callable[..., Any]) -> Callable[..., Any]:
    def record(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != tracer.thread:  # a data loader's, say
            return factory(*args, **kwargs)
        return tracer.create_proxy("call_function", factory, args, kwargs)

    return record


def _isinstance(value: Any, kind: Any) -> bool:
    # A proxy is no Tensor, so user code would take the wrong branch without a word.
    if type(value) is CapturedProxy and not _plain_isinstance(value, kind):
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.split(".")[0] not in ("torch", "npas_fx"):
            return value.is_instance(kind)
    return _plain_isinstance(value, kind)


def _is_tensor(value: Any) -> bool:
    if type(value) is CapturedProxy:
        return value.is_instance(Tensor)
    return _plain_isinstance(value, Tensor)


def _refuse_function(tracer: Tracer) -> Any:
    def refuse(cls: type, *args: Any, **kwargs: Any) -> Any:
        raise tracer.refusal(
            f"it calls the torch.autograd.Function {cls.__name__}, whose backward a graph would "
            "lose; put the call into a module without weights of its own"
        )

    return classmethod(refuse)


def _parameters_of(tracer: Tracer) -> Callable[..., Any]:
    # Else `next(self.parameters()).device` would be the device of a copy without values.
    def parameters(module: nn.Module, recurse: bool = True) -> Iterator[Any]:
        for _, parameter in module.named_parameters(recurse=recurse):
            name = tracer.names.get(id(parameter))
            yield parameter if name is None else tracer.read(name, parameter)

    return parameters


def _counted(tracer: Tracer, method: Callable[..., Any], step: int) -> Callable[..., Any]:
    def count(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == tracer.thread:
            tracer.num_contexts += step
        return method(*args, **kwargs)

    return count


_plain_setattr: Callable[[nn.Module, str, Any], None] = nn.Module.__setattr__


def _set_attribute(module: nn.Module, name: str, value: Any) -> None:
    if type(value) is not CapturedProxy or name not in {**module._parameters, **module._buffers}:
        return _plain_setattr(module, name, value)
    node, owned = value.node, module._buffers.get(name)
    if owned is not None and value.tracer.names.get(id(owned)) in value.tracer.exposed:
        module._buffers.pop(name)  # a plain attribute after all
        return _plain_setattr(module, name, value)
    changed = node.args[0] if node.target in _IN_PLACE_FUNCTIONS else node
    if (
        owned is not None
        and changed is value.tracer.read(value.tracer.names[id(owned)], owned).node
    ):
        return None  # `self.count += 1`: the buffer itself was changed
    raise value.tracer.refusal(
        f"forward assigns another tensor to the parameter or buffer {name!r}, which a graph does "
        f"not record; change it in place: self.{name}.copy_(value)"
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
