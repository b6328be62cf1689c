"""What a call keeps on the model: caches are forgotten, all else is never lost silently."""

import pytest
import torch
from torch import nn

import npas_fx
from comparison import assert_same
from npas_fx.passes.capture import capture
from npas_fx.passes.history import forgets_calls
from two_layers import net


def sequences(rows=2, length=5):
    return torch.randn(rows, length, 4)


def keeps_a_mask(self, value):
    n = value.shape[1]
    if self.kept is None or self.kept.size(0) != n:
        self.kept = torch.full((n, n), -9.0, device=value.device).triu(1)
    return (value @ value.transpose(1, 2) + self.kept).softmax(-1) @ self.run(value)


def keeps_the_longest(self, value):
    n = value.shape[1]
    if n > self.length:
        self.length = n
        self.kept = torch.outer(torch.arange(n), torch.ones(4) / 10).cos()
    return self.run(value * self.kept[:n])


def keeps_by_length(self, value):
    key = (value.shape[1], value.device)
    if key not in self.cache:
        self.cache[key] = torch.linspace(0, 1, key[0])[:, None]
    return self.run(value) * self.cache[key]


def builds_in_place(self, value):
    n = value.shape[1]
    if self.kept is None or len(self.kept) != n:
        kept = torch.zeros(n, 4)
        kept[:, 0::2] = torch.arange(n)[:, None].sin()
        kept[:, 1::2].add_(torch.arange(n)[:, None].cos())
        self.kept = kept
    return self.run(value + self.kept)


def keeps_several(self, value):
    if self.kept is None or self.kept[1] != value.shape[1]:
        self.kept = (torch.arange(value.shape[1])[:, None], value.shape[1], "made")
    return self.run(value) + self.kept[0]


CACHES = [keeps_a_mask, keeps_the_longest, keeps_by_length, builds_in_place, keeps_several]


def caching(forward):
    return net(forward, kept=None, length=0, cache={})


@pytest.mark.parametrize("forward", CACHES)
@pytest.mark.parametrize("is_warm", [False, True])
def test_a_cache_of_what_sizes_make_is_traced(forward, is_warm, check):
    model = caching(forward)
    if is_warm:
        model(sequences(length=7))
    assert not capture(model, sequences()).leaves
    emitted = check(model, sequences(), others=[(sequences(4),)])
    if forward not in (keeps_by_length, keeps_several):  # the length is asked for as a number
        assert_same(emitted, model, (sequences(3, 6),))
        assert_same(emitted, model, (sequences(3, 2),))


def indices(self, value):
    n = value.shape[1]
    if self.indices is None or self.indices.shape[0] != n:
        self.indices = torch.arange(n)[:, None].expand(-1, 4)
    return self.run(value + self.indices)


def with_indices(forward, buffer, persistent=False):
    model = net(forward)
    model.register_buffer("indices", buffer, persistent=persistent)
    return model


@pytest.mark.parametrize("buffer", [torch.zeros(1, 4), None], ids=["of another shape", "None"])
def test_a_buffer_that_saves_work_is_bound_anew_at_each_call(buffer, check):
    model = with_indices(indices, buffer)
    assert not capture(model, sequences()).leaves
    emitted = check(model, sequences(), others=[(sequences(4),), (sequences(2, 7),)])
    emitted(sequences(2, 6))
    assert emitted.indices.shape == (6, 4)
    given = {"example_inputs": sequences(), "solver": "greedy", "on_guard": "fallback"}
    emitted = npas_fx.transform(model, 0.9, **given)
    emitted.train().forward.__wrapped__  # noqa: B018  # it can fall back, and need not
    assert_same(emitted, model, (sequences(2, 7),))


def uses_the_last(self, value):
    y = self.run(value) if self.indices is None else self.run(value) + self.indices.sum()
    self.indices = torch.arange(value.shape[1])
    return y


def test_a_buffer_that_later_calls_read_saves_no_work(falls_back):
    falls_back(with_indices(uses_the_last, None), sequences(), match="may make a difference")
    saved = with_indices(indices, torch.zeros(1, 4), persistent=True)
    falls_back(saved, sequences(), match="its shape or type does not stay")


def test_without_an_example_a_cache_is_called(falls_back):
    assert "" in capture(caching(keeps_a_mask)).leaves
    with torch.device("meta"):
        assert "" in capture(caching(keeps_a_mask), sequences()).leaves


def counts(self, value):
    self.length += 1
    return self.run(value) * (2 if self.length > 100 else 1)


def remembers_the_longest(self, value):
    self.length = max(self.length, value.shape[1])
    return self.run(value) * self.length


def remembers_the_first(self, value):
    self.kept = self.kept or value.shape[1]
    return self.run(value) * self.kept


def makes_a_start(self, value):
    if not self.length:
        with torch.no_grad():
            self.count.copy_(value.mean())
        self.length = 1
    return self.run(value) + self.count


def adds_up(self, value):
    self.kept = torch.zeros(4) if self.kept is None else self.kept
    self.kept += 1
    return self.run(value) + self.kept


def keeps_a_mean(self, value):
    self.kept = value.mean() if self.kept is None else self.kept
    return self.run(value) + self.kept


def remembers_the_shortest(self, value):
    self.length = min(self.length or 9, value.shape[1])
    return self.run(value) * self.length


def keeps_what_the_examples_do_not_show(self, value):
    self.kept = (value > 100).any() if self.kept is None else self.kept
    return self.run(value) + self.kept


def builds_of_what_the_examples_do_not_show(self, value):
    if self.kept is None:
        self.kept = torch.zeros(4)
        self.kept[0] = (value > 100).any()
    return self.run(value) + self.kept


@pytest.mark.parametrize(
    "forward",
    [
        *(counts, remembers_the_longest, remembers_the_shortest, remembers_the_first),
        *(makes_a_start, adds_up, keeps_a_mean),
        *(keeps_what_the_examples_do_not_show, builds_of_what_the_examples_do_not_show),
    ],
)
def test_what_is_no_cache_is_called(forward):
    assert "" in capture(caching(forward), sequences()).leaves


def warms_up_in_train_mode(self, value):
    if self.training:
        self.length = 1
    return self.run(value) * (2 if self.length else 1)


def keeps_a_result_in_train_mode(self, value):
    y = self.run(value)
    if self.training:
        self.kept = y.detach().mean()
    elif self.kept is not None:
        y = y - self.kept
    return y


def warms_up_in_eval_mode(self, value):
    if not self.training:
        self.length = 1
    return self.run(value) * (2 if self.length else 1)


@pytest.mark.parametrize(
    "forward", [warms_up_in_train_mode, keeps_a_result_in_train_mode, warms_up_in_eval_mode]
)
@pytest.mark.parametrize("example", [True, False])
def test_what_one_mode_leaves_for_the_other_is_not_lost(forward, example):
    model = nn.Sequential(nn.Linear(4, 4), caching(forward))
    value = sequences()
    captured = capture(model, value if example else None)
    assert "leaves something" in captured.leaves["1"] or "earlier call" in captured.leaves["1"]
    given = value if example else None
    emitted = npas_fx.transform(model, 0.9, example_inputs=given, solver="greedy")
    plain = npas_fx.materialize(emitted)
    for is_training in (True, False, True, False):
        results = [module.train(is_training)(value) for module in (emitted, plain)]
        torch.testing.assert_close(*results)


def test_what_is_kept_for_the_user_is_no_matter():
    def forward(self, value):
        self.kept = self.run(value)
        return self.kept + 1

    assert not capture(caching(forward), sequences()).leaves


class Adder(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.register_buffer("total", torch.zeros(()))
        self.kept, self.body = None, forward

    def forward(self, value):
        return self.body(self, value)


def forgets(forward):
    calls = [lambda module, k=k: module(torch.full((), float(k))) for k in (1, 2)]
    return forgets_calls(lambda: Adder(forward), calls)


def test_buffers_are_put_back_and_attributes_are_not():
    def adds_up_in_a_buffer(self, value):
        self.total += value
        return self.total

    def adds_up_in_an_attribute(self, value):
        self.kept = (self.kept or 0) + 1
        return value

    def replaces_a_buffer(self, value):
        self.total = self.total + value
        return self.total

    def replaces_it_by_another_kind(self, value):
        self.total = self.total.reshape(-1) + value
        return self.total

    assert forgets(adds_up_in_a_buffer)
    assert forgets(replaces_a_buffer)
    assert not forgets(adds_up_in_an_attribute)
    assert not forgets(replaces_it_by_another_kind)


def test_a_cache_beside_what_is_kept_for_the_user(check):
    def forward(self, value):
        self.last = keeps_a_mask(self, value)
        return self.last * 2

    assert not capture(caching(forward), sequences()).leaves
    check(caching(forward), sequences(), others=[(sequences(4, 6),)])


def test_a_cache_beside_a_buffer_that_is_bound_anew(check):
    def forward(self, value):
        self.count = 0.9 * self.count + 0.1 * value.detach().mean()
        return keeps_a_mask(self, value) + self.count

    assert not capture(caching(forward), sequences()).leaves
    check(caching(forward), sequences(), others=[(sequences(4, 6),)])


def test_what_a_call_leaves_in_buffers_counts_like_what_it_gives():
    def writes_the_first(self, value):
        self.kept = value if self.kept is None else self.kept
        self.total.copy_(self.kept)
        return value

    assert not forgets(writes_the_first)


@pytest.mark.parametrize("choose", [max, min])
def test_calls_are_tried_in_both_orders(choose):
    def remembers(self, value):
        self.kept = float(value if self.kept is None else choose(value, self.kept))
        return self.kept

    assert not forgets(remembers)


def test_a_model_that_takes_none_of_the_calls_tells_nothing():
    def fails(self, value):
        raise ValueError

    assert not forgets(fails)


def test_objects_in_results_are_looked_into():
    class Result:
        def __init__(self, value):
            self.value = value

    def gives_an_object(self, value):
        self.kept = value if self.kept is None else self.kept
        return Result(self.kept)

    assert not forgets(gives_an_object)
    assert forgets(lambda self, value: Result(value))
