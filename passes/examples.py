"""Examples: the inputs that a model is captured with and verified on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from npas_fx.errors import CaptureError
from npas_fx.passes.call import CallSignature, as_tuple, flatten_example, read_call


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """Inputs of one call of a model.

    Attributes:
        name: what the user knows it as.
        args: positional arguments.
        kwargs: keyword arguments.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def read_examples(
    example_inputs: Any, example_kwargs: Mapping[str, Any] | None, more_examples: Sequence[Any]
) -> tuple[Example, ...]:
    """All examples, the first one first; none where there is no first one.

    Args:
        example_inputs: a tuple of positional arguments, one such argument, or None.
        example_kwargs: keyword arguments, or None.
        more_examples: each of them like ``example_inputs``; like ``example_kwargs`` where only
            these are given; a pair of the two where both are.

    Raises:
        CaptureError: an item has another form, or there are more examples without a first one.
    """
    if not isinstance(more_examples, (list, tuple)):
        raise CaptureError(
            f"more_examples is a {type(more_examples).__name__}; pass a list of examples, also of "
            "a single one"
        )
    if example_inputs is None and example_kwargs is None:
        if more_examples:
            raise CaptureError(
                "more_examples without a first one; pass that as example_inputs or example_kwargs"
            )
        return ()
    first = Example(
        name="the example", args=as_tuple(example_inputs), kwargs=dict(example_kwargs or {})
    )
    further = []
    for number, item in enumerate(more_examples):
        name = f"more_examples[{number}]"
        args, kwargs = item, None
        if example_inputs is None:
            args, kwargs = None, item
        elif example_kwargs is not None:
            if not isinstance(item, (list, tuple)) or len(item) != 2:
                raise CaptureError(
                    f"{name} is a {type(item).__name__}; with both example_inputs and "
                    "example_kwargs each is a pair (inputs, kwargs) of the same form"
                )
            args, kwargs = item
        if example_kwargs is not None and not isinstance(kwargs, Mapping):
            raise CaptureError(
                f"{name} has a {type(kwargs).__name__} in the place of its keyword arguments; pass "
                "a dict, as example_kwargs"
            )
        further.append(Example(name=name, args=as_tuple(args), kwargs=dict(kwargs or {})))
    return first, *further


def read_inputs(
    model: nn.Module, call: CallSignature, examples: Sequence[Example]
) -> list[dict[str, Any]]:
    """Values of the inputs of the graph in each example.

    Args:
        model: its ``forward`` is not called.
        call: read from the first example.
        examples: all of them.

    Raises:
        CaptureError: one of them gives other arguments than the first, or other constants.
    """
    expected = _describe_arguments(call)
    for example in examples[1:]:
        try:
            given = _describe_arguments(read_call(model, example.args, example.kwargs))
        except CaptureError as err:
            raise CaptureError(f"{example.name}: {err}") from err
        for argument in (*expected, *given):
            one, other = expected.get(argument, "not given"), given.get(argument, "not given")
            if one != other:
                raise CaptureError(
                    f"{argument} is {other} in {example.name}, but {one} in the example; tensors "
                    "and what contains them may differ in shape and length, all else has to be "
                    "the same, given in the same way"
                )
    return [flatten_example(call, example.args, example.kwargs) for example in examples]


def _describe_arguments(call: CallSignature) -> dict[str, str]:
    """Name of each argument -> in which way it is given, and what else a graph is captured for."""
    constants = call.describe()["constants"]
    said: dict[str, str] = {}
    for place, name in enumerate(call.names):
        kind = f"a {call.types[name].__name__}" if name in call.types else constants[name]
        way = "by position" if place < call.num_positional else "by name"
        said[name] = "left out" if name in call.omitted else f"{kind} ({way})"
    return said
