"""``torch.compile`` of emitted modules: one graph, the same numbers."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from models import GPT, MODELS, Example, Recursive, WideBlock, loss_of
from npas_fx import transform
from oracle import seeded


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# Without dropout: compiled code may draw other random numbers. Small, since compiling takes long.
SMALL = {
    "residual_cnn": MODELS["residual_cnn"],
    "wrn": Example(lambda: WideBlock(3, 6, 2, 0.0), MODELS["wrn"].draw),
    "recursive": Example(lambda: Recursive(times=3), MODELS["recursive"].draw),
    "gpt": Example(lambda: GPT(depth=1, dropout=0.0), MODELS["gpt"].draw),
}


def check(shared: nn.Module, example: Example, backend: str, *batch_sizes: int) -> None:
    compiled = torch.compile(shared, fullgraph=True, backend=backend)
    for mode in (True, False):
        shared.train(mode)
        for batch_size in batch_sizes:
            inputs = example.inputs(batch_size)
            state = copy.deepcopy(shared.state_dict())
            expected = run(shared, inputs)
            after = copy.deepcopy(shared.state_dict())
            shared.load_state_dict(state)
            got = run(compiled, inputs)
            assert expected.keys() == got.keys()
            for key, value in expected.items():
                scale = max(value.abs().max().item(), 1e-3)
                assert torch.allclose(got[key], value, rtol=0, atol=1e-4 * scale), key
            for key, value in after.items():
                assert torch.allclose(shared.state_dict()[key], value, atol=1e-5), key


def run(module: Callable[..., Any], inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """Outputs, and gradients of all parameters."""
    owner = getattr(module, "_orig_mod", module)
    output = seeded(lambda: module(*inputs))
    names, parameters = zip(*owner.named_parameters(), strict=True)
    found = torch.autograd.grad(loss_of(output), parameters)
    outputs = output if isinstance(output, tuple) else (output,)
    return {
        **{f"output {k}": value.detach() for k, value in enumerate(outputs)},
        **dict(zip(names, found, strict=True)),
    }


@pytest.mark.parametrize("name", SMALL)
def test_one_graph_in_both_modes_at_any_batch_size(name):
    example = SMALL[name]
    shared = transform(example.make(), 0.5, example_inputs=example.inputs(3))
    check(shared, example, "aot_eager", 3, 5)


def test_dropout_compiles_and_follows_the_mode():
    example = Example(lambda: WideBlock(3, 6, 2, 0.3), MODELS["wrn"].draw)
    shared = transform(example.make(), 0.5, example_inputs=example.inputs(3))
    compiled = torch.compile(shared, fullgraph=True, backend="aot_eager")
    inputs = example.inputs(3)
    shared.train()
    one, two = (loss_of(compiled(*inputs)) for _ in range(2))
    assert one != two
    shared.eval()
    one, two = (loss_of(compiled(*inputs)) for _ in range(2))
    assert one == two


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor():
    example = SMALL["recursive"]
    shared = transform(example.make(), 0.5, example_inputs=example.inputs(3))
    check(shared, example, "inductor", 3)


def test_recurrent_leaves_compile_with_breaks():
    example = MODELS["lstm"]
    shared = transform(example.make(), 0.6, example_inputs=example.inputs(3)).eval()
    compiled = torch.compile(shared, backend="eager")
    assert torch.allclose(compiled(*example.inputs(4)), shared(*example.inputs(4)), atol=1e-6)
