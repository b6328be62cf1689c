"""Copies of a module tree keep classes, settings and ties, and share no tensor by accident."""

import threading

import pytest
import torch
from torch import nn

from npas_fx.errors import CaptureError
from npas_fx.passes.skeleton import clone, copy_with, empty_like, make_skeleton, named_tensors


def tied_model():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    model.add_module("again", model[1])
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model.register_buffer("once", torch.ones(2), persistent=False)
    return model


def test_every_tensor_once_under_its_first_name():
    model = tied_model()
    names = [name for name, _ in named_tensors(model)]
    assert "2.weight" not in names
    assert not any(name.startswith("again") for name in names)
    assert {"0.weight", "2.bias", "1.running_mean", "once"} < set(names)


def test_skeleton_has_no_values_and_the_same_structure():
    model = tied_model()
    skeleton = make_skeleton(model)
    assert all(tensor.is_meta for _, tensor in named_tensors(skeleton))
    assert skeleton[0].weight is skeleton[2].weight
    assert skeleton.again is skeleton[1]
    assert not skeleton[1].training
    assert skeleton.training
    assert not skeleton[0].bias.requires_grad
    assert "once" not in skeleton.state_dict()
    assert not any(tensor.is_meta for _, tensor in named_tensors(model))


def test_copy_with_clones_is_equal_and_apart():
    model = tied_model()
    copied = copy_with(model, lambda _, tensor: clone(tensor))
    for (name, a), (_, b) in zip(named_tensors(model), named_tensors(copied), strict=True):
        assert torch.equal(a, b), name
        assert a.data_ptr() != b.data_ptr()
        assert type(a) is type(b)
        assert a.requires_grad == b.requires_grad
    assert copied[0].weight is copied[2].weight


def test_references_in_lists_follow_the_copy():
    model = nn.Linear(2, 2)
    model.hidden = [model.weight]
    model.result = model.weight * 2  # what a call left: no leaf of autograd
    copied = copy_with(model, lambda _, tensor: clone(tensor))
    assert copied.hidden[0] is copied.weight
    assert not copied.result.requires_grad
    assert model.result.requires_grad


def test_new_tensors_keep_kind_dtype_and_flag():
    parameter = nn.Parameter(torch.ones(2, 3, dtype=torch.float16), requires_grad=False)
    for made in (empty_like(parameter, "meta"), clone(parameter)):
        assert isinstance(made, nn.Parameter)
        assert not made.requires_grad
        assert (made.shape, made.dtype) == ((2, 3), torch.float16)
    assert not isinstance(clone(torch.ones(2)), nn.Parameter)


def test_what_cannot_be_copied_is_named():
    model = nn.Linear(2, 2)
    model.lock = threading.Lock()
    with pytest.raises(CaptureError, match=r"Linear cannot be copied \(TypeError"):
        make_skeleton(model)
