"""Architectures of the zoo under ``torch.compile``: no more graphs than of the plain model.

With those of ``tests/test_compile.py`` they are twenty.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor
from torch.utils._pytree import tree_map_only

from compilation import compare
from models import Example
from zoo_all import find
from zoo_case import Case

pytestmark = pytest.mark.slow

NAMES = (
    "transformers/albert",
    "transformers/bert",
    "transformers/gpt2",
    "transformers/levit",
    "transformers/llama",
    "transformers/t5",
    "torchvision/googlenet",
    "torchvision/shufflenet_v2_x0_5",
)


def example_of(case: Case) -> Example:
    """In float64, so that a step of training changes what comes out."""

    def draw(batch_size: int) -> tuple[Any, ...]:
        doubled = tree_map_only(Tensor, _double, case.draw(batch_size))
        return (*doubled[0], doubled[1])

    return Example(lambda: case.make().double(), draw)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("name", NAMES)
def test_no_more_graphs_and_recompilations_than_of_the_plain_model(name):
    compare(example_of(find(name))).assert_no_more()
