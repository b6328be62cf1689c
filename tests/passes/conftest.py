"""The oracle of the capture tests: emitted and original agree in both modes, bit for bit."""

import builtins
import random
import re

import numpy as np
import pytest
import torch
from torch import nn

import npas_fx
from comparison import assert_same, emit
from npas_fx.passes.capture import capture
from npas_fx.passes.patches import FACTORIES, MODES


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
            *(
                builtins.isinstance,
                builtins.vars,
                torch.is_tensor,
                nn.Module.parameters,
                nn.Module.__setattr__,
            ),
            *(nn.Module.__call__, nn.Module.__getattr__, "training" in vars(nn.Module)),
            *(vars(torch.autograd.Function).get("apply"), torch.no_grad.__enter__),
            *(
                torch.autocast.__exit__,
                torch.autocast.__init__,
                torch.is_grad_enabled(),
                torch.is_autocast_enabled("cpu"),
            ),
            *(getattr(torch, name) for name in (*FACTORIES, *MODES, "Size", "broadcast_shapes")),
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
