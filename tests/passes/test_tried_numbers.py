"""A number that torch asks for, and does not use, leaves nothing behind."""

import operator
import types

import pytest
import torch

import npas_fx
from npas_fx.passes.capture import capture
from npas_fx.passes.emitted import emission_of
from two_layers import net, x


def reshapes(self, x):
    n = x.shape
    y = torch.reshape(self.run(x).transpose(0, 1), [n[1], n[0], 2, -1]).transpose(0, 1)
    y = torch.roll(y, n[1] - 4, n[-1] - 3)  # two numbers are tried
    tiled = torch.tile(y, [1, 1, n[-1], 1]).flatten(1)
    return tiled * torch.broadcast_to(x.mean(), [n[0], 1])


@pytest.mark.parametrize("example", [True, False])
def test_sizes_in_a_list_stay_free(example, check):
    model = net(reshapes)
    given = (x(3, 5, 4),) if example else (None,)
    captured = capture(model, *given)
    assert not captured.leaves
    assert not [node for node in captured.graph.nodes if node.name.startswith("check_guard")]
    check(model, x(3, 5, 4), others=((torch.randn(2, 7, 4),),), example=example)


def same_line(self, x):
    y = self.run(x)
    return torch.reshape(y, [list(range(y.shape[1]))[-1] + 1, y.shape[0], -1])


def just_before(self, x):
    y, size = self.run(x), x.shape[1]
    numbers = range(size)
    return torch.relu(y) * len(numbers)


def same_instruction(self, x):
    y, size = self.run(x), x.shape[1]
    for function, *rest in ((operator.index,), (torch.reshape, y, [size, -1])):
        y = y + 1
        result = function(*(rest or (size,)))
    return result


NUMBERS = (same_line, just_before, same_instruction)


@pytest.mark.parametrize("forward", NUMBERS, ids=lambda f: f.__name__)
def test_a_number_that_is_wanted_is_checked(forward, check):
    emitted = check(net(forward), x(3, 5, 4))
    emitted(x(2, 5, 4))
    with pytest.raises(npas_fx.GuardError, match="= 5, called with 6"):
        emitted(x(2, 6, 4))


def test_a_number_that_is_refused_is_refused_though_the_code_goes_on(falls_back):
    def forward(self, x):
        try:
            n = range(x.shape[0])[-1]
        except Exception:
            n = 0
        return torch.reshape(self.run(x), [x.shape[0], -1]) + n

    falls_back(net(forward), x(), match="Python number")


def test_an_attribute_that_is_no_number_yet_is_read_once():
    def forward(self, box):
        return torch.tile(self.run(box.value), [box.times, 1])

    emitted = npas_fx.transform(net(forward), 1.0, solver="greedy")
    box = types.SimpleNamespace(value=x(), times=2)
    torch.testing.assert_close(emitted(box), npas_fx.materialize(emitted)(box))
    reads = [node for node in emission_of(emitted).capture.graph.nodes if "times" in node.args]
    assert len(reads) == 1
