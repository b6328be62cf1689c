"""The oracle of the capture tests: emitted and original agree in both modes, bit for bit."""

import copy
import random

import numpy as np
import torch
from torch.func import functional_call
from torch.utils import _pytree as pytree

import npas_fx
from npas_fx.errors import InfeasibleBudgetError
from npas_fx.passes.objects import is_plain_object
from npas_fx.passes.skeleton import clone, copy_with
from npas_fx.verify import all_weights, generate


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
    """The tensors of an output, also those in a dataclass or an object."""
    if hasattr(value, "__dataclass_fields__"):
        return [tensors_of(getattr(value, name)) for name in value.__dataclass_fields__]
    if is_plain_object(value):
        return [tensors_of(item) for item in vars(value).values()]
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
    if is_plain_object(value):
        return type(value), {name: types_of(item) for name, item in vars(value).items()}
    return type(value)


def assert_same(
    emitted, model, args=(), kwargs=None, modes=(True, False), by_copy=False, share=None
):
    """Compare with ``functional_call`` of a copy of the original in each mode.

    ``by_copy`` builds the weights into the copy, for models that ``functional_call`` gets wrong.
    Gradients may differ by ``share`` of the largest of all.
    """
    kwargs = kwargs or {}
    for mode in modes:
        if mode is not None:
            emitted.train(mode)
        original = copy_with(model, lambda _, tensor: clone(tensor))
        if mode is not None:
            original.train(mode)
        parameters = [p for p in emitted.parameters() if p.requires_grad]
        before = copy_buffers(emitted)
        bind_buffers(original, copy_buffers(emitted))  # a call may have bound them anew
        inputs = copy.deepcopy((args, kwargs))

        ran = [original]

        def run_original(original=original, inputs=inputs, ran=ran):
            weights = all_weights(emitted, generate(emitted))
            if by_copy:
                tensors = {**dict(original.named_buffers()), **weights}
                ran[0] = copy_with(original, lambda path, _: tensors[path])
                return ran[0](*inputs[0], **inputs[1])
            return functional_call(original, weights, *inputs)

        expected = _run(run_original, parameters)
        got = _run(lambda: emitted(*args, **kwargs), parameters)
        assert types_of(got[0]) == types_of(expected[0])
        torch.testing.assert_close(
            tensors_of(got[0]), tensors_of(expected[0]), rtol=0, atol=0, equal_nan=True
        )
        assert torch.equal(got[1], expected[1]), "another random stream"
        close = {"rtol": 1e-4, "atol": 1e-5}
        if share is not None:
            sizes = [g.abs().max().item() for g in expected[2] if g is not None and g.numel()]
            close = {"rtol": 0, "atol": share * max(sizes, default=0)}
        for mine, theirs in zip(got[2], expected[2], strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                torch.testing.assert_close(mine, theirs, equal_nan=True, **close)
        now = dict(emitted.named_buffers())
        for name, buffer in ran[0].named_buffers():
            torch.testing.assert_close(now[name], buffer, rtol=0, atol=0, equal_nan=True, msg=name)
        assert now.keys() >= dict(ran[0].named_buffers()).keys()
        bind_buffers(emitted, before)
        torch.testing.assert_close(inputs, copy.deepcopy((args, kwargs)), rtol=0, atol=0)


def copy_buffers(module):
    """Path of each module in it -> copies of its buffers by name; what is tied stays tied."""
    copies = {}
    return {
        path: {
            name: None if b is None else copies.setdefault(id(b), b.detach().clone())
            for name, b in part._buffers.items()
        }
        for path, part in module.named_modules()
    }


def bind_buffers(module, buffers):
    """Bind the buffers of a module, as far as it has them."""
    for path, part in module.named_modules():
        for name in list(part._buffers):
            del part._buffers[name]
            if name in buffers[path]:
                part._buffers[name] = buffers[path][name]
        lost = buffers[path].keys() - part._buffers.keys() - vars(part).keys()
        part._buffers.update({name: buffers[path][name] for name in lost})


def emit(model, budget, args=(), kwargs=None, **options):
    """Transform with the quick solver; a budget below the floor becomes the floor."""
    options = {"solver": "greedy", "verify": False, "seed": 1, **options}
    example = {} if args is None else {"example_inputs": args, "example_kwargs": kwargs}
    try:
        return npas_fx.transform(model, budget, **example, **options)
    except InfeasibleBudgetError as err:
        return npas_fx.transform(model, err.smallest, **example, **options)
