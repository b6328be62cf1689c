"""What the names of parameters and buffers are bound to while a model is traced."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

from npas_fx.passes.flag_patterns import is_inside
from npas_fx.passes.proxy import CapturedProxy
from npas_fx.passes.purity import IN_PLACE_FUNCTIONS, is_of_sizes
from npas_fx.passes.rebinding import kind_of, names_set_by_calls, rebind, rebind_cache

if TYPE_CHECKING:
    from npas_fx.passes.tracer import Tracer


class BufferSlots:
    """Binds buffers to traced values where the code does, with a node that does it at each call.

    Args:
        tracer: of the trace.
        root: what is traced.
    """

    def __init__(self, tracer: Tracer, root: nn.Module) -> None:
        self._tracer = tracer
        self._path_of = {part: path for path, part in root.named_modules()}
        # As they are to be, if nothing went by unseen.
        self._bound = {part: _slots_of(part) for part in self._path_of}
        self._owned = {part: dict(part._buffers) for part in self._path_of}
        self._log: list[tuple[nn.Module, str, Any]] = []  # what was bound before, in order
        names = names_set_by_calls(root)
        self._assigned = {
            id(b) for owned in self._owned.values() for name, b in owned.items() if name in names
        }
        self._num_names = Counter(id(t) for slots in self._bound.values() for t in slots.values())

    def length(self) -> int:
        """How much was bound until now."""
        return len(self._log)

    def undo(self, length: int) -> None:
        """Bind again what was bound after that."""
        while len(self._log) > length:
            module, name, value = self._log.pop()
            self._bind(module, name, value)

    def put_back(self) -> None:
        """Bind buffers as before the trace; what was taken out is not put back."""
        for module, name, value in reversed(self._log):
            if name in self._bound[module]:
                module._buffers[name] = value

    def find_change(self, module: nn.Module) -> str | None:
        """Name of a parameter or buffer in a module that was set or deleted unseen."""
        for part in module.modules():
            now = _slots_of(part)
            bound = self._bound.get(part, now)
            for name in bound.keys() | now.keys():
                if bound.get(name, self) is not now.get(name, self):
                    return name
        return None

    def has_buffer(self, module: nn.Module, name: str) -> bool:
        """Whether a module has a buffer of that name, and not a plain attribute."""
        is_plain = self._full_name(module, name) in self._tracer.exposed
        return not is_plain and name in self._owned.get(module, ())

    def may_be_bound_anew(self, buffer: Tensor) -> bool:
        """Whether the model's code assigns what a buffer is the value of before the call."""
        return id(buffer) in self._assigned

    def _full_name(self, module: nn.Module, name: str) -> str:
        path = self._path_of.get(module)
        return f"{path}.{name}" if path else name

    def take_out(self, module: nn.Module, name: str) -> None:
        """Take a buffer out of a module."""
        if name in module._buffers:
            value = module._buffers.pop(name)
            if module in self._bound:
                self._log.append((module, name, value))
                del self._bound[module][name]

    def assign(self, module: nn.Module, name: str, value: Any) -> bool:
        """Bind a buffer to a traced value; False where it is none, and Python has to.

        Raises:
            CaptureError: a graph cannot.
        """
        if name not in self._bound.get(module, ()):
            return False
        full_name = self._full_name(module, name)
        if full_name in self._tracer.exposed:
            self.take_out(module, name)  # a plain attribute after all
            return False
        if not isinstance(value, CapturedProxy):
            return False  # which is seen at the end of the call
        node = value.node
        changed = node.args[0] if node.target in IN_PLACE_FUNCTIONS else node
        if changed is self._node_of(module._buffers.get(name)):
            return True  # `self.count += 1`: the buffer itself was changed
        # Whether it saves work only is seen at the end of the trace.
        may_be_cache = name in module._non_persistent_buffers_set and is_of_sizes(node)
        if why := self._why_not(module, name, full_name, value, may_be_cache):
            raise self._tracer.refusal(
                f"forward assigns another tensor to the parameter or buffer {name!r}, and {why}"
            )
        slots = self._tracer.create_node("get_attr", self._full_name(module, "_buffers"), (), {})
        operation = rebind_cache if may_be_cache else rebind
        self._tracer.create_node("call_function", operation, (slots, name, node), {})
        self._log.append((module, name, module._buffers[name]))
        self._bind(module, name, value)
        return True

    def _bind(self, module: nn.Module, name: str, value: Any) -> None:
        module._buffers[name] = self._bound[module][name] = value

    def _node_of(self, buffer: Any) -> fx.Node | None:
        if isinstance(buffer, Tensor):
            buffer = self._tracer.read(self._tracer.names[id(buffer)], buffer)
        return buffer.node if isinstance(buffer, CapturedProxy) else None

    def _why_not(
        self,
        module: nn.Module,
        name: str,
        full_name: str,
        value: CapturedProxy,
        may_be_cache: bool,
    ) -> str:
        owned = self._owned[module].get(name)
        if owned is not None and self._num_names[id(owned)] > 1:
            return "it has further names"
        stack = list(self._tracer.module_stack.values())
        if not is_inside(self._path_of[module], stack[-1][0] if stack else ""):
            return "it belongs to a module that is not below it"
        if may_be_cache:
            return ""
        if owned is None:
            return "it was a parameter, or None"
        ask = self._tracer.questions
        values = ask.values_of(value.node)
        expected = ask.values_of(self._tracer.read(full_name, owned).node)
        if values is None or expected is None or ask.depends_on_data(value.node):
            return "without an example that tells it is not known whether its shape and type stay"
        if not all(map(_is_of_kind, values, expected)):
            return "its shape or type does not stay"
        return ""


def _slots_of(module: nn.Module) -> dict[str, Any]:
    return {**module._parameters, **module._buffers}


def _is_of_kind(value: Any, expected: Tensor) -> bool:
    is_tensor = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
    return is_tensor and kind_of(value) == kind_of(expected)
