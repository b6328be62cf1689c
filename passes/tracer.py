"""Symbolic tracing with torch.fx that refuses what it would otherwise get silently wrong."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.nn.functional import multi_head_attention_forward

from npas_fx.errors import BusyError, CaptureError, UntraceableError
from npas_fx.passes.buffer_slots import BufferSlots
from npas_fx.passes.call import CallSignature
from npas_fx.passes.call_state import may_return_none
from npas_fx.passes.entered import Entered
from npas_fx.passes.functions import ApplyFunction
from npas_fx.passes.guards import describe
from npas_fx.passes.leaves import hidden_modules, makes_own_weights, owns_nothing_shareable
from npas_fx.passes.objects import FIXED, RemakeObject, is_plain_object
from npas_fx.passes.patches import patches
from npas_fx.passes.probes import Probes
from npas_fx.passes.proxy import CapturedProxy
from npas_fx.passes.questions import UNKNOWN, Questions
from npas_fx.passes.raising_branches import Conditions, check_branch, find_raising_branch
from npas_fx.passes.rebinding import names_set_by_calls
from npas_fx.passes.rollback import RandomState, note_state
from npas_fx.passes.say_why import say_why
from npas_fx.passes.skeleton import named_tensors
from npas_fx.passes.tried_numbers import TriedNumbers
from npas_fx.passes.value_types import MadeTypes, takes_part

# In the meta of a node: the results of traced calls that it is, each with the path of the module,
# the number of the call, and its place among the leaves of what that returns; None if it is all.
RESULTS = "results"
_PLAIN_CONTAINERS = (dict, list, immutable_dict, immutable_list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """The trace of one mode.

    Attributes:
        graph: with the modules of torch.nn as calls.
        failed: path of each module that could not be traced, and is a call as well -> why; with the
            root (``""``) among them the graph is empty.
        asked_training: paths of the modules whose ``training`` flag was read.
        flags_before: node -> those of them that were read so that the node could depend on it: by
            the calls that the node is in, or by a call that gave them a constant.
        flags: module path -> its training flag in this mode.
        assumed_tensors: inputs that were taken for tensors when the model's code asked.
    """

    graph: fx.Graph
    failed: Mapping[str, str]
    asked_training: frozenset[str]
    flags_before: Mapping[fx.Node, frozenset[str]]
    flags: Mapping[str, bool]
    assumed_tensors: frozenset[str]


def no_trace(why: str) -> Trace:
    """What a trace gives where the root cannot be traced."""
    nothing = frozenset[str]()
    return Trace(
        graph=fx.Graph(),
        failed={"": why},
        asked_training=nothing,
        flags_before={},
        flags={},
        assumed_tensors=nothing,
    )


class Tracer(fx.Tracer):
    """Trace one mode of a model.

    Leaves are the modules of torch.nn (but containers), and every module that owns nothing which
    could be shared: no parameter of two or more dimensions in it or below it. So norms, dropout and
    activations of any library stay module calls. A module that is handed another one is traced.

    Args:
        signature: how the model is called.
        leaves: paths of further modules that stay calls.
        exposed: names of buffers that are plain attributes in the model.
        probes: example runs that answer what the code asks; None without an example.
    """

    proxy_buffer_attributes = True  # an update of a buffer is recorded, not run

    def __init__(
        self,
        signature: CallSignature,
        leaves: frozenset[str],
        exposed: frozenset[str],
        probes: Probes | None = None,
    ) -> None:
        super().__init__()
        self.questions = Questions(probes, signature.run)
        self.signature = signature
        self.extra_leaves = leaves
        self.exposed = exposed
        self.failed: dict[str, str] = {}
        self.called: set[nn.Module] = set()
        self.assigned: list[tuple[str, nn.Module, str]] = []
        self.asked_training: set[str] = set()
        self.flags_before: dict[fx.Node, frozenset[str]] = {}
        self.assumed_tensors: set[str] = set()
        self._types = {  # whether an input that no example tells about is taken for a tensor
            False: MadeTypes(lambda: self.root, self._input_type),
            True: MadeTypes(lambda: self.root, self._assumed_type),
        }
        self.names: dict[int, str] = {}
        self.thread = threading.get_ident()
        self._asked: list[set[str]] = []  # the same by the calls that are being traced, each
        self.contexts = Entered(self._create_operation)
        self.first_refusal: CaptureError | None = None
        self._proxy_of: dict[str, CapturedProxy] = {}
        self._has_returned = False  # the root, so that what it gave is no longer changed
        self._num_traced = 0  # calls of modules
        self._objects: dict[int, fx.Node | None] = {}
        self.numbers = TriedNumbers(self)
        self.conditions = Conditions()
        self.slots: BufferSlots  # of the root
        self._handed_others: set[nn.Module] = set()  # they may read the weights of those

    def trace_mode(self, root: nn.Module) -> Trace:
        """Trace ``root`` as it is now; it may be left with traced values in its attributes."""
        self.names = {
            id(tensor): name
            for source in (root.named_buffers(), root.named_parameters())
            for name, tensor in source
        }
        self.slots = BufferSlots(self, root)
        self.contexts.begin()
        self._asked = [set()]
        random = RandomState()
        try:
            with patches(self):
                graph = self.trace(root)
            self._check(root, random)
        except (BusyError, UntraceableError):
            raise
        except Exception as err:
            graph, self.failed = fx.Graph(), {"": say_why(err)}
        finally:
            random.put_back()
            self.slots.put_back()
        if hand_overs := self._find_hand_overs():
            raise UntraceableError(hand_overs)
        return Trace(
            graph=graph,
            failed=self.failed,
            asked_training=frozenset(self.asked_training),
            flags_before=self.flags_before,
            flags={path: module.training for path, module in root.named_modules()},
            assumed_tensors=frozenset(self.assumed_tensors),
        )

    def refusal(self, message: str) -> CaptureError:
        """Make an error to raise, and remember it: a ``try`` in user code may hide it."""
        self.first_refusal = self.first_refusal or CaptureError(message)
        return CaptureError(message)

    def note_asked(self, module: nn.Module) -> None:
        """Note that the code that is being traced has read the ``training`` flag of ``module``."""
        path = (self.submodule_paths or {}).get(module)
        if path is not None and self.is_tracing():
            self.asked_training.add(path)
            self._asked[-1].add(path)

    def is_tracing(self) -> bool:
        """Whether the code that runs is that of the model: in its thread, and for the graph."""
        return not self.questions.is_asking and threading.get_ident() == self.thread

    def is_none(self, proxy: CapturedProxy, key: Any) -> bool:
        """Whether one of the results of a call is None, where no example tells.

        Raises:
            CaptureError: it could be, for all one knows.
        """
        node = proxy.node
        is_result = node.op == "call_module" and isinstance(key, (int, str))
        if not is_result or self.questions.values_of(node) is not None:
            return False
        module = self.root.get_submodule(str(node.target))
        if isinstance(module, nn.MultiheadAttention):
            given = {**dict(zip(("need_weights",), node.args[4:], strict=False)), **node.kwargs}
            return key == 1 and given.get("need_weights", True) is False
        if module.__module__.startswith("torch.nn."):
            return False
        raise self.refusal(
            f"forward takes one of the results of a {type(module).__name__}, and whether it is "
            "None is not known without an example"
        )

    def made_type(self, node: fx.Node, assume_tensor: bool) -> type | None:
        """See ``CapturedProxy.made_type``."""
        static = self._static_type(node, assume_tensor=False)
        values = None if static is not None else self.questions.values_of(node)
        if values is not None:
            types = {Tensor if isinstance(value, Tensor) else type(value) for value in values}
            return types.pop() if len(types) == 1 else None
        return static or self._static_type(node, assume_tensor)

    def is_known_type(self, node: fx.Node) -> bool:
        """Whether the operation that makes a value, or the check of the inputs, tells its type."""
        return self._static_type(node, assume_tensor=True) is not None

    def _static_type(self, node: fx.Node, assume_tensor: bool) -> type | None:
        return self._types[assume_tensor].of(node)

    def _input_type(self, argument: str) -> type | None:
        return self.signature.types.get(argument)

    def _assumed_type(self, argument: str) -> type:
        if argument not in self.signature.types:
            self.assumed_tensors.add(argument)
        return self.signature.types.get(argument, Tensor)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Make the inputs of the graph; the constants of the call are guarded by `forward`."""
        proxies = {
            name: self.create_proxy("placeholder", name, (), {}) for name in self.signature.names
        }

        def call_root(root: nn.Module) -> Any:
            args, kwargs = self.signature.rebuild(proxies)
            result = root.forward(*args, **kwargs)
            if self.contexts:
                raise self.refusal("forward enters a context manager of torch's and stays in it")
            self._has_returned = True
            return result

        return call_root, [self.root]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Say whether a module stays a call."""
        if module_qualified_name in self.extra_leaves or module_qualified_name in self.failed:
            return True
        if not isinstance(m, nn.Sequential) and owns_nothing_shareable(m):
            return m not in self._handed_others
        return super().is_leaf_module(m, module_qualified_name) and not makes_own_weights(m)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Record or trace the call of a module."""
        if not self.is_tracing():
            return forward(*args, **kwargs)
        if m not in (self.submodule_paths or {}):
            if any(True for _ in named_tensors(m)):
                raise self.refusal(
                    f"a {type(m).__name__} with weights is called but is no submodule of the "
                    "model: register it (in __init__, as an attribute or in a ModuleList)"
                )
            return forward(*args, **kwargs)  # made in forward, like nn.Softmax(dim=1)(x)
        path = self.path_of_module(m)
        if any(isinstance(value, nn.Module) for value in leaves_of((args, kwargs))):
            self._handed_others.add(m)
        is_leaf = self.is_leaf_module(m, path)
        if not is_leaf and (m._backward_hooks or m._backward_pre_hooks):
            self.failed[path] = "it has a backward hook"
        if is_leaf or path in self.failed:
            return self._call_leaf(m, forward, args, kwargs)
        undo = self._note(m, (args, kwargs))
        asked = self._asked[-1]
        self._asked.append(set(asked))
        random = RandomState()
        try:
            result = super().call_module(m, forward, args, kwargs)
            self._check(m, random)
        except BusyError:
            raise
        except Exception as err:
            self.failed[path] = say_why(err)
            has_changed_arguments = undo()
            random.put_back()
            if has_changed_arguments:
                why = f"the call of {path!r} changes a list or dict that it is given"
                raise self.refusal(why) from err
            return self._call_leaf(m, forward, args, kwargs)
        called = self._asked.pop()
        if not all(value is None or isinstance(value, fx.Proxy) for value in leaves_of(result)):
            asked |= called  # a constant may follow a flag that the call has read
        self._num_traced += 1
        is_one = isinstance(result, fx.Proxy)  # perhaps of a container
        for place, value in [(None, result)] if is_one else enumerate(leaves_of(result)):
            if isinstance(value, fx.Proxy):
                value.node.meta.setdefault(RESULTS, []).append((path, self._num_traced, place))
        return result

    def _call_leaf(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self.called.add(m)
        # What a call leaves on modules is not there now: who reads it cannot be traced.
        names, hidden = names_set_by_calls(m), list(hidden_modules(m))
        for part in hidden:
            if bound := [name for name in names if self.slots.has_buffer(part, name)]:
                raise self.refusal(
                    f"it calls a {type(m).__name__}, which may bind the buffer {bound[0]!r} of a "
                    f"{type(part).__name__} that is not below it"
                )
        for part in (*m.modules(), *hidden):
            for name in names:
                vars(part).pop(name, None)
                self.slots.take_out(part, name)
        return super().call_module(m, forward, args, kwargs)

    def note_assigned(self, module: nn.Module, name: str) -> None:
        """Note that the code that is being traced has assigned an attribute."""
        if self.is_tracing():
            setter = next((path for path, _ in reversed(self.module_stack.values())), "")
            self.assigned.append((setter, module, name))

    def _find_hand_overs(self) -> dict[str, str]:
        """Paths of modules whose code assigns to what a call reads, which the call would miss."""
        inside = {part for module in self.called for part in module.modules()}
        return {
            setter: f"it assigns the attribute {name!r} of a module that is called as it is"
            for setter, module, name in self.assigned
            if module in inside
        }

    def _check(self, module: nn.Module, random: RandomState) -> None:
        """Refuse what the code of a module that was just traced has done without an error."""
        if self.first_refusal is None and (name := self.slots.find_change(module)):
            raise self.refusal(
                f"forward adds, replaces or deletes the parameter or buffer {name!r}, which a "
                "graph does not record; assign a tensor of the same shape to a buffer that is there"
            )
        if not random.is_now():
            raise self.refusal(
                "forward draws random numbers in Python, which a graph would repeat at each call; "
                "draw them with torch functions, or in a submodule without weights of its own"
            )
        if self.first_refusal is not None:
            raise self.first_refusal  # the user's code caught it and went another way

    def _note(self, module: nn.Module, arguments: Any) -> Callable[[], bool]:
        """Note where the trace is; the function that is returned takes it back there.

        It says whether the code has changed its arguments.
        """
        put_back = note_state(module, arguments)
        depth, num_assigned, stack = len(self._asked), len(self.assigned), dict(self.module_stack)
        leave_contexts = self.contexts.note()
        num_bound = self.slots.length()
        last = self.last_node()

        def undo() -> bool:
            is_changed = put_back()
            self.slots.undo(num_bound)
            self.first_refusal = None
            del self._asked[depth:], self.assigned[num_assigned:]
            leave_contexts()
            self.module_stack.clear()
            self.module_stack.update(stack)
            self.erase_behind(last)
            return is_changed

        return undo

    def last_node(self) -> fx.Node:
        """The node that was added last."""
        last: fx.Node = next(iter(reversed(self.graph.nodes)))
        return last

    def erase_behind(self, last: fx.Node) -> None:
        """Take back what was added after a node."""
        erased = set()
        while (node := self.last_node()) is not last:
            self.graph.erase_node(node)
            self.flags_before.pop(node, None)
            erased.add(node)
        if erased:
            self.questions.forget(erased)
            self._proxy_of = {k: p for k, p in self._proxy_of.items() if p.node not in erased}

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Give a traced value for a parameter or buffer."""
        if not self.is_tracing():
            return attr_val
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

    def proxy(self, node: fx.Node) -> Any:
        """Wrap a node; what is None in all probes is None, since ``is`` cannot be asked for."""
        proxy = CapturedProxy(node, self)
        if self._may_be_none(node):
            values = self.questions.values_of(node)
            if values is None or self.questions.depends_on_data(node):
                self._refuse_unknown(node)
            is_none = self.questions.ask(proxy, "is None")
            if is_none is True:
                return None
            if is_none is UNKNOWN and values is not None and any(v is None for v in values):
                raise self.refusal(
                    "whether a value is None depends on the number of rows, or on the example"
                )
        return proxy

    def _refuse_unknown(self, node: fx.Node) -> None:
        if node.op == "call_module":
            kind = type(self.root.get_submodule(str(node.target))).__name__
            raise self.refusal(f"a {kind} may return None, and whether it does is not known")
        if isinstance(node.target, ApplyFunction):
            raise self.refusal(
                f"what the torch.autograd.Function {node.target.kind.__name__} gives is not known "
                "without an example"
            )
        known = map(self.questions.values_of, (*node.all_input_nodes, node))
        if [each is None for each in known] == [False, True]:
            raise self.refusal(f"one of the examples has no {describe(node)}")

    def _may_be_none(self, node: fx.Node) -> bool:
        """Whether a value could be None: a result of a module or a part of it, or of an input.

        A part is also what a method gives of it, such as ``get`` of a dict.
        """
        if self._static_type(node, assume_tensor=False) not in (None, type(None)):
            return False
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            is_of_torch = module.__module__.startswith("torch.nn.")
            if is_of_torch and not isinstance(module, nn.Identity):
                return False
            return may_return_none(module, node.args, node.kwargs)
        source = node
        while takes_part(source) and source.all_input_nodes:
            source = source.all_input_nodes[0]
            if self.made_type(source, assume_tensor=False) is Tensor:
                return False
        if isinstance(source.target, ApplyFunction):
            return True
        is_given = source.op in ("call_module", "placeholder")
        return node is not source and (is_given or source.target is multi_head_attention_forward)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a node, unless it would lose a context manager of the user's code."""
        if not self.contexts.are_recorded():
            raise self.refusal(
                "forward switches gradients or autocast around traced operations in a way that a "
                "graph does not record (inference_mode, or without a `with`); do so around the "
                "call of the model, with torch.no_grad(), enable_grad() or autocast, or inside a "
                "submodule without weights of its own"
            )
        node = super().create_node(*args, **kwargs)
        self.questions.note(node, self.contexts.nodes())
        self.flags_before[node] = frozenset(self._asked[-1])
        return node

    def _create_operation(self, target: Callable[..., Any], arguments: tuple[Any, ...]) -> fx.Node:
        args = (arg if isinstance(arg, fx.Node) else self.create_arg(arg) for arg in arguments)
        return self.create_node("call_function", target, tuple(args), {})

    def note_entered(self, context: Any) -> None:
        """Record that the code that is being traced has entered a context manager of torch's."""
        if self.is_tracing():
            self.contexts.enter(context, sys._getframe(2))

    def note_left(self, context: Any) -> None:
        """Record that it has left it."""
        if self.is_tracing():
            self.contexts.leave(context)

    def refuse_question_of_mode(self, name: str, contexts: tuple[type, ...]) -> None:
        """Refuse that code asks what its caller has switched; what it has itself is known.

        Raises:
            CaptureError: another call may be made in another mode.
        """
        if not self.contexts.includes(contexts):
            raise self.refusal(
                f"forward asks torch.{name}(), which depends on where it is called; put the "
                "question into a module without weights of its own"
            )

    def to_bool(self, obj: Any) -> bool:
        """Answer a question of control flow; where one way only raises, by the other one."""
        frame = sys._getframe(2)
        branch = find_raising_branch(frame, self.contexts.frames())
        is_asked = branch is None or not self.questions.may_vary(obj.node)
        if is_asked and (answer := self.questions.ask(obj, "bool")) is not UNKNOWN:
            return bool(answer)
        if branch is not None:
            conditions = self.conditions.add(branch, obj)
            if branch.leads_on:
                return branch.raises_if
            found = " and ".join(f"{describe(c.node)} is {holds}" for c, holds in conditions)
            what = f"{found}, for which the code of the model raises, at {branch.line}"
            arguments = (conditions, branch.kind, what)
            self.create_proxy("call_function", check_branch, arguments, {})
            return not branch.raises_if
        raise self.refusal(
            "forward branches on a value that depends on its inputs; give the model one way "
            "through, or put the branch into a module without weights of its own"
        )

    def iter(self, obj: Any) -> Iterator[Any]:
        """Take a traced value apart, if an example tells how long it is."""
        length = self.questions.ask(obj, "len")
        if length is not UNKNOWN:
            return iter([obj[k] for k in range(length)])
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
                f"forward hands a module (a {type(a).__name__}) to one that is called as it is, "
                "which a graph cannot; make it a submodule of the one that calls it"
            )
        if isinstance(a, (dict, list)) and type(a) not in _PLAIN_CONTAINERS:
            return self._create_container(a)
        if isinstance(a, np.generic):
            return a.item()
        if isinstance(a, Tensor) and self.slots.may_be_bound_anew(a):
            raise self.refusal(
                "forward reads a buffer from a list or alike, and may bind its name to another one"
            )
        if isinstance(a, torch.Size):  # which fx would make a tuple
            return self.create_node("call_function", type(a), (tuple(a),), {})
        if self._has_returned and is_plain_object(a):
            return self._create_object(a)
        if not isinstance(a, torch.Generator):  # a copy of one would draw other numbers
            with suppress(NotImplementedError):
                return super().create_arg(a)
        raise self.refusal(
            f"forward hands a {type(a).__name__} to a traced operation, which a graph cannot "
            "carry; put the operation into a module without weights of its own"
        )

    def _create_object(self, a: object) -> fx.Node:
        """Add a node that makes an object of the user's own class, such as a key-value cache."""
        if id(a) not in self._objects:
            self._objects[id(a)] = None
            fixed = {k: v for k, v in vars(a).items() if isinstance(v, FIXED)}
            varying = {k: self.create_arg(v) for k, v in vars(a).items() if k not in fixed}
            make = RemakeObject(type(a), vars(a), fixed)
            self._objects[id(a)] = self.create_node("call_function", make, (varying,), {})
        node = self._objects[id(a)]
        if node is None:
            raise self.refusal(f"forward returns a {type(a).__name__} that contains itself")
        return node

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


def leaves_of(value: Any) -> Iterator[Any]:
    """What is in a value of containers; these may be of types that cannot be made anew."""
    if isinstance(value, (list, tuple)):
        inside: Iterable[Any] = value
    elif isinstance(value, dict):
        inside = value.values()
    elif isinstance(value, slice):
        inside = (value.start, value.stop, value.step)
    else:
        yield value
        return
    for item in inside:
        yield from leaves_of(item)
