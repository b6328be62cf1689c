"""Models on the meta device, larger than memory; and batches of one.

In a user's words: ``docs/training.md``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import npas_fx
from models import GPT, MODELS, loss_of
from npas_fx import plan_of, transform
from oracle import (
    assert_close,
    same_tensors,
    seeded,
)
from ordinary import (
    assert_same_gradients,
    budgets,
    emitted,
    example,
    freeze,
    lowest,
    names,
    plain_of,
)

# The meta device


PLAN_A_LARGE_MODEL = """
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, sys.argv[1])
import npas_fx
from models import GPT


class Watch(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.largest = max(self.largest, tensor.numel())
        return made


def peak():
    # Not getrusage: its peak begins with that of the process that started this one.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


before = peak()
with Watch() as watch:
    with torch.device("meta"):
        model = GPT(vocabulary=50257, width=1600, depth=48, length=1024)
    inventory = npas_fx.inspect(model)
    plan = npas_fx.plan(model, 0.25)
    assert "stay" in str(inventory) and "stays" in str(plan)
assert inventory.num_parameters == plan.model_parameters
assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
size = sum(p.numel() for p in model.parameters())
print(size, plan.parameters, watch.largest, peak() - before)
"""


@pytest.mark.slow
def test_a_model_larger_than_memory_is_inspected_and_planned_on_the_meta_device():
    if not Path("/proc/self/status").exists():
        pytest.skip("reads its peak memory where Linux tells it")
    support = str(Path(__file__).parents[1] / "support")
    run = subprocess.run(
        [sys.executable, "-c", PLAN_A_LARGE_MODEL, support],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    size, parameters, largest, grown = map(int, run.stdout.split())
    assert size > 1_500_000_000
    assert parameters == size // 4
    assert largest < 1_000_000
    assert grown < 1e9  # its weights are 6 GB; names, graph and candidates take 0.3


@names
@budgets
def test_a_meta_model_is_inspected_and_planned_but_not_transformed(name, budget, tmp_path):
    shared, inputs = emitted(name, budget), example(name).inputs(2)
    with torch.device("meta"):
        model = example(name).build()
    plan = npas_fx.plan(model, lowest(name, budget), example_inputs=inputs)
    assert plan == plan_of(shared)
    inventory = npas_fx.inspect(model, example_inputs=inputs)
    assert str(inventory) == str(npas_fx.inspect(example(name).make(), example_inputs=inputs))
    assert all(p.is_meta for p in model.parameters())
    for call in (
        lambda: transform(model, 1.0),
        lambda: npas_fx.apply(model, plan, example_inputs=inputs),
    ):
        with pytest.raises(npas_fx.PlanError, match=r"meta device and has no values.*to_empty"):
            call()
    npas_fx.save(shared, tmp_path)
    loaded = npas_fx.load(tmp_path, model, example_inputs=inputs)
    assert same_tensors(loaded, shared)
    assert {t.device.type for t in (*loaded.parameters(), *loaded.buffers())} == {"cpu"}
    assert torch.equal(*(seeded(lambda m=m: loss_of(m(*inputs))) for m in (loaded, shared)))


@budgets
def test_a_meta_model_with_some_frozen_layers(budget):
    with torch.device("meta"):
        model = freeze(GPT(), "transformer.h.0")
    plan = npas_fx.plan(model, budget)
    assert plan == npas_fx.plan(freeze(MODELS["gpt"].make(), "transformer.h.0"), budget)
    assert plan.kept["transformer.h.0.c_fc.weight"] == "frozen"


@budgets
def test_the_default_device_of_the_program_does_not_matter(budget):
    model = MODELS["mlp"].make()
    expected = transform(model, budget)
    with torch.device("meta"):
        found = transform(model, budget)
    assert same_tensors(found, expected)


# One example at a time


@names
@budgets
def test_a_batch_of_one(name, budget):
    inputs = example(name).inputs(1)
    shared = transform(example(name).make(), lowest(name, budget), example_inputs=inputs)
    for mode in (True, False):
        shared.train(mode)
        plain = plain_of(shared, example(name).make())
        assert_same_gradients(
            shared, lambda: loss_of(shared(*inputs)), lambda plain=plain: loss_of(plain(*inputs))
        )
    larger = example(name).inputs(3)
    plain = plain_of(shared, example(name).make())
    assert torch.allclose(loss_of(shared(*larger)), loss_of(plain(*larger)), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "mobilenetv3_small_100"])
def test_a_batch_of_one_picture(name):
    inputs = example(name).inputs(1)
    model = example(name).make()
    shared = transform(model, 0.5, example_inputs=inputs)
    for mode in (True, False):
        shared.train(mode)
        plain = plain_of(shared, model, is_exact=True)
        expected, found = (seeded(lambda f=f: f(*inputs)) for f in (plain, shared))
        assert_close("output", found, expected, torch.float32)
        assert found.shape == (1, 1000)


@budgets
def test_a_batch_norm_over_one_value_trains_no_better_than_plain(budget):
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 16), nn.Linear(16, 2))
    one, two = torch.randn(1, 8), torch.randn(2, 8)
    with pytest.raises(npas_fx.CaptureError, match=r"train mode.*more than 1 value"):
        transform(model, budget, example_inputs=one)
    for shared in (
        transform(model, budget, example_inputs=two),
        transform(model, budget, example_inputs=one, verify=False),
    ):
        plain = plain_of(shared.eval(), model, is_exact=True)
        assert torch.equal(shared(one), plain(one))
        with pytest.raises(ValueError, match="more than 1 value"):
            shared.train()(one)
