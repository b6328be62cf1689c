"""What a call of a module may leave behind and give back, as far as its code itself says."""

from __future__ import annotations

import ast
import dis
import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn


def attributes_set_by_calls(module: nn.Module) -> frozenset[str]:
    """Names of the attributes that a call of ``module`` may assign or delete, on any object."""
    own: object = vars(module).get("forward")
    kind: type = type(module)
    names = _stored(kind)
    return names | _stored_by(own.__code__) if isinstance(own, FunctionType) else names


# Methods that change a container.
CHANGING = frozenset(
    (
        *("append", "appendleft", "extend", "insert", "pop", "popleft", "popitem", "remove"),
        *("clear", "add", "discard", "update", "setdefault", "__setitem__"),
    )
)


def may_keep_state(module: nn.Module) -> bool:
    """Whether a call of ``module`` or of a part of it may leave something for the next one.

    Buffers do not count.
    """
    parts = [part for part in module.modules() if not part.__module__.startswith("torch.nn.")]
    kinds: list[type] = [type(part) for part in parts]
    return any(map(attributes_set_by_calls, parts)) or any(map(_changes_containers, kinds))


def may_return_none(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the code of ``forward`` has a way out with None, or an argument that is, as result.

    Args:
        module: what is called.
        args: of the call.
        kwargs: likewise.
    """
    forward: Any = vars(module).get("forward", type(module).forward)
    if not isinstance(forward, FunctionType):
        return True
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError:
        return True
    bound.apply_defaults()
    nothing = {name for name, value in bound.arguments.items() if value is None}
    instructions = list(dis.get_instructions(forward))
    return any(
        (one.opname == "RETURN_CONST" and one.argval is None)
        or (other.opname == "RETURN_VALUE" and one.opname == "LOAD_CONST" and one.argval is None)
        or (other.opname == "RETURN_VALUE" and "LOAD_FAST" in one.opname and one.argval in nothing)
        for one, other in zip(instructions, (*instructions[1:], instructions[-1]), strict=True)
    )


@cache
def _stored(kind: Any) -> frozenset[str]:
    """Names that ``forward``, and the methods that it calls, assign."""
    return frozenset(name for code in _reached(kind) for name in _stored_by(code))


@cache
def _changes_containers(kind: Any) -> bool:
    """Whether ``forward``, or a method that it calls, changes a list or dict of its module.

    As far as is seen: ``self.seen.append(x)``, ``self.cache[key] = x``, also by another name that
    the method gives to ``self.cache``.
    """
    return any(map(_changes_own, _reached(kind)))


def _changes_own(code: CodeType) -> bool:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, SyntaxError):
        return True  # not to be seen
    own = set(code.co_varnames[:1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and _root(node.value) in own:
            own |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return any(_root(changed) in own for changed in map(_changed_by, ast.walk(tree)) if changed)


def _changed_by(node: ast.AST) -> ast.expr | None:
    """What a call of a method, or a store under a key, changes."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.value if node.func.attr in CHANGING else None
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
        return node.value
    return None


def _root(node: ast.expr) -> str | None:
    """The name that a chain of attributes and keys begins with."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


@cache
def _reached(kind: Any) -> tuple[CodeType, ...]:
    """The code of ``forward``, and of the methods that it calls."""
    methods = {
        name: {function.__code__, inspect.unwrap(function).__code__}  # with decorators or without
        for base in reversed(kind.__mro__)
        if base.__module__.split(".")[0] != "torch"
        for name, function in vars(base).items()
        if isinstance(function, FunctionType)
    }
    reached, waiting = set[str](), ["forward", "__call__"]
    while waiting:
        name = waiting.pop()
        if name in methods and name not in reached:
            reached.add(name)
            parts = [part for code in methods[name] for part in _nested(code)]
            waiting += [called for part in parts for called in part.co_names]
    return tuple(code for name in reached for code in methods[name])


_STORES_BY_NAME = frozenset(("setattr", "delattr", "register_buffer", "_buffers"))


def _stored_by(code: CodeType) -> frozenset[str]:
    found = set[str]()
    for part in _nested(code):
        instructions = dis.get_instructions(part)
        found |= {str(i.argval) for i in instructions if i.opname in ("STORE_ATTR", "DELETE_ATTR")}
        if not _STORES_BY_NAME.isdisjoint(part.co_names):
            found |= {constant for constant in part.co_consts if isinstance(constant, str)}
    return frozenset(found)


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)
