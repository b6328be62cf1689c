"""Buffers that calls bind to other tensors: ``self.mean = 0.9 * self.mean + 0.1 * x.mean(0)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from npas_fx.errors import GuardError
from npas_fx.passes.call_state import attributes_set_by_calls


def rebind(buffers: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Bind a buffer to another tensor, as ``module.name = value`` does.

    Args:
        buffers: of the module.
        name: of the buffer.
        value: in-place operations on the old one would change what backward needs of it.

    Raises:
        GuardError: the tensor is of another kind, for which nothing was captured.
    """
    kind, expected = kind_of(value), kind_of(buffers[name])
    if kind != expected:
        raise GuardError(
            f"captured for a buffer {name!r} of {_describe(expected)}, which the call sets to one "
            f"of {_describe(kind)}; pass an example that covers it in more_examples, or use "
            'on_guard="fallback"'
        )
    buffers[name] = value


def rebind_cache(buffers: dict[str, Tensor], name: str, value: Tensor) -> None:
    """The same of a buffer that saves work only: no graph relies on what a call leaves there."""
    buffers[name] = value


REBINDS = (rebind, rebind_cache)


def kind_of(tensor: Tensor) -> tuple[Any, ...]:
    """What a graph relies on of a buffer."""
    return tuple(tensor.shape), tensor.dtype, tensor.device


def _describe(kind: tuple[Any, ...]) -> str:
    shape, dtype, device = kind
    return f"shape {list(shape)}, {dtype} on {device}"


def rebound_by(graph: fx.Graph) -> frozenset[str]:
    """Names of the buffers that a graph binds to other tensors."""
    return _bound_by(graph, rebind) | caches_bound_by(graph)


def caches_bound_by(graph: fx.Graph) -> frozenset[str]:
    """Names of those among them that save work only."""
    return _bound_by(graph, rebind_cache)


def _bound_by(graph: fx.Graph, operation: Callable[..., None]) -> frozenset[str]:
    return frozenset(
        f"{str(node.args[0].target).removesuffix('_buffers')}{node.args[1]}"
        for node in graph.find_nodes(op="call_function", target=operation)
    )


def names_set_by_calls(model: nn.Module) -> frozenset[str]:
    """Names of the attributes that the code of a model may assign, on whatever module."""
    return frozenset[str]().union(*map(attributes_set_by_calls, model.modules()))


def buffer_slots(model: nn.Module) -> dict[str, Tensor | None]:
    """Each name that a buffer is or may be bound to -> the buffer."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, part in model.named_modules(remove_duplicate=False)
        for name, buffer in part._buffers.items()
    }


def note_bindings(module: nn.Module) -> Callable[[], None]:
    """Note what names of buffers are bound to; the function that is returned binds them again."""
    noted = [(part._buffers, dict(part._buffers)) for part in module.modules()]

    def put_back() -> None:
        for buffers, bound in noted:
            buffers.clear()
            buffers.update(bound)

    return put_back


def carry_buffers(source: nn.Module, target: nn.Module) -> None:
    """Bind the buffers that calls may assign as they are bound in a module of the same tree.

    Args:
        source: has the buffers; it is not changed.
        target: of the user's classes; gets copies, what is tied stays tied.
    """
    names = names_set_by_calls(target)
    set_by_calls = {
        id(b) for part in target.modules() for name, b in part._buffers.items() if name in names
    }
    copies: dict[int, Tensor] = {}

    def copied(buffer: Tensor | None) -> Tensor | None:
        if buffer is None:
            return None
        return copies.setdefault(id(buffer), buffer.detach().clone())

    for path, part in target.named_modules():
        own = source.get_submodule(path)
        tied = {name for name, b in part._buffers.items() if id(b) in set_by_calls}
        for name in (names | tied) & (own._buffers.keys() | part._buffers.keys()):
            part._buffers.pop(name, None)
            if name in own._buffers and name not in vars(part):
                is_persistent = name not in own._non_persistent_buffers_set
                part.register_buffer(name, copied(own._buffers[name]), persistent=is_persistent)
