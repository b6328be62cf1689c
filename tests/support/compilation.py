"""A plain model and its emitted module under ``torch.compile``: graphs, recompilations, numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported, UserError
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import clear_compilation_metrics, get_compilation_metrics
from torch.utils._pytree import tree_leaves

from comparison import tensors_of
from models import Example, loss_of
from npas_fx import transform
from oracle import assert_close, largest, seeded

# The second call of the first size must find what the first has compiled.
BATCH_SIZES = (3, 3, 5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What torch._dynamo counted.

    Attributes:
        graphs: that it gave to the backend.
        recompilations: of a function that it had compiled before, with or without a graph in it.
    """

    graphs: int
    recompilations: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A plain model and its emitted module, compiled the same way.

    Attributes:
        is_whole: whether the plain model compiles with ``fullgraph=True``; then both were.
        plain: of the model.
        emitted: of the emitted module.
    """

    is_whole: bool
    plain: Counts
    emitted: Counts

    def assert_no_more(self) -> None:
        assert self.plain.graphs > 0
        assert self.emitted.graphs <= self.plain.graphs
        assert self.emitted.recompilations <= self.plain.recompilations


def run(module: nn.Module, call: Callable[..., Any], example: Example) -> list[dict[str, Tensor]]:
    """Train with a step after each batch, then evaluate.

    Args:
        module: owns the tensors.
        call: runs it.
        example: has the inputs, the last a dict where there are some by name.

    Returns:
        For each call the outputs, in train mode the gradients of all parameters, and all buffers.
    """
    results = []
    for is_training in (True, False):
        module.train(is_training)
        for batch_size in BATCH_SIZES:
            inputs = example.inputs(batch_size)
            args, kwargs = split(inputs)
            with torch.set_grad_enabled(is_training):
                output = seeded(partial(call, *args, **kwargs))
            outputs = tree_leaves(tensors_of(output))
            result = {f"output {k}": value.detach() for k, value in enumerate(outputs)}
            if is_training:
                names, parameters = zip(*module.named_parameters(), strict=True)
                loss = loss_of(output) if type(output) in (Tensor, tuple) else outputs[0].mean()
                gradients = torch.autograd.grad(
                    loss, parameters, allow_unused=True, materialize_grads=True
                )
                for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
                    result[f"gradient {name}"] = gradient
                    with torch.no_grad():  # weights that were compiled in would be the old ones
                        parameter -= 1e-3 * gradient
            results.append(result | {name: b.clone() for name, b in module.named_buffers()})
    return results


def split(inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional inputs and those by name, which are the last where there are some."""
    is_named = bool(inputs) and isinstance(inputs[-1], dict)
    return (inputs[:-1], inputs[-1]) if is_named else (inputs, {})


def measure(
    module: nn.Module, example: Example, *, fullgraph: bool, backend: str = "aot_eager"
) -> tuple[Counts, list[dict[str, Tensor]]]:
    """Compile a module from nothing, run it, and count."""
    torch.compiler.reset()
    clear_compilation_metrics()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(module, fullgraph=fullgraph, backend=counter)
    try:
        results = run(module, compiled, example)
        metrics = get_compilation_metrics()
    finally:
        torch.compiler.reset()
    assert len(metrics) < 64, "torch._dynamo keeps no more than 64"
    recompilations = sum(each.recompile_reason is not None for each in metrics)
    return Counts(graphs=counter.frame_count, recompilations=recompilations), results


def compare(
    example: Example,
    *,
    backend: str = "aot_eager",
    budget: float = 0.5,
    emit: str = "graph",
    **rules: Any,
) -> Comparison:
    """Compile a model and its emitted module; what comes out of the latter must be as in eager."""
    model = example.make()
    args, kwargs = split(example.inputs(2))
    examples = {"example_inputs": args, "example_kwargs": kwargs}
    shared = transform(model, budget, **examples, emit=emit, **rules)
    eager = copy.deepcopy(shared)
    try:
        plain, _ = measure(copy.deepcopy(model), example, fullgraph=True, backend=backend)
        is_whole = True
    except (Unsupported, UserError):  # of branches on values, say
        plain, _ = measure(model, example, fullgraph=False, backend=backend)
        is_whole = False
    emitted, results = measure(shared, example, fullgraph=is_whole, backend=backend)
    assert_same(results, run(eager, eager, example), next(shared.parameters()).dtype)
    return Comparison(is_whole=is_whole, plain=plain, emitted=emitted)


def assert_same(
    results: list[dict[str, Tensor]], expected: list[dict[str, Tensor]], dtype: torch.dtype
) -> None:
    for got, wanted in zip(results, expected, strict=True):
        assert got.keys() == wanted.keys()
        gradients = [largest(value) for key, value in wanted.items() if is_gradient(key)]
        for key, value in wanted.items():
            floor = 1e-2 * max(gradients) if is_gradient(key) else 1e-3
            assert_close(key, got[key], value, dtype, is_gradient=is_gradient(key), floor=floor)


def is_gradient(key: str) -> bool:
    return key.startswith("gradient ")
