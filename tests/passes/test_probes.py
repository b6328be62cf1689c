"""Probes answer questions on shapes and types by example runs that compute nothing."""

import copy
import random
import types
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

import npas_fx
from npas_fx.passes.capture import capture
from npas_fx.passes.contexts import OpenContexts
from npas_fx.passes.guards import describe
from npas_fx.passes.node_values import Values
from npas_fx.passes.probes import Probes
from two_layers import net, x


def values_of(function, *inputs, model=None):
    """Values of the output of a function of tensors, one for each probe."""
    return probe(function, *inputs, model=model)[0]


def probe(function, *inputs, model=None):
    """The same, and whether they depend on data."""
    graph = fx.symbolic_trace(function).graph
    names = [node.target for node in graph.nodes if node.op == "placeholder"]
    probes = Probes(model or nn.Module(), dict(zip(names, inputs, strict=True)))
    (output,) = (node for node in graph.nodes if node.op == "output")
    values = Values(probes, lambda run: run(), lambda module, inputs: None, OpenContexts())
    return values.of(output.args[0]), output.args[0] in values.of_data


def test_one_probe_is_the_example_and_the_other_has_a_row_more():
    assert values_of(lambda a, b: a.shape, x(3, 4), x(5, 4)) == [(3, 4), (4, 4)]
    assert values_of(lambda a, b: b.shape, x(3, 4), x(5, 4)) == [(5, 4), (5, 4)]
    assert values_of(lambda a, b: a.shape[0] + b.shape[0], x(3, 4), x(3, 2)) == [6, 8]
    assert values_of(lambda a: a["y"].shape, {"y": x(2, 4)}) == [(2, 4), (3, 4)]


def test_a_single_row_has_two_others_beside_it_for_it_broadcasts():
    assert values_of(lambda a: a.shape[0], x(1, 4)) == [1, 2, 3]


def test_a_probe_that_does_not_fit_the_model_is_dropped():
    assert values_of(lambda a: a.view(3, 2, 2).shape[0], x(3, 4)) == [3]


def test_what_needs_values_is_run_and_known_to_depend_on_them():
    value = x()
    twice = torch.cat([value, value[:1]])
    items = [value.sum().item(), twice.sum().item()]
    assert probe(lambda a: a.sum().item(), value) == (items, True)
    counts = [int((value > 0).sum()), int((twice > 0).sum())]
    assert probe(lambda a: a[a > 0].shape[0], value) == (counts, True)
    assert probe(lambda a: a[a > 0].ndim, value) == ([1, 1], False)
    assert probe(lambda a: a[a > 0].dim() + a.dim(), value) == ([3, 3], False)
    with torch.device("meta"):
        assert values_of(lambda a: a.sum().item(), x(), model=nn.Linear(2, 2)) is None


def test_no_question_is_answered_by_data(falls_back):
    """The next batch may have another answer: what asks is called, and both ways work."""

    def forward(self, value):
        many = value[value > 0].shape[0] > 3
        return self.a(value) if many else self.a(-value)

    emitted = falls_back(net(forward), x(), match="branches on a value")
    value = x().abs()
    for each in (value, -value):
        torch.testing.assert_close(emitted(each), emitted.a(value))


class Branches(nn.Module):
    """A module whose code needs data, and what it makes of the result."""

    def __init__(self, finish):
        super().__init__()
        self.fc, self.finish = nn.Linear(4, 4), finish

    def forward(self, value):
        y = self.fc(value)
        return self.finish(y if y.sum() > 0 else -y)


def behind(finish, ask):
    """A network that asks about the result of a call whose code needs data."""

    def forward(self, value):
        y = self.branches(value)
        return self.run(value) * (2 if ask(y) else 3)

    model = net(forward)
    model.branches = Branches(finish)
    return model


@pytest.mark.parametrize(
    ("finish", "ask"),
    [
        (lambda y: y, lambda y: y.shape[1] > 3),
        (lambda y: (y, None), lambda y: y[1] is None and y[0].shape[1] > 3),
        (lambda y: (y * 2, {"a": y[0]}), lambda y: len(y[1]["a"]) > 3),
    ],
    ids=["tensor", "None beside it", "nested"],
)
def test_sizes_of_what_a_call_gives_are_known_where_data_do_not_change_them(finish, ask, check):
    model = behind(finish, ask)
    assert capture(model, x()).leaves.keys() == {"branches"}
    check(model, x(), others=[(x(6, 4),)])


@pytest.mark.parametrize(
    ("finish", "ask"),
    [
        (lambda y: y[y > 0], lambda y: y.shape[0] > 3),
        (lambda y: (y, 4), lambda y: y[1] > 3),
        (lambda y: (y, (y > 0).sum().item()), lambda y: y[1] > 3),
    ],
    ids=["a size", "a number", "a number of data"],
)
def test_what_data_may_change_in_the_result_of_a_call_is_not_answered(finish, ask, falls_back):
    falls_back(behind(finish, ask), x(), match="branches on a value")


def test_sizes_are_known_again_behind_those_that_depend_on_data(check):
    def forward(self, value):
        rows = (value.sum(1) > 0).nonzero()[:, 0]
        y = torch.zeros_like(value).index_add_(0, rows, self.run(value[rows]))
        return self.run(y if y.shape[1] == 4 else value)

    assert not capture(net(forward), x()).leaves
    check(net(forward), x(), others=[(x(6, 4),), (x().abs(),)])


def test_the_rank_of_what_depends_on_data_does_not(check):
    def forward(self, value):
        picked = value[value > -9]
        is_flat = len(picked.shape) == 1 and len(picked.size()) == 1
        return self.run(value) * (picked.mean() if is_flat else 100)

    assert not capture(net(forward), x()).leaves
    check(net(forward), x())


def test_running_draws_no_random_number_and_changes_nothing():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, value):
            self.seen += value.sum() * torch.rand(())
            assert self.seen.item() > -1e9
            return value, self.seen

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.counts, self.fc = Counts(), nn.Linear(4, 4)

        def forward(self, value):
            return self.fc(self.counts(value)[0])

    model, value = Around(), x()
    state = torch.get_rng_state()
    captured = capture(model, value)
    assert captured.leaves.keys() == {"counts"}
    assert model.counts.seen == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_a_call_that_draws_in_python_does_not_make_a_call_of_what_asks_about_its_result(check):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, value):
            return self.fc(value) * random.random() * np.random.rand()

    model = net(lambda self, x: self.run(self.noisy(x)) if self.noisy(x).shape[1] == 4 else x)
    model.noisy = Noisy()
    assert capture(model, x()).leaves.keys() == {"noisy"}
    check(model, x())


def test_the_user_s_own_mistake_is_not_known_either():
    assert values_of(lambda a: a.view(7, 7).shape, x()) is None


@pytest.mark.parametrize(
    ("change", "rank"), [("unsqueeze_", 3), ("squeeze_", 1)], ids=["unsqueeze_", "squeeze_"]
)
def test_shapes_that_change_in_place_are_seen_in_order(change, rank, check):
    def forward(self, value):
        y = value + 1
        before = y.dim()
        getattr(y, change)(0)
        after = y.dim()
        y = y.reshape(-1, 4)
        return self.run(y) * (1 if (before, after) == (2, rank) else 100)

    model = net(forward)
    example = x(1, 4) if change == "squeeze_" else x()
    is_whole = "" in capture(model, example).leaves
    assert is_whole == (change == "squeeze_")  # what it does depends on the number of rows
    check(model, example)


def test_what_a_failed_call_did_to_a_shape_is_undone(falls_back):
    class Turns(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, value):
            value = value.unsqueeze_(0)
            assert value.dim() > 0
            y = self.fc(value) if value.dim() == 3 else value
            return y if y.sum() < 1e9 else value

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.turns, self.fc = Turns(), nn.Linear(4, 4)

        def forward(self, value):
            turned = value + 0
            y = self.turns(turned)
            return self.fc(y) if turned.dim() == 3 else y

    falls_back(nn.Sequential(Around()), x(), path="0.turns", match="branches on a value")


def test_a_result_that_is_none_for_some_sizes_only(falls_back):
    class Maybe(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.fc, self.size = nn.Linear(4, 4), size

        def forward(self, value):
            y = self.fc(value)
            if y.sum() > 1e9:
                return None
            return y if value.shape[self.size[0]] > self.size[1] else None

    class Around(nn.Module):
        def __init__(self, *size):
            super().__init__()
            self.maybe, self.fc = Maybe(size), nn.Linear(4, 4)

        def forward(self, value):
            y = self.maybe(value[..., :4])
            return self.fc(value[..., :4]) if y is None else y

    model = nn.Sequential(Around(0, 3))  # of 3 rows it is None, of 4 it is not
    emitted = falls_back(model, x(), path="0", match="is None depends on the number of rows")
    value = torch.randn(5, 4)
    torch.testing.assert_close(emitted(value), npas_fx.materialize(emitted)(value))
    model[0].maybe.register_full_backward_hook(lambda *args: None)
    model[0].maybe.forward = types.MethodType(
        lambda self, v: self.fc(v) if v.shape[0] > 3 else None, model[0].maybe
    )
    falls_back(model, x(), path="0", match="is None depends on the number of rows")


def test_nothing_is_computed_and_no_memory_is_needed():
    class Huge(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide = nn.Linear(100_000, 100_000)
            self.narrow = nn.Linear(100_000, 10)

        def forward(self, value):
            y = self.wide(value)
            assert y.shape[-1] == 100_000
            return self.narrow(y) if y.shape[-1] > 10 else y

    with torch.device("meta"):
        model = Huge()
    captured = capture(model, torch.empty(2, 100_000, device="meta"))
    assert captured.leaves == {}
    assert len(captured.inventory.sites) == 2


def test_the_model_and_the_example_stay_as_they_were():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
    before = copy.deepcopy(model.state_dict())
    example = x().requires_grad_()
    capture(net(lambda self, v: self.run(v) if v.dim() == 2 else v), example)
    capture(model, example)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert example.grad is None
    assert example._version == 0


class Questions(nn.Module):
    """Asks what it is told to ask, and goes another way for each answer."""

    ASKED: ClassVar = {
        "rank": lambda v: v.dim() == 3,
        "columns": lambda v: v.shape[-1] > 4,
        "even": lambda v: v.size(1) % 2 == 0,
        "type": lambda v: v.dtype == torch.float32,
        "device": lambda v: v.device.type == "cpu",
        "rows": lambda v: v.shape[0] > 3,
        "length": lambda v: len(v) > 4,
        "gradients": lambda v: v.requires_grad,
        "loop": lambda v: sum(1 for _ in range(v.shape[1])) > 2,
        "text": lambda v: str(v.dtype) in ("torch.float32", "torch.float64"),
        "unpacked": lambda v: (lambda *sizes: len(sizes))(*v.shape) == 2,
        "number": lambda v: int(v.shape[1]) * 2 > 6,
        "values": lambda v: v.sum() > 0,
    }

    def __init__(self, asked):
        super().__init__()
        self.asked = asked
        self.yes = nn.ModuleList(nn.Linear(4, 4) for _ in asked)
        self.no = nn.ModuleList(nn.Linear(4, 4) for _ in asked)

    def forward(self, value):
        y = value[..., :4]
        for name, yes, no in zip(self.asked, self.yes, self.no, strict=True):
            y = yes(y) if self.ASKED[name](value) else no(y).relu()
        return y


@given(
    st.lists(st.sampled_from(sorted(Questions.ASKED)), min_size=1, max_size=4),
    st.lists(st.integers(1, 5), min_size=1, max_size=2),
    st.integers(4, 6),
    st.lists(st.integers(1, 5), min_size=1, max_size=2),
    st.integers(4, 6),
)
def test_another_call_gives_what_the_model_gives_or_a_guard_error(asked, rows, n, others, m):
    """For whatever shape: guards fire exactly where the model would go another way."""
    model = Questions(tuple(asked))
    example, other = torch.randn(*rows, n), torch.randn(*others, m)
    emitted = npas_fx.transform(model, 1.0, example_inputs=example, solver="greedy", verify=False)
    assert torch.equal(emitted(example), model(example))

    def answers(value):
        return [bool(Questions.ASKED[name](value)) for name in asked if name != "values"]

    if any(name in ("loop", "number") for name in asked):
        return  # what is counted is part of the answer
    try:
        got = emitted(other)
    except npas_fx.GuardError:
        assert answers(other) != answers(example)
    else:
        assert torch.equal(got, model(other))


def test_questions_are_written_as_they_were_asked():
    graph = fx.symbolic_trace(lambda a: (a.shape[1] % 2 == 0, a.size(0) + 3, a.dtype)).graph
    (output,) = (node for node in graph.nodes if node.op == "output")
    written = [describe(node) for node in output.args[0]]
    assert written == ["a.shape[1] % 2 == 0", "a.size(0) + 3", "a.dtype"]
