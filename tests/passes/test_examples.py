"""Further examples: what differs between them is called as it is, and works for all of them."""

import math
import re
from collections import UserDict
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import npas_fx
from comparison import assert_same, emit
from npas_fx import CaptureError, GuardError
from npas_fx.passes.capture import capture
from npas_fx.passes.emitted import emission_of
from npas_fx.verify import verify
from two_layers import net, x


def branches(self, x):
    return self.run(x * 2 if x.shape[1] > 3 else x)


def takes_a_root(self, x):
    side = int(math.sqrt(x.shape[1]))
    return self.run(x[:, : side * side].unflatten(1, (side, side)))


def pads(self, x):
    missing = -x.shape[1] % 4
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    return self.run(x.unflatten(1, (-1, 4)).mean(1))


def loops(self, x):
    return torch.stack([self.run(x[:, k]) for k in range(x.shape[1])])


def asks_nothing(self, x):
    return self.run(x - x.mean(1, keepdim=True)).flatten(1)[:, : x.shape[1]]


FORWARDS = [branches, takes_a_root, pads, loops, asks_nothing]


def around(forward):
    """A model of three layers, of which the second one runs the code."""
    return nn.Sequential(nn.Linear(4, 4), net(forward), nn.Tanh())


@settings(max_examples=settings().max_examples // 2)  # each is several captures
@given(
    st.sampled_from(FORWARDS),
    st.lists(st.integers(1, 7), min_size=2, max_size=3, unique=True),
    st.integers(1, 7),
)
def test_the_result_is_right_for_all_examples_and_for_no_other_input_wrong(forward, sizes, other):
    model = around(forward)
    example, *further = (x(3, size, 4) for size in sizes)
    emitted = emit(model, 0.7, (example,), more_examples=further)
    for size in sizes:
        assert_same(emitted, model, (x(2, size, 4),))
    if other not in sizes:
        with suppress(GuardError):
            emitted(x(2, other, 4))
            assert_same(emitted, model, (x(2, other, 4),))


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)
def test_without_further_examples_another_size_is_an_error_with_the_line(forward):
    model = around(forward)
    emitted = emit(model, 0.7, (x(3, 2, 4),))
    if forward is asks_nothing:
        assert_same(emitted, model, (x(3, 8, 4),))
    else:
        with pytest.raises(GuardError, match=r"test_examples\.py:\d+; pass .* in more_examples"):
            emitted(x(3, 8, 4))


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)
def test_only_what_differs_is_called(forward):
    model = around(forward)
    leaves = capture(model, x(3, 2, 4), None, [x(3, 8, 4)]).leaves
    assert set(leaves) - {"2"} == ({"1"} if forward is not asks_nothing else set())
    assert not capture(model, x(3, 4, 4), None, [x(2, 4, 4)]).leaves.keys() - {"2"}


def test_a_container_of_another_length_is_taken_apart_by_the_model_itself():
    """At the root the whole model is called; nothing is captured for just that many items."""

    def forward(self, items):
        return torch.stack([self.run(item) for item in items])

    model = net(forward)
    items = [x(), x(), x()]
    assert not capture(model, (items,)).leaves
    assert "loops over a value" in capture(model, (items,), None, [(items[:1],)]).leaves[""]
    emitted = emit(model, 0.7, (items,), more_examples=[(items[:1],)])
    for number in (1, 2, 3):
        assert_same(emitted, model, (items[:number],))


def finds(self, items):
    y = self.run(items["x"])
    return y + items["bias"] if "bias" in items else y


def tries(self, items):
    try:
        bias = items["bias"]
    except KeyError:
        bias = 0
    return self.run(items["x"]) + bias


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("forward", [finds, tries], ids=lambda f: f.__name__)
def test_an_item_that_only_one_example_has_is_missed(forward, is_first):
    """What the code does where the item is missing must not be lost."""
    model = net(forward)
    whole, part = {"x": x(), "bias": x()}, {"x": x()}
    first, further = (whole, part) if is_first else (part, whole)
    emitted = emit(model, 0.7, (first,), more_examples=[further])
    for inputs in (first, further):
        assert_same(emitted, model, (inputs,))


def test_a_missing_item_deep_inside_is_missed():
    def forward(self, items):
        try:
            bias = items[0]["bias"]
        except KeyError:
            bias = 0
        return self.run(items[1]) + bias

    model = net(forward)
    emitted = emit(model, 0.7, ([{"bias": x()}, x()],), more_examples=[([{}, x()],)])
    assert re.match(
        r"one of the examples has no items\[0\]\['bias'\] ", emission_of(emitted).capture.leaves[""]
    )
    for inputs in ([{}, x()], [{"bias": x()}, x()]):
        assert_same(emitted, model, (inputs,))


def test_what_is_none_in_one_example_only_is_not_fixed():
    def forward(self, items):
        y = self.run(items[0])
        return y if items[1] is None else y + items[1]

    model = net(forward)
    one, other = [x(), x()], [x(), None]
    for first, further in ((one, other), (other, one)):
        emitted = emit(model, 0.7, (first,), more_examples=[further])
        for inputs in (first, further):
            assert_same(emitted, model, (inputs,))


def test_a_type_that_differs_is_not_fixed():
    def forward(self, items):
        return self.run(items[0] if isinstance(items[0], torch.Tensor) else items[0][0])

    model = net(forward)
    emitted = emit(model, 0.7, ([x()],), more_examples=[([[x()]],)])
    for inputs in ([x()], [[x()]]):
        assert_same(emitted, model, (inputs,))


def test_each_example_is_looked_at_for_state_that_a_call_keeps():
    """Only a long input leaves something in train mode, which eval mode reads."""

    def forward(self, x):
        if not self.training:
            return self.run(x) + getattr(self, "seen", 0)
        if float(x.sum()) and x.shape[1] > 3:  # of values: train mode cannot be traced
            self.seen = x.detach().mean()
        return self.run(x)

    model = nn.Sequential(net(forward), nn.Tanh())
    further = [x(3, 7, 4)]
    assert "eval" not in capture(model, x(3, 2, 4), None, further).leaves["0"]
    emitted = emit(model, 1.0, (x(3, 2, 4),), more_examples=further)
    for part in (emitted, model):
        part.train()(further[0])
        part.eval()
    assert torch.equal(emitted(further[0]), model(further[0]))


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x, mask=None, *, times=1):
        y = self.b(self.a(x).relu())
        return (y if mask is None else y * mask) * times


FORMS = {
    "tensor": ({"example_inputs": x(3, 4)}, lambda n: x(n, 4), lambda n: ((x(n, 4),), {})),
    "tuple": (
        {"example_inputs": (x(3, 4), x(3, 4))},
        lambda n: (x(n, 4), x(n, 4)),
        lambda n: ((x(n, 4), x(n, 4)), {}),
    ),
    "dict": (
        {"example_kwargs": {"x": x(3, 4), "times": 2}},
        lambda n: {"x": x(n, 4), "times": 2},
        lambda n: ((), {"times": 2, "x": x(n, 4)}),
    ),
    "pair": (
        {"example_inputs": x(3, 4), "example_kwargs": {"mask": x(3, 4)}},
        lambda n: (x(n, 4), {"mask": x(n, 4)}),
        lambda n: ((x(n, 4),), {"mask": x(n, 4)}),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_further_examples_have_the_form_of_the_first(form):
    example, make, make_call = FORMS[form]
    model = Masked()
    emitted = npas_fx.transform(
        model, 0.7, **example, more_examples=[make(5), make(2)], solver="greedy"
    )
    args, kwargs = make_call(7)
    assert_same(emitted, model, args, kwargs)


def test_keyword_arguments_may_come_in_any_mapping():
    """As a tokenizer gives them; a folder holds them as dicts."""
    examples = [UserDict(x=x(3, 4)), UserDict(x=x(5, 4))]
    held = capture(Masked(), None, examples[0], examples[1:]).inputs
    assert not held.why_not_held("example_kwargs")
    assert type(held.read("more_examples", "cpu")[0]) is dict


@pytest.mark.parametrize(
    ("example", "more", "why"),
    [
        ({"example_inputs": x()}, x(), "more_examples is a Tensor; pass a list"),
        ({"example_inputs": x()}, {"x": x()}, "more_examples is a dict; pass a list"),
        ({}, [x()], "more_examples without a first one"),
        ({"example_inputs": x()}, [x(), (x(), x(), x())], r"more_examples\[1\]: .* do not fit"),
        (
            {"example_inputs": x()},
            [(x(), x())],
            r"mask is a Tensor \(by position\) in more_examples\[0\], but left out in the example",
        ),
        (
            {"example_inputs": (x(), x())},
            [x()],
            r"mask is left out in more_examples\[0\], but a Tensor \(by position\) in the example",
        ),
        (
            {"example_kwargs": {"x": x(), "times": 2}},
            [{"x": x(), "times": 3}],
            r"times is 3 \(by name\) in more_examples\[0\], but 2 \(by name\) in the example",
        ),
        ({"example_inputs": x()}, [[x()]], r"x is a list .* in more_examples\[0\], but a Tensor"),
        (
            {"example_kwargs": {"x": x()}},
            [{"x": x()}, x()],
            r"more_examples\[1\] has a Tensor in the place of its keyword arguments",
        ),
        (
            {"example_inputs": x(), "example_kwargs": {"times": 2}},
            [x()],
            r"more_examples\[0\] is a Tensor; with both .* each is a pair",
        ),
        (
            {"example_inputs": x(), "example_kwargs": {"times": 2}},
            [(x(), x())],
            r"more_examples\[0\] has a Tensor in the place of its keyword arguments",
        ),
    ],
    ids=[
        *("tensor", "dict", "no_first", "too_many", "optional_added", "optional_left_out"),
        *("constant", "type", "no_dict", "no_pair", "pair_of_others"),
    ],
)
@pytest.mark.parametrize("function", ["inspect", "plan"])
def test_an_example_that_is_given_otherwise_is_refused(function, example, more, why):
    budget = {} if function == "inspect" else {"budget": 0.7}
    with pytest.raises(CaptureError, match=why):
        getattr(npas_fx, function)(Masked(), **budget, **example, more_examples=more)


def test_an_example_on_which_the_model_fails_is_named():
    with pytest.raises(CaptureError, match=r"raised RuntimeError on more_examples\[1\] in train"):
        npas_fx.transform(Masked(), 0.7, example_inputs=x(), more_examples=[x(5, 4), x(3, 5)])


def test_further_examples_are_verified(monkeypatch):
    """Where a graph is wrong for one of them only, the model's code is called."""
    model = net(lambda self, x: self.run(x))
    forward = nn.Linear.forward
    plan = npas_fx.plan(model, 0.7, example_inputs=x())

    def wrong_for_five(layer, value):
        return forward(layer, value) + (value.shape[0] == 5)

    monkeypatch.setattr(nn.Linear, "forward", wrong_for_five)
    npas_fx.apply(model, plan, example_inputs=x())
    given = {"example_inputs": x(), "more_examples": [x(6, 4), x(5, 4)]}
    npas_fx.apply(model, plan, **given, verify=False)
    match = r"more_examples\[1\]: outputs in train mode"
    with pytest.warns(npas_fx.CaptureWarning, match=match):
        emitted = npas_fx.apply(model, plan, **given)
    torch.testing.assert_close(emitted(v := x(5, 4)), npas_fx.materialize(emitted)(v))
    unchecked = npas_fx.apply(model, plan, **given, verify=False)
    with pytest.raises(npas_fx.VerificationError, match=match):
        verify(unchecked, model, x(), None, given["more_examples"])


def test_examples_that_agree_change_nothing():
    model = around(branches)
    alone, more = (
        capture(model, x(3, 4, 4), None, further) for further in ((), [x(3, 5, 4), x(7, 9, 4)])
    )
    assert str(alone.graph) == str(more.graph)
    assert alone.report() == more.report()
