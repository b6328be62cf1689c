"""A dedicated weight is itself."""

import pytest
import torch

from npas_fx.generators import GENERATORS
from npas_fx.generators.generator import num_parameters
from npas_fx.ir import Size

DEDICATED = GENERATORS["dedicated"]
SIZE = Size(num_templates=1, template_size=12)


def test_one_weight_at_its_own_size():
    assert list(DEDICATED.propose(((3, 4),), above=True)) == [SIZE]
    assert not list(DEDICATED.propose(((3, 4), (3, 4)), above=True))
    assert num_parameters(DEDICATED, ((3, 4),), SIZE) == 12
    assert not DEDICATED.buffers(((3, 4),), SIZE)


def test_it_is_not_drawn_and_not_changed():
    weight = torch.randn(3, 4)
    assert DEDICATED.generate({"weight": weight}, ((3, 4),), SIZE)[0] is weight
    with pytest.raises(AssertionError, match="has no bank"):
        DEDICATED.birth(((3, 4),), SIZE, [], torch.Generator())
