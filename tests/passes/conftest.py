"""The oracle of the capture tests: emitted and original agree in both modes, bit for bit."""

import builtins
import copy
import random
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

import npas_fx
from npas_fx.errors import InfeasibleBudgetError
from npas_fx.passes.capture import capture
from npas_fx.passes.patches import FACTORIES
from npas_fx.passes.skeleton import clone, copy_with
from npas_fx.verify import all_weights, generate


@pytest.fixture(autouse=True)
def _grad_mode():
    """Models that switch gradients off for good do so for their own test only."""
    yield
    torch.set_grad_enabled(True)


def snapshot(model):
    """All that a capture could change: attributes, tensors, hooks, random states, torch itself."""
    return {
        "attributes": {path: dict(vars(part)) for path, part in model.named_modules()},
        "names": {
            path: [
                list(getattr(part, kind).keys()) for kind in ("_parameters", "_buffers", "_modules")
            ]
            for path, part in model.named_modules()
        },
        "tensors": {
            name: (id(tensor), tensor._version, tensor.detach().clone())
            for source in (model.named_parameters(), model.named_buffers())
            for name, tensor in source
        },
        "patched": (
            *(builtins.isinstance, torch.is_tensor, nn.Module.parameters, nn.Module.__setattr__),
            *(nn.Module.__call__, nn.Module.__getattr__, "training" in vars(nn.Module)),
            *(vars(torch.autograd.Function).get("apply"), torch.no_grad.__enter__),
            *(torch.autocast.__exit__, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")),
            *(getattr(torch, name) for name in FACTORIES),
        ),
        "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
    }


def assert_unchanged(model, before):
    after = snapshot(model)
    assert after["names"] == before["names"]
    assert after["patched"] == before["patched"]
    assert after["attributes"].keys() == before["attributes"].keys()
    for path, attributes in before["attributes"].items():
        now = after["attributes"][path]
        assert now.keys() == attributes.keys()
        assert all(now[name] is value for name, value in attributes.items()), path
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, (identity, version, value) in before["tensors"].items():
        assert after["tensors"][name][:2] == (identity, version)
        torch.testing.assert_close(after["tensors"][name][2], value, rtol=0, atol=0, equal_nan=True)
    assert after["random"][0] == before["random"][0]
    assert repr(after["random"][1]) == repr(before["random"][1])
    assert torch.equal(after["random"][2], before["random"][2])


def _run(call, parameters):
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    output = call()
    stream = torch.get_rng_state()
    leaves = pytree.tree_leaves(tensors_of(output))
    total = sum(
        (leaf.abs() if leaf.is_complex() else leaf).pow(2).sum()
        for leaf in leaves
        if leaf.requires_grad
    )
    gradients = [None] * len(parameters)
    if isinstance(total, torch.Tensor) and parameters:
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return output, stream, gradients


def tensors_of(value):
    """The tensors of an output, also those in a dataclass."""
    if hasattr(value, "__dataclass_fields__"):
        return [tensors_of(getattr(value, name)) for name in value.__dataclass_fields__]
    if isinstance(value, dict):
        return [tensors_of(item) for item in value.values()]
    if isinstance(value, (tuple, list)):
        return [tensors_of(item) for item in value]
    return value if isinstance(value, torch.Tensor) else []


def types_of(value):
    """The types of an output and of all in it."""
    if isinstance(value, dict):
        return type(value), {key: types_of(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value), [types_of(item) for item in value]
    return type(value)


def assert_same(emitted, model, args=(), kwargs=None, modes=(True, False), by_copy=False):
    """Compare with ``functional_call`` of a copy of the original in each mode.

    ``by_copy`` builds the weights into the copy, for models that ``functional_call`` gets wrong.
    """
    kwargs = kwargs or {}
    for mode in modes:
        if mode is not None:
            emitted.train(mode)
        original = copy_with(model, lambda _, tensor: clone(tensor))
        if mode is not None:
            original.train(mode)
        parameters = [p for p in emitted.parameters() if p.requires_grad]
        buffers = {name: b.detach().clone() for name, b in emitted.named_buffers()}
        own = dict(original.named_buffers())
        for name, buffer in own.items():
            buffer.data.copy_(buffers[name])
        inputs = copy.deepcopy((args, kwargs))

        def run_original(original=original, inputs=inputs):
            weights = all_weights(emitted, generate(emitted))
            if by_copy:
                tensors = {**dict(original.named_buffers()), **weights}
                reference = copy_with(original, lambda path, _: tensors[path])
                return reference(*inputs[0], **inputs[1])
            return functional_call(original, weights, *inputs)

        expected = _run(run_original, parameters)
        got = _run(lambda: emitted(*args, **kwargs), parameters)
        assert types_of(got[0]) == types_of(expected[0])
        torch.testing.assert_close(
            tensors_of(got[0]), tensors_of(expected[0]), rtol=0, atol=0, equal_nan=True
        )
        assert torch.equal(got[1], expected[1]), "another random stream"
        for mine, theirs in zip(got[2], expected[2], strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        now = dict(emitted.named_buffers())
        for name, buffer in original.named_buffers():
            torch.testing.assert_close(now[name], buffer, rtol=0, atol=0, msg=name)
        with torch.no_grad():
            for name, buffer in emitted.named_buffers():
                buffer.copy_(buffers[name])
        torch.testing.assert_close(inputs, copy.deepcopy((args, kwargs)), rtol=0, atol=0)


def emit(model, budget, args=(), kwargs=None, **options):
    """Transform with the quick solver; a budget below the floor becomes the floor."""
    options = {"solver": "greedy", "verify": False, "seed": 1, **options}
    example = {} if args is None else {"example_inputs": args, "example_kwargs": kwargs}
    try:
        return npas_fx.transform(model, budget, **example, **options)
    except InfeasibleBudgetError as err:
        return npas_fx.transform(model, err.smallest, **example, **options)


@pytest.fixture
def check():
    """Transform at two budgets, compare with the original, and see that nothing changed."""

    def run(model, *args, kwargs=None, modes=(True, False), others=(), example=True, **how):
        for budget in (0.5, 1.0):
            before = snapshot(model)
            emitted = emit(model, budget, args if example else None, kwargs)
            assert_unchanged(model, before)
            for inputs in (args, *others):
                assert_same(emitted, model, inputs, kwargs, modes, **how)
        return emitted

    torch.manual_seed(0)
    return run


@pytest.fixture
def same():
    """``assert_same``, for a module that a test has emitted itself."""
    return assert_same


@pytest.fixture
def refuses():
    """See that a capture is refused in these words, and that nothing changed."""

    def run(model, *args, match, kwargs=None):
        before = snapshot(model)
        with pytest.raises(npas_fx.CaptureError, match=match) as caught:
            npas_fx.transform(
                model, 1.0, example_inputs=args, example_kwargs=kwargs, solver="greedy"
            )
        assert_unchanged(model, before)
        return caught.value

    torch.manual_seed(0)
    return run


@pytest.fixture
def falls_back(check):
    """See that a capture makes a call of a module, for this reason, and that it is right."""

    def run(model, *args, match, path="", kwargs=None, **how):
        captured = capture(model, args, kwargs)
        assert path in captured.leaves
        assert re.search(match, captured.leaves[path]), captured.leaves[path]
        return check(model, *args, kwargs=kwargs, **how)

    return run
