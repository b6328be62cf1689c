"""How a model is called: which arguments are inputs of its graph, and which are constants."""

from __future__ import annotations

import inspect
import linecache
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from npas_fx.errors import CaptureError, GuardError
from npas_fx.passes.contexts import write_blocks

_CONSTANTS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSignature:
    """The signature of ``forward`` and what of it the graph was captured for.

    Attributes:
        signature: of the bound ``forward``; the emitted module has the same.
        constants: flat argument name -> the value that it must have.
        types: flat argument name -> the type that it must have, for inputs where it is known.
        omitted: names of the arguments that are left at their defaults.
        num_positional: how many of the named arguments are given by position; the others are given
            by name, since a decorator of ``forward`` may tell the two apart.
        num_varargs: how many positional arguments went into ``*args``.
        varkwargs: names that went into ``**kwargs``.
    """

    signature: inspect.Signature
    constants: Mapping[str, Any]
    types: Mapping[str, type] = field(default_factory=dict)
    omitted: frozenset[str] = frozenset()
    num_positional: int = 0
    num_varargs: int = 0
    varkwargs: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Flat names of all arguments, in the order of the graph's placeholders."""
        names: list[str] = []
        for parameter in self.signature.parameters.values():
            if parameter.kind is parameter.VAR_POSITIONAL:
                names += [f"{parameter.name}_{k}" for k in range(self.num_varargs)]
            elif parameter.kind is parameter.VAR_KEYWORD:
                names += self.varkwargs
            else:
                names.append(parameter.name)
        return tuple(names)

    def rebuild(self, values: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Arguments of a traced call: traced values, and the constants that ``forward`` guards."""
        args: list[Any] = []
        kwargs: dict[str, Any] = {}

        def value(name: str) -> Any:
            return self.constants[name] if name in self.constants else values[name]

        for place, parameter in enumerate(self.signature.parameters.values()):
            if parameter.kind is parameter.VAR_POSITIONAL:
                args += [value(f"{parameter.name}_{k}") for k in range(self.num_varargs)]
            elif parameter.kind is parameter.VAR_KEYWORD:
                kwargs.update({name: value(name) for name in self.varkwargs})
            elif place < self.num_positional:
                args.append(value(parameter.name))
            elif parameter.name not in self.omitted:
                kwargs[parameter.name] = value(parameter.name)
        return args, kwargs

    def run(self, module: Callable[..., Any], values: Mapping[str, Any]) -> Any:
        """Call a module with inputs by name."""
        args, kwargs = self.rebuild(values)
        return module(*args, **kwargs)

    def describe(self) -> dict[str, Any]:
        """What the graph was captured for, as plain data; equal exactly for equal calls."""
        return {
            "arguments": [name for name in self.names if name not in self.constants],
            "constants": {name: _describe(v) for name, v in sorted(self.constants.items())},
        }


def _describe(value: Any) -> str:
    if isinstance(value, (*_CONSTANTS, tuple, list, dict)):
        return repr(value)
    return str(getattr(value, "__qualname__", type(value).__qualname__))  # repr has an address


def read_call(
    model: nn.Module, example_inputs: Any, example_kwargs: Mapping[str, Any] | None
) -> CallSignature:
    """Decide which arguments of ``forward`` are inputs and which are constants.

    An argument that is not given is the constant it defaults to; one that is given is a constant
    if it is None, a number, a string or alike, and an input otherwise. Without an example, the
    arguments that have no default are the inputs.

    Args:
        model: its ``forward`` is not called.
        example_inputs: a tuple of positional arguments, one such argument, or None.
        example_kwargs: keyword arguments.

    Raises:
        CaptureError: the example does not fit the signature, or there is none and ``forward``
            takes ``*args``.
    """
    signature = inspect.signature(model.forward)
    parameters = signature.parameters
    if example_inputs is None and example_kwargs is None:
        for parameter in parameters.values():
            if parameter.kind is parameter.VAR_POSITIONAL:
                raise CaptureError(
                    f"forward takes *{parameter.name}, whose number is not known without an "
                    "example; pass example_inputs"
                )
        defaults = {
            name: parameter.default
            for name, parameter in parameters.items()
            if parameter.default is not parameter.empty
        }
        by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        required = [p for name, p in parameters.items() if name not in defaults]
        return CallSignature(
            signature=signature,
            constants=defaults,
            omitted=frozenset(defaults),
            num_positional=sum(parameter.kind in by_place for parameter in required),
        )
    try:
        bound = signature.bind(*as_tuple(example_inputs), **(example_kwargs or {}))
    except TypeError as err:
        raise CaptureError(f"the example inputs do not fit forward{signature}: {err}") from err
    constants: dict[str, Any] = {}
    types: dict[str, type] = {}
    omitted: list[str] = []
    num_varargs, varkwargs = 0, ()
    for name, parameter in parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            given = {f"{name}_{k}": item for k, item in enumerate(bound.arguments.get(name, ()))}
            num_varargs = len(given)
        elif parameter.kind is parameter.VAR_KEYWORD:
            given = bound.arguments.get(name, {})
            varkwargs = tuple(given)
        elif name in bound.arguments:
            given = {name: bound.arguments[name]}
        else:
            given = {}
            constants[name] = parameter.default
            omitted.append(name)
        constants.update({key: item for key, item in given.items() if isinstance(item, _CONSTANTS)})
        types.update({key: _kind(item) for key, item in given.items() if key not in constants})
    return CallSignature(
        signature=signature,
        constants=constants,
        types=types,
        omitted=frozenset(omitted),
        num_positional=len(as_tuple(example_inputs)) - num_varargs,
        num_varargs=num_varargs,
        varkwargs=varkwargs,
    )


def flatten_example(
    call: CallSignature, example_inputs: Any, example_kwargs: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Name of each input of the graph -> its value in the example that ``call`` was read from."""
    bound = call.signature.bind(*as_tuple(example_inputs), **(example_kwargs or {}))
    flat: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = call.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            flat.update({f"{name}_{k}": item for k, item in enumerate(value)})
        elif kind is inspect.Parameter.VAR_KEYWORD:
            flat.update(value)
        else:
            flat[name] = value
    return {name: value for name, value in flat.items() if name not in call.constants}


def _kind(value: Any) -> type:
    return Tensor if isinstance(value, Tensor) else type(value)


def as_tuple(example_inputs: Any) -> tuple[Any, ...]:
    """Positional arguments: a tuple as it is, None as none, anything else as the only one."""
    if example_inputs is None:
        return ()
    return example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)


def check_constant(value: Any, name: str, expected: Any) -> None:
    """Refuse a call whose argument differs from what the graph was captured for."""
    if value is expected:
        return
    if type(value) is type(expected) and not isinstance(value, Tensor) and value == expected:
        return
    raise GuardError(
        f"captured for {name}={expected!r}, called with another value (a {type(value).__name__}); "
        f"pass example inputs that include {name} when the model is transformed"
    )


def _check_type(value: Any, name: str, expected: type) -> None:
    if not isinstance(value, expected):
        raise GuardError(
            f"captured for a {expected.__name__} as {name}, called with a {type(value).__name__}; "
            f"pass example inputs with such a {name} when the model is transformed"
        )


def make_forward(call: CallSignature, graph: fx.Graph, filename: str) -> Callable[..., Any]:
    """Make a ``forward`` of the captured signature that checks its arguments and runs a graph.

    It is one function: of a ``forward`` that called another, torch.compile would compile both anew
    where it has to break the graph, and so more often than the plain model's.

    Args:
        call: the signature, and what to check.
        graph: its inputs are the flat arguments.
        filename: what tracebacks show the code as.
    """
    parameters, flat, checks, scope = _write_call(call)
    graph = _rename_inputs(graph)
    inputs = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
    bound = [f"{name} = {value}" for name, value in zip(inputs, flat, strict=True)]
    head = _write_head("forward", parameters, checks)
    source, names = _write(graph, "\n    ".join((head, *bound)))
    if call.signature.parameters.keys() & {*names, "slice"}:
        # An argument bears the name of something that the graph's code reads.
        source, names = _write(graph, _write_head("_run", ("self", *inputs), ()))
        source += f"\n{head}\n    return _run({', '.join(('self', *flat))})\n"
    scope = {**names, **scope}
    exec(compile(source, filename, "exec"), scope)
    # Tracebacks show the generated lines.
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    forward: Callable[..., Any] = scope["forward"]
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    # With the annotations, which the generated code does not have.
    vars(forward)["__signature__"] = call.signature.replace(
        parameters=[first, *call.signature.parameters.values()]
    )
    return forward


class _WithHead(fx.graph.CodeGen):
    """Writes a function that begins as it is told."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.head = head

    def gen_fn_def(self, *args: Any, **options: Any) -> str:
        return self.head


def _rename_inputs(graph: fx.Graph) -> fx.Graph:
    """Copy a graph, with inputs whose names are no Python names that its code may read."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    placeholders = (node for node in copied.nodes if node.op == "placeholder")
    for k, node in enumerate(placeholders):
        node.target = f"_input_{k}"
    return copied


def _write(graph: fx.Graph, head: str) -> tuple[str, dict[str, Any]]:
    """Write the code of a graph; give it with the globals that it reads."""
    graph.set_codegen(_WithHead(head))
    graph.on_generate_code(lambda _: partial(write_blocks, list(graph.nodes)))
    code = graph.python_code("self")
    return code.src, code.globals


def _write_head(name: str, parameters: Sequence[str], lines: Sequence[str]) -> str:
    return "\n    ".join((f"def {name}({', '.join(parameters)}):", *lines))


def _write_call(call: CallSignature) -> tuple[list[str], list[str], list[str], dict[str, Any]]:
    """Write the parameters of ``forward``, its flat arguments and its checks, with what they name.

    The parameters begin with ``self``, the flat arguments do not.
    """
    scope: dict[str, Any] = {
        "_check_extra": _check_extra,
        "_check_constant": check_constant,
        "_check_type": _check_type,
    }
    parameters, flat, checks = ["self"], list[str](), list[str]()
    is_keyword_only = False
    positional_only = [p for p in call.signature.parameters.values() if p.kind is p.POSITIONAL_ONLY]
    for name, parameter in call.signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            parameters.append(f"*{name}")
            is_keyword_only = True
            checks.append(f"_check_extra({name!r}, len({name}), {call.num_varargs})")
            flat += [f"{name}[{k}]" for k in range(call.num_varargs)]
            continue
        if parameter.kind is parameter.VAR_KEYWORD:
            parameters.append(f"**{name}")
            checks.append(f"_check_extra({name!r}, sorted({name}), {sorted(call.varkwargs)!r})")
            flat += [f"{name}[{key!r}]" for key in call.varkwargs]
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not is_keyword_only:
            parameters.append("*")
            is_keyword_only = True
        default = ""
        if parameter.default is not parameter.empty:
            scope[f"_default_{name}"] = parameter.default
            default = f"=_default_{name}"
        parameters.append(f"{name}{default}")
        flat.append(name)
        if positional_only and parameter is positional_only[-1]:
            parameters.append("/")
    for name, value in zip(call.names, flat, strict=True):
        if name in call.constants:
            scope[f"_constant_{name}"] = call.constants[name]
            checks.append(f"_check_constant({value}, {name!r}, _constant_{name})")
        elif name in call.types:
            scope[f"_type_{name}"] = call.types[name]
            checks.append(f"_check_type({value}, {name!r}, _type_{name})")
    return parameters, flat, checks, scope


def _check_extra(name: str, given: Any, expected: Any) -> None:
    if given != expected:
        raise GuardError(
            f"captured for {expected} in {name}, called with {given}; pass example inputs of the "
            "kind that is meant when the model is transformed"
        )
