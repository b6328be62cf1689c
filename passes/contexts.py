"""``no_grad``, ``set_grad_enabled``, autocast and alike, as operations of a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx

Operation = tuple[Callable[..., Any], tuple[Any, ...]]  # and its arguments
_DEVICES = [d for d in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(d)]


def leave(context: Any) -> None:
    """Stands in a graph where its code leaves a context manager; never called.

    Args:
        context: a node that makes one, and enters it.
    """


ENTERS = (torch.set_grad_enabled, torch.autocast)
SWITCHES = (*ENTERS, leave)
_GIVEN = "_npas_fx_given"


def init_autocast(init: Callable[..., None], known: Callable[[Any], Any]) -> Callable[..., None]:
    """Make autocast keep its arguments, and take traced ones such as ``x.device.type``.

    Args:
        init: of autocast.
        known: gives what a value is in the example if it is traced, else the value.
    """

    def construct(
        context: Any,
        device_type: Any,
        dtype: Any = None,
        enabled: Any = True,
        cache_enabled: Any = None,
    ) -> None:
        init(context, known(device_type), known(dtype), enabled, cache_enabled)
        vars(context)[_GIVEN] = device_type, dtype, enabled, cache_enabled

    return construct


def write_enter(context: Any, had_gradients: bool) -> Operation | None:
    """The operation that has entered a context manager; None if there is none.

    Args:
        context: has been entered.
        had_gradients: whether gradients were on before.
    """
    if type(context) in (torch.no_grad, torch.enable_grad):
        return torch.set_grad_enabled, (type(context) is torch.enable_grad,)
    if type(context) is torch.set_grad_enabled:
        is_usual = context.prev is had_gradients  # it was made where it is entered
        return (torch.set_grad_enabled, (context.mode,)) if is_usual else None
    if isinstance(context, torch.autocast):
        return _write_autocast(context)
    return None


def _write_autocast(context: Any) -> Operation | None:
    now = context.device, context.fast_dtype, context._enabled, context._cache_enabled
    given = vars(context).get(_GIVEN)
    if given is None:
        return torch.autocast, now  # it is older than the call
    # What it was not given it took from around where it was made, which may be elsewhere.
    around = now[0], context.prev_fastdtype, now[2], context.prev_cache_enabled
    is_usual = all(g is not None or n == a for g, n, a in zip(given, now, around, strict=True))
    return (torch.autocast, given) if is_usual else None


def ambient_state() -> tuple[Any, ...]:
    """Which contexts of torch's the code is in, as far as they can be seen."""
    autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _DEVICES]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


class OpenContexts:
    """The contexts that the nodes of one trace are in, so that a single one can be run in them.

    It is made where the trace begins.
    """

    def __init__(self) -> None:
        self._before = ambient_state()
        has_gradients, _, *autocast = self._before
        self._outside: list[Operation] = [(torch.set_grad_enabled, (has_gradients,))]
        for device, (is_enabled, dtype) in zip(_DEVICES, autocast, strict=True):
            self._outside.append((torch.autocast, (device, dtype, is_enabled, False)))
        self._entered: dict[fx.Node, list[fx.Node]] = {}

    def note(self, node: fx.Node, entered: list[fx.Node]) -> None:
        """Note which nodes have entered the contexts that a node is in, the outermost first."""
        if entered:
            self._entered[node] = entered

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """All nodes that a node depends on: its arguments, and those of its contexts."""
        entered = self._entered.get(node, [])
        return [source for each in (node, *entered) for source in each.all_input_nodes]

    @contextmanager
    def around(
        self,
        node: fx.Node | None = None,
        read: Callable[[fx.Node], Any] | None = None,
        *,
        has_gradients: bool = True,
    ) -> Iterator[None]:
        """Be in the contexts of a node, whichever the code that asks is in.

        Args:
            node: by default, what is around the trace.
            read: gives the value of each of its sources.
            has_gradients: whether gradients are as there, and not as they are.
        """
        entered = [] if node is None else self._entered.get(node, [])
        first = 0 if has_gradients else 1
        is_outside = ambient_state()[first:] == self._before[first:]
        operations = [] if is_outside else self._outside
        operations = operations + [
            (each.target, fx.node.map_arg(each.args, read))  # type: ignore[misc, arg-type]
            for each in entered
        ]
        with ExitStack() as stack:
            for enter, arguments in operations:
                if has_gradients or enter is not torch.set_grad_enabled:
                    stack.enter_context(enter(*arguments))
            yield


def write_blocks(nodes: Sequence[fx.Node], body: Sequence[str]) -> list[str]:
    """Write what is between entering and leaving as blocks of ``with``.

    These are left also where a call fails, and torch.compile knows what to do with them where it
    breaks a graph.

    Args:
        nodes: of a graph.
        body: the code that torch.fx writes for them; a line with a number begins each.
    """
    written: list[str] = []
    starts = [k for k, text in enumerate(body) if text.startswith("# COUNTER")]
    depth = 0
    for node, start, end in zip(nodes, starts, [*starts[1:], len(body)], strict=True):
        number, *texts = body[start:end]
        indent = "    " * depth
        if node.target in ENTERS:
            depth += 1
            call, forgotten = texts[0].partition(" = ")[2], "".join(texts[1:]).lstrip("; ")
            texts = [f"with {call}:\n", f"{indent}    {forgotten.strip() or 'pass'}\n"]
        elif node.target is leave:
            depth -= 1
            texts = []
        written += [number, indent if texts else "", *texts]
    return written
