"""Weighted averages: sizes that are proposed, and coefficients that start orthonormal."""

import math

import pytest
import torch

from npas_fx.generators import GENERATORS, Moments
from npas_fx.generators.generator import num_parameters
from npas_fx.ir import Size

WAVG = GENERATORS["wavg"]
GROUPS = [
    ((8, 8),) * 4,
    ((8, 8),),
    ((8, 8), (4, 16)),
    ((8, 8), (3, 5, 2), (1, 2)),
    ((16, 3, 3, 3), (32, 16, 3, 3)),
    ((2, 2), (2, 2)),
]


@pytest.mark.parametrize("shapes", GROUPS, ids=str)
@pytest.mark.parametrize("above", [False, True])
def test_proposals_are_valid_distinct_and_ordered(shapes, above):
    sizes = list(WAVG.propose(shapes, above=above))
    assert sizes
    assert len(set(sizes)) == len(sizes)
    largest = max(map(math.prod, shapes))
    assert all(s.num_templates >= 1 and 1 <= s.template_size <= largest for s in sizes)
    assert all(s.num_partial == 0 for s in sizes)


@pytest.mark.parametrize("shapes", GROUPS[:5], ids=str)
def test_proposals_reach_far_down(shapes):
    total = sum(map(math.prod, shapes))
    smallest = min(num_parameters(WAVG, shapes, s) for s in WAVG.propose(shapes, above=False))
    assert smallest <= max(4 * math.sqrt(total), total / 2)


def test_more_than_the_weights_only_where_it_is_wanted():
    shapes = ((16, 16),) * 4
    total = sum(map(math.prod, shapes))
    below = {num_parameters(WAVG, shapes, s) for s in WAVG.propose(shapes, above=False)}
    above = {num_parameters(WAVG, shapes, s) for s in WAVG.propose(shapes, above=True)}
    assert max(below) <= total < max(above)


def test_coefficients_start_orthonormal_where_they_can():
    random = torch.Generator().manual_seed(0)
    shapes = ((4, 4),) * 3
    moments = [Moments(mean=0.0, std=1.0)] * 3
    for count in (3, 5):
        size = Size(num_templates=count, template_size=16)
        rows = WAVG.birth(shapes, size, moments, random)["coefficients"]
        torch.testing.assert_close(rows @ rows.T, torch.eye(3), atol=1e-5, rtol=0)
    rows = WAVG.birth(shapes, Size(num_templates=2, template_size=16), moments, random)
    torch.testing.assert_close(rows["coefficients"].norm(dim=1), torch.ones(3))


def test_tiles_of_one_template_differ():
    shapes, size = ((4, 4),), Size(num_templates=1, template_size=4)
    moments = [Moments(mean=0.0, std=1.0)]
    tensors = WAVG.birth(shapes, size, moments, torch.Generator().manual_seed(0))
    (weight,) = WAVG.generate(tensors, shapes, size)
    assert len({round(row.norm().item(), 5) for row in weight}) == 4


@pytest.mark.parametrize("template_size", [1, 20, 255, 256, 288, 304, 320, 1008])
def test_tiles_get_longer_wherever_there_is_room(template_size):
    size = Size(num_templates=2, template_size=template_size)
    longer = WAVG.enlarge(((32, 32), (32, 32)), size, 10_000)
    assert longer is not None
    assert template_size < longer.template_size <= max(1.1 * template_size, template_size + 16)


@pytest.mark.parametrize(
    "shape", [(24, 16), (16, 24), (30, 7, 3), (12, 5, 3, 3), (64, 48)], ids=str
)
@pytest.mark.parametrize("count", [1, 2])
def test_rank_reaches_what_the_parameters_allow_and_no_row_is_a_copy(shape, count):
    moments, shapes = [Moments(mean=0.0, std=1.0)] * count, (shape,) * count
    columns = math.prod(shape[1:])
    for size in WAVG.propose(shapes, above=False):
        tensors = WAVG.birth(shapes, size, moments, torch.Generator().manual_seed(0))
        tensors = {key: tensor.double() for key, tensor in tensors.items()}
        for weight in WAVG.generate(tensors, shapes, size):
            rows = weight.reshape(shape[0], columns)
            allowed = size.num_templates * size.template_size // columns
            if size.template_size >= rows.numel():  # a mix of whole weights is one again
                allowed = columns
            assert torch.linalg.matrix_rank(rows) >= min(*rows.shape, max(1, allowed)), size
            unit = rows / rows.norm(dim=1, keepdim=True)
            others = unit.unsqueeze(0) - unit.unsqueeze(1) + torch.eye(len(rows))[:, :, None]
            if allowed > 1:
                assert others.norm(dim=2).min() > 1e-3, size
            else:  # of less than two rows, each at least has a size of its own
                assert len({round(norm.item(), 9) for norm in rows.norm(dim=1)}) == len(rows)
