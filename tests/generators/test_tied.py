"""Tied weights are one template, each scaled and shifted by itself."""

import pytest
import torch

from npas_fx.generators import GENERATORS, Moments
from npas_fx.generators.generator import num_parameters
from npas_fx.ir import Size

TIED = GENERATORS["tied"]


def test_only_several_weights_of_one_shape_can_be_tied():
    assert list(TIED.propose(((3, 4),) * 2, above=True)) == [
        Size(num_templates=1, template_size=12)
    ]
    assert not list(TIED.propose(((3, 4),), above=True))
    assert not list(TIED.propose(((3, 4), (4, 3)), above=True))


def test_it_costs_the_template_and_a_gain_for_each():
    size = Size(num_templates=1, template_size=12)
    assert num_parameters(TIED, ((3, 4),) * 5, size) == 12 + 5
    assert (
        num_parameters(TIED, ((3, 4),) * 5, Size(num_templates=1, template_size=12, num_partial=3))
        == 20
    )


def test_weights_differ_in_scale_and_shift_only():
    shapes, size = ((3, 4),) * 3, Size(num_templates=1, template_size=12)
    moments = [Moments(mean=m, std=s) for m, s in ((0.0, 1.0), (2.0, 0.5), (0.0, 3.0))]
    tensors = TIED.birth(shapes, size, moments, torch.Generator().manual_seed(0))
    weights = TIED.generate(tensors, shapes, size)
    for weight, wanted in zip(weights, moments, strict=True):
        first = (weights[0] - weights[0].mean()) / weights[0].std()
        torch.testing.assert_close((weight - weight.mean()) / weight.std(), first)
        assert Moments.of(weight).std == pytest.approx(wanted.std, rel=1e-4)
