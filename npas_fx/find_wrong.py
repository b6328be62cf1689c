"""Find the modules whose graph computes something else than their code."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from torch import fx, nn

from npas_fx.errors import VerificationError
from npas_fx.passes.call import make_forward
from npas_fx.passes.capture import ModeGraph
from npas_fx.passes.emit import register_constants
from npas_fx.passes.emitted import EmittedModule, emission_of
from npas_fx.passes.examples import Example
from npas_fx.passes.opaque import without_checkpoints
from npas_fx.passes.skeleton import copy_with
from npas_fx.passes.tracer import RESULTS, leaves_of
from npas_fx.verify import NOISE, all_weights, compare, copy_inputs, copy_with_noise, generate, run

# Path of a module and the number of its call -> place -> what it has returned there.
_Results: TypeAlias = dict[tuple[str, int], dict["int | None", Any]]


def find_wrong_modules(
    shared: EmittedModule, model: nn.Module, examples: Iterable[Example], seed: int
) -> frozenset[str]:
    """Find the first call that ends with another result in a graph than in the model's code.

    What a module calls ends before it does, so this is the smallest module that is wrong. Modules
    of its class run the same code, so they are taken to be wrong too.

    Args:
        shared: fails ``verify``.
        model: that it was made from.
        examples: that it was verified on.
        seed: of the random numbers.

    Returns:
        Paths of modules that are traced; none where no result differs but that of the model.
    """
    modes = emission_of(shared).capture.modes
    for example in examples:
        for is_training in (True, False):
            mode = modes[0] if is_training or len(modes) == 1 else modes[1]
            path = _find_first(shared, model, mode, example, is_training, seed)
            if path:
                kind = type(model.get_submodule(path))
                traced = {
                    path for node in mode.graph.nodes for path, *_ in node.meta.get(RESULTS, ())
                }
                return frozenset(p for p in traced if type(model.get_submodule(p)) is kind)
    return frozenset()


def _find_first(
    shared: EmittedModule,
    model: nn.Module,
    mode: ModeGraph,
    example: Example,
    is_training: bool,
    seed: int,
) -> str:
    owner = copy_with_noise(shared, NOISE, seed)
    tensors = {
        **all_weights(owner, generate(owner)),
        **{name: buffer.clone() for name, buffer in model.named_buffers()},
    }
    capture = emission_of(shared).capture

    def call(forward: Callable[..., Any], prepare: Callable[[nn.Module], None]) -> None:
        values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        module = copy_with(capture.skeleton, lambda name, _: values[name]).train(is_training)
        prepare(module)
        args, kwargs = copy_inputs(example)
        with without_checkpoints():
            run(lambda: forward(module, *args, **kwargs), module, seed, with_gradients=False)

    expected: _Results = {}
    got: _Results = {}
    call(nn.Module.__call__, lambda module: _note_calls(module, expected))
    forward = make_forward(capture.call, _noting(mode, got), "<npas_fx graph that is compared>")
    call(forward, lambda module: register_constants(module, capture.constants))
    for (path, number), results in expected.items():
        for place in results.keys() & got.get((path, number), {}).keys():
            try:
                compare(path, got[path, number][place], results[place], 0)
            except VerificationError:
                return path
    return ""


def _note_calls(model: nn.Module, results: _Results) -> None:
    """Make a model note what each call of a module returns, in the order in which they end."""
    number_of: dict[str, int] = defaultdict(int)

    def note(path: str, result: Any) -> None:
        number_of[path] += 1
        results[path, number_of[path]] = {None: result, **dict(enumerate(leaves_of(result)))}

    for path, module in model.named_modules():
        module.register_forward_hook(lambda _, __, result, path=path: note(path, result))


def _noting(mode: ModeGraph, results: _Results) -> fx.Graph:
    """Copy a graph, so that it notes what the calls of traced modules return."""
    graph = copy.deepcopy(mode.graph)
    calls = {call: path for node in graph.nodes for path, call, _ in node.meta.get(RESULTS, ())}
    number_of: dict[str, int] = defaultdict(int)
    numbers = {}
    for call, path in sorted(calls.items()):
        number_of[path] += 1
        numbers[call] = number_of[path]

    def note(path: str, number: int, place: int | None, value: Any) -> None:
        results.setdefault((path, number), {})[place] = value

    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in list(graph.nodes):
        for path, call, place in node.meta.get(RESULTS, ()):
            with graph.inserting_after(inputs[-1] if node in inputs else node):
                graph.call_function(note, (path, numbers[call], place, node))
    return graph
