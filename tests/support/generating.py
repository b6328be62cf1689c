"""What is checked of generators beyond those that are registered, at sizes of any kind."""

from __future__ import annotations

import torch
from torch import Tensor

from npas_fx.generators import Generator, Tensors
from npas_fx.generators.generator import Shapes
from npas_fx.ir import Size


def check_gradients(
    generator: Generator, tensors: Tensors, shapes: Shapes, size: Size, *, second: bool = False
) -> None:
    """Compare the gradients of all weights with differences, in float64."""
    tensors = {key: tensor.double() for key, tensor in tensors.items()}
    keys = list(generator.parameters(shapes, size))

    def generate(*values: Tensor) -> Tensor:
        weights = generator.generate(
            {**tensors, **dict(zip(keys, values, strict=True))}, shapes, size
        )
        # Joined: of several outputs, gradcheck would ask for one gradient at a time.
        return torch.cat([weight.flatten() for weight in weights])

    inputs = [tensors[key].clone().requires_grad_() for key in keys]
    assert torch.autograd.gradcheck(generate, inputs, fast_mode=True)
    if second:
        assert torch.autograd.gradgradcheck(generate, inputs, fast_mode=True)


def check_gradients_everywhere(
    generator: Generator, tensors: Tensors, shapes: Shapes, size: Size
) -> None:
    """Look for a gradient at each element of each parameter, for a random sum of the weights."""
    parameters = {
        key: tensors[key].detach().clone().requires_grad_()
        for key in generator.parameters(shapes, size)
    }
    random = torch.Generator().manual_seed(0)
    weights = generator.generate({**tensors, **parameters}, shapes, size)
    total = sum((weight * torch.randn(weight.shape, generator=random)).sum() for weight in weights)
    assert isinstance(total, Tensor)
    total.backward()
    for key, parameter in parameters.items():
        assert parameter.grad is not None, key
        assert parameter.grad.ne(0).all(), key


def check_one_graph(generator: Generator, tensors: Tensors, shapes: Shapes, size: Size) -> None:
    """Compare weights from one compiled graph with those from eager code."""
    compiled = torch.compile(generator.generate, backend="aot_eager", fullgraph=True)
    plain = generator.generate(tensors, shapes, size)
    for mine, theirs in zip(compiled(tensors, shapes, size), plain, strict=True):
        torch.testing.assert_close(mine, theirs)


def check_half_precision(
    generator: Generator,
    tensors: Tensors,
    shapes: Shapes,
    size: Size,
    *,
    dtype: torch.dtype = torch.bfloat16,
    atol: float = 0.05,
) -> None:
    """Compare weights in half precision with those from the same numbers in double precision."""
    tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    full = generator.generate({key: t.double() for key, t in tensors.items()}, shapes, size)
    for weight, exact in zip(generator.generate(tensors, shapes, size), full, strict=True):
        assert weight.dtype == dtype
        torch.testing.assert_close(weight.double(), exact, rtol=0.05, atol=atol)
