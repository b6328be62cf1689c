"""The traced value: what stands for a tensor (or its shape, dtype, …) while ``forward`` runs."""

from __future__ import annotations

import dis
import operator
import sys
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from npas_fx.passes.guards import describe
from npas_fx.passes.purity import IN_PLACE_FUNCTIONS
from npas_fx.passes.questions import UNKNOWN

if TYPE_CHECKING:
    from npas_fx.passes.tracer import Tracer

_LEN = len  # while tracing, the name stands for a patch
_OWN_FIELDS = frozenset({"node", "tracer", "_known"})
_KEYS = (str, int, float, bool, type(None))
_VIEWS: dict[str, Callable[[Mapping[Any, Any]], Any]] = {
    "items": ItemsView,
    "values": ValuesView,
}
_KNOWN_OF_WEIGHTS = ("shape", "dtype", "ndim", "size", "dim", "numel")


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
        if name == "requires_grad":
            self.tracer.create_proxy("call_method", "requires_grad_", (self, value), {})
            return
        if name not in _OWN_FIELDS:
            raise self.tracer.refusal(
                f"forward assigns to the attribute {name!r} of a traced value, which a graph does "
                "not record; use an in-place method such as copy_ or requires_grad_"
            )
        super().__setattr__(name, value)

    def __getitem__(self, key: Any) -> Any:
        if self.tracer.is_none(self, key):
            return None
        return self.tracer.create_proxy("call_function", operator.getitem, (self, key), {})

    def __iter__(self) -> Iterator[Any]:
        if (keys := self.keys_asked()) is not None:
            return iter(keys)
        frame = sys._getframe(1)
        code, last = frame.f_code.co_code, frame.f_lasti
        if dis.opname[code[last]] == "UNPACK_SEQUENCE":
            return (self[k] for k in range(code[last + 1]))
        items: Iterator[Any] = self.tracer.iter(self)
        return items

    def __reversed__(self) -> Iterator[Any]:
        items: list[Any] = list(self)
        return iter(items[::-1])

    def __contains__(self, key: Any) -> bool:
        if not self._is_mapping():
            return key in iter(self)  # as without this method
        answer = UNKNOWN
        if type(key) in _KEYS:
            answer = self.tracer.questions.ask(self, "has key", key)
        if answer is UNKNOWN:
            raise self.tracer.refusal(
                f"forward asks whether {describe(self.node)} has a key, which is not known while "
                "tracing, or differs between the examples"
            )
        return bool(answer)

    def keys_asked(self) -> tuple[Any, ...] | None:
        """The keys of a traced dict or alike; None for anything else."""
        if not self._is_mapping():
            return None
        keys = self.tracer.questions.ask(self, "keys")
        if keys is UNKNOWN:
            raise self.tracer.refusal(
                f"forward asks for the keys of {describe(self.node)}, which differ between the "
                "examples"
            )
        return tuple(keys)

    def keys(self) -> Any:
        """What ``keys`` gives; it is also asked by ``**`` and ``dict``."""
        return KeysView(_Keyed(self)) if self._is_mapping() else CapturedAttribute(self, "keys")()

    def _is_mapping(self) -> bool:
        made = self.made_type(assume_tensor=False)
        return made is not None and issubclass(made, Mapping)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __getattr__(self, name: str) -> Any:
        if self._known is not None and name in _KNOWN_OF_WEIGHTS:
            return getattr(self._known, name)
        if name == "__dataclass_fields__":
            return self._fields()
        made = None if name.startswith("__") else self.made_type(assume_tensor=False)
        if made is not None:
            if issubclass(made, Mapping) and name in _VIEWS:
                return lambda: _VIEWS[name](_Keyed(self))
            if not hasattr(made, name):
                return self._own_attribute(made, name)
            if not callable(getattr(made, name)):
                return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        elif not name.startswith("__"):
            self._refuse_if_some_lack(name)
        return CapturedAttribute(self, name)

    def _fields(self) -> Any:
        """What ``dataclasses.fields`` reads, which compares with ``is``."""
        made = self.made_type()
        if made is None or not is_dataclass(made):
            raise AttributeError("not a dataclass")
        self._guard_type()
        return made.__dataclass_fields__

    def _own_attribute(self, made: type, name: str) -> Any:
        """Read an attribute that an object may have, and its class has not."""
        has_it = False
        if issubclass(made, Tensor) or not made.__dictoffset__:
            self._refuse_if_some_have(name)
            self._guard_type()
        else:
            has_it = self.tracer.questions.ask(self, "has attribute", name)
        if has_it is UNKNOWN:
            self._refuse_if_some_have(name)
        if has_it is True:
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        raise AttributeError(f"{made.__name__!r} object has no attribute {name!r}")

    def _refuse_if_some_have(self, name: str) -> None:
        """Refuse an attribute that the object has, and not its class: others may lack it."""
        if True in self._have(name):
            raise self.tracer.refusal(
                f"forward reads {describe(self.node)}.{name}, which not all objects of its "
                "class have"
            )

    def _refuse_if_some_lack(self, name: str) -> None:
        if _LEN(self._have(name)) > 1:
            raise self.tracer.refusal(f"one of the examples has no {describe(self.node)}.{name}")

    def _have(self, name: str) -> set[bool]:
        values = self.tracer.questions.values_of(self.node) or ()
        return {hasattr(value, name) for value in values}

    def __len__(self) -> int:
        length = self.tracer.questions.ask(self, "len")
        if length is not UNKNOWN:
            return int(length)
        raise self.tracer.refusal("len() of a traced value is not known while tracing")

    def length(self) -> Any:
        """What ``len`` gives: a number, or a traced one where it may vary."""
        if self._known is not None:
            return self._known.shape[0]
        return self.tracer.create_proxy("call_function", _LEN, (self,), {})

    def __hash__(self) -> int:
        made = self.made_type()
        if made is not None and not issubclass(made, Tensor):
            value = self.tracer.questions.ask(self, "value")
            if value is not UNKNOWN:
                return hash(value)
            raise self.tracer.refusal(
                f"forward looks a traced {made.__name__} up in a set or a dict; it is not known "
                "while tracing"
            )
        return id(self)  # as a tensor

    def __str__(self) -> str:
        made = self.made_type()
        if made is not None and not issubclass(made, Tensor):
            text = self.tracer.questions.ask(self, "str")
            if text is not UNKNOWN:
                return str(text)
        if made in (torch.dtype, torch.device):
            raise self.tracer.refusal(
                f"forward asks for the text of a traced {made.__name__}, not known while tracing"
            )
        return repr(self)

    def __format__(self, spec: str) -> str:
        return str(self)

    def __int__(self) -> int:
        return int(self._number("int"))

    def __index__(self) -> int:
        self.node  # noqa: B018  # made before what may be taken back
        return self.tracer.numbers.ask(sys._getframe(1), self.__int__)

    @classmethod
    def __torch_function__(
        cls, orig_method: Any, types: Any, args: Any = None, kwargs: Any = None
    ) -> Any:
        """Record the call of a function of torch."""
        for proxy in proxies_in((args, kwargs))[:1]:
            proxy.tracer.numbers.forget(sys._getframe(1))
        return super().__torch_function__(orig_method, types, args, kwargs)

    def __float__(self) -> float:
        return float(self._number("float"))

    def _number(self, question: str) -> Any:
        number = self.tracer.questions.ask(self, question)
        if number is UNKNOWN:
            raise self.tracer.refusal("forward makes a Python number of a traced value")
        return number

    def is_instance(self, kind: Any) -> bool:
        """What ``isinstance`` says of the value that this one stands for."""
        if self._known is not None:
            return isinstance(self._known, kind)
        made = self.made_type()
        if made is None:
            raise self.tracer.refusal(
                "forward asks for the type of a value that is not known while tracing; put the "
                "question into a module without weights of its own"
            )
        self._guard_type()
        return issubclass(made, kind)

    def _guard_type(self) -> None:
        if not self.tracer.is_known_type(self.node):
            self.tracer.questions.ask(self, "type")

    def made_type(self, *, assume_tensor: bool = True) -> type | None:
        """Type of the value, as far as the operation that makes it tells; None if it does not.

        Args:
            assume_tensor: whether an input of the model that no example tells about is a tensor.
        """
        return self.tracer.made_type(self.node, assume_tensor)


class CapturedAttribute(CapturedProxy):
    """An attribute of a traced value: a method, unless it is used as a value."""

    def __init__(self, owner: CapturedProxy, name: str) -> None:
        fields = vars(self)
        fields["tracer"], fields["_owner"], fields["_name"] = owner.tracer, owner, name
        fields["_known"] = fields["_node"] = None

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        """The node that reads it, made when it is needed."""
        fields = vars(self)
        if fields["_node"] is None:
            arguments = (fields["_owner"], fields["_name"])
            made = self.tracer.create_proxy("call_function", getattr, arguments, {})
            fields["_node"] = made.node
        node: fx.Node = fields["_node"]
        return node

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Record the call of a method."""
        fields = vars(self)
        arguments = (fields["_owner"], *args)
        return self.tracer.create_proxy("call_method", fields["_name"], arguments, kwargs)


class _Keyed(Mapping[Any, Any]):
    """A traced dict or alike, for views of it: asked and read when they are used."""

    def __init__(self, proxy: CapturedProxy) -> None:
        self._proxy = proxy

    def __getitem__(self, key: Any) -> Any:
        return self._proxy[key]

    def __contains__(self, key: Any) -> bool:
        return key in self._proxy

    def __iter__(self) -> Iterator[Any]:
        return iter(self._proxy.keys_asked() or ())

    def __len__(self) -> int:
        return _LEN(self._proxy.keys_asked() or ())


def proxies_in(value: Any) -> list[CapturedProxy]:
    """The traced values in a value of containers."""
    found: list[CapturedProxy] = []

    def note(item: Any) -> None:
        if isinstance(item, CapturedProxy):
            found.append(item)

    fx.node.map_aggregate(value, note)
    return found


def _in_place(target: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: CapturedProxy, other: Any) -> Any:
        # fx records `y += 1` as `y = y + 1`, and an alias of y misses the change.
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


for _function in IN_PLACE_FUNCTIONS:
    setattr(CapturedProxy, f"__{_function.__name__}__", _in_place(_function))
