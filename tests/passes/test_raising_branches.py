"""Branches of which one way can only raise: traced, and raising when the original does."""

import contextlib
import dis
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Distribution, Independent, Normal, kl_divergence

import npas_fx
from npas_fx.passes.capture import capture
from npas_fx.passes.raising_branches import _Code, check_branch
from two_layers import net, x

BAD = torch.tensor([[float("nan"), -9.0, 20.0, 0.0]])


class OwnError(ValueError):
    def __init__(self, value, limit):
        super().__init__(f"{value} is above {limit}")


def check_finite(value, name="value"):
    if not torch.isfinite(value).all():
        raise ValueError(f"{name} of shape {tuple(value.shape)} is not finite: {value}")


def if_not(self, value):
    if not torch.isfinite(value).all():
        raise ValueError("not finite")
    return self.run(value)


def if_true(self, value):
    y = self.a(value)
    if (value > 10).any():
        raise KeyError
    return self.b(y)


def with_else(self, value):
    if (value.min() > -5) == True:  # noqa: E712
        y = self.run(value)
    else:
        message = "too small"
        for word in ("so", "far"):
            message += word
        raise OverflowError(message)
    return y


def either(self, value):
    if torch.isnan(value).any() or value.max() > 10:
        raise ArithmeticError(value)
    return self.run(value)


def between(self, value):
    if not (value.min() > -5 and value.max() < 10):
        raise ValueError("too large")
    return self.run(value)


def own_kind(self, value):
    if value.max() > 10:
        raise OwnError(value, 10)
    return self.run(value)


def in_a_loop(self, value):
    for row in range(value.shape[1]):
        if value[:, row].sum() > 15:
            raise ValueError(row)
    return self.run(value)


def in_a_function(self, value):
    check_finite(value)
    y = self.run(value)
    check_finite(y, "result")
    return y


def in_no_grad(self, value):
    with torch.no_grad(), torch.enable_grad():
        check_finite(self.a(value))
        if (value > 10).any():
            raise ValueError("too large")
    return self.run(value)


@torch.no_grad()
def _check_decorated(value):
    check_finite(value)


def decorated(self, value):
    _check_decorated(value)
    return self.run(value)


def with_finally(self, value):
    try:
        check_finite(value)
        y = self.run(value)
    finally:
        value = None
    return y


def other_kind(self, value):
    try:
        y = self.run(value)
    except KeyError:
        return value
    check_finite(y)
    return y


FORWARDS = [
    *(if_not, if_true, with_else, either, between, own_kind, in_a_loop, in_a_function),
    *(in_no_grad, decorated, with_finally, other_kind),
]
EACH = pytest.mark.parametrize("forward", FORWARDS, ids=lambda function: function.__name__)


def _checks(captured):
    return [node for node in captured.graph.nodes if node.target is check_branch]


@EACH
def test_recorded_and_the_same(forward, check):
    captured = capture(net(forward), x())
    assert not captured.leaves
    assert _checks(captured)
    check(net(forward), x(), others=((x(7, 4),),))
    if forward is not in_a_loop:
        assert not capture(net(forward)).leaves


@EACH
def test_it_raises_when_the_original_does(forward):
    emitted = npas_fx.transform(net(forward), 1.0, example_inputs=x(), solver="greedy")
    value = BAD.nan_to_num() if forward in (if_true, with_else, between, own_kind) else BAD
    value = value.nan_to_num() if forward is in_a_loop else value
    for _ in range(2):
        with pytest.raises(Exception) as expected:  # noqa: PT011
            net(forward)(value)
        with pytest.raises(Exception, match=rf"{__file__}:\d+") as got:
            emitted(value)
        assert type(got.value) is type(expected.value).__mro__[expected.type is OwnError]
    torch.testing.assert_close(emitted(x()).shape, x().shape)


@EACH
def test_torch_compile_needs_one_graph(forward):
    torch._dynamo.reset()
    value = x()
    emitted = npas_fx.transform(net(forward), 0.9, example_inputs=value, solver="greedy")
    compiled = torch.compile(emitted, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(value), emitted(value))


def test_a_compiled_module_raises():
    emitted = npas_fx.transform(net(if_not), 1.0, example_inputs=x(), solver="greedy")
    compiled = torch.compile(emitted, backend="aot_eager", fullgraph=True)
    compiled(x())
    with pytest.raises(RuntimeError, match="is False, for which the code of the model raises"):
        compiled(x() * torch.nan)


def caught(self, value):
    try:
        if value.sum() > 0:
            raise ValueError("positive")
    except ValueError:
        value = value * 2
    return self.run(value)


def caught_further_out(self, value):
    try:
        check_finite(value)
    except ValueError:
        value = value.nan_to_num()
    return self.run(value)


def suppressed(self, value):
    y = value * 2
    with torch.no_grad(), contextlib.suppress(ValueError):
        check_finite(value)
        y = value * 3
    return self.run(y)


def suppressed_beside_a_known_one(self, value):
    y, context = value * 2, torch.no_grad()
    context.__enter__()
    with contextlib.suppress(ValueError):
        check_finite(value)
        y = value * 3
    context.__exit__(None, None, None)
    return self.run(y)


def suppressed_in_the_branch(self, value):
    with torch.no_grad():
        if value.sum() > 0:
            with contextlib.suppress(ValueError):
                raise ValueError("positive")
            value = value * 2
    return self.run(value)


def both_raise(self, value):
    y = self.run(value)
    try:
        if value.sum() > 0:
            raise ValueError("positive")
        raise KeyError("negative")
    except ValueError:
        return y
    except KeyError:
        return -y


def caught_by_hasattr(self, value):
    class Holder:
        @property
        def positive(self):
            if value.sum() < 0:
                raise AttributeError("negative")
            return True

    y = self.run(value)
    return y if hasattr(Holder(), "positive") else -y


def raises_later(self, value):
    for _ in range(3):
        if value.sum() > 10:
            break
        value = value + 1
    else:
        if value.shape[0] == 100:
            raise ValueError("too small")
    return self.run(value)


def items_are_asked(self, value):
    y = self.run(value)
    if (value.sum() > 0, 1) == (True, 2):
        raise ValueError("never")
    return y


def value_is_used(self, value):
    y = self.run(value)
    return y if not value.sum() > 0 else -y


def only_one_of_both(self, value):
    if value.sum() > 0 and value.max() > 100:
        raise ValueError("too large")
    return self.run(value)


def keeps_the_answer(self, value):
    is_bad = bool(value.max() > 100)
    if is_bad:
        raise ValueError("too large")
    return self.run(value)


@pytest.mark.parametrize(
    "forward",
    [
        *(caught, caught_further_out, suppressed, suppressed_beside_a_known_one),
        *(suppressed_in_the_branch, both_raise, caught_by_hasattr, raises_later),
        *(items_are_asked, value_is_used, only_one_of_both, keeps_the_answer),
    ],
    ids=lambda function: function.__name__,
)
def test_what_may_go_on_is_called(forward, falls_back):
    falls_back(net(forward), x(), match="branches on a value that depends on its inputs")


class Checks(nn.Module):
    def forward(self, value):
        check_finite(value)
        return value

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)


def test_a_caller_that_catches_makes_the_innermost_module_a_call(check):
    def forward(self, value):
        with contextlib.suppress(ValueError):
            value = self.checks(value) * 2
        return self.run(value)

    model = net(forward, checks=Checks())
    assert capture(model, x()).leaves.keys() == {"checks"}
    check(model, x())


def test_sizes_are_checked_and_not_fixed(check):
    def forward(self, value):
        if value.shape[1] != 4:
            raise ValueError("four columns")
        if value.shape[0] == 100:
            raise ValueError("too many rows")
        return self.run(value)

    model = net(forward)
    check(model, x(), others=((x(9, 4),), (x(1, 4),)))
    for example in (x(), None):
        assert len(_checks(capture(model, example))) == 2
        emitted = npas_fx.transform(model, 1.0, example_inputs=example, solver="greedy")
        with pytest.raises(ValueError, match="for which the code of the model raises"):
            emitted(x(100, 4))


def several(self, value):
    rows, others = value.shape[0], self.count.numel() + 2
    if rows != 1 and others != 1 and rows != others:
        raise ValueError("cannot be broadcast")
    return self.run(value)


def several_of_data(self, value):
    total, corner = value.sum(), value[0, 0]
    if total > 0 and corner > 5:
        raise ValueError("too large")
    return self.run(value)


def several_in_a_loop(self, value):
    for rows, most in zip((value.shape[0], value.shape[1]), (4, 4), strict=True):
        if rows != 1 and rows > most:
            raise ValueError("too many")
        if rows == 2 and most == 4 and value.ndim > 2:
            raise ValueError("two in three")
    return self.run(value)


def none_of_them(self, value):
    rows = value.shape[0]
    if rows > 1 and not self.training and rows > 9:
        raise ValueError("at most nine in eval mode")
    return self.run(value)


@pytest.mark.parametrize(
    ("forward", "good", "bad"),
    [
        (several, [x(1, 4), x(3, 4)], [x(2, 4)]),
        (
            several_of_data,
            [-x().abs(), x().clamp(max=5), torch.full((3, 4), -9.0)],
            [x().abs() + 6],
        ),
        (several_in_a_loop, [x(1, 4), x(4, 4), x(2, 4)], [x(5, 4), torch.ones(2, 3, 4)]),
        (none_of_them, [x(1, 4), x(9, 4)], [x(10, 4)]),
    ],
)
def test_conditions_that_hold_together(forward, good, bad, check):
    model = net(forward)
    assert not capture(model, x()).leaves
    emitted = check(model, x(), others=[(value,) for value in good])
    for value in bad:
        for module in (model.eval(), emitted.eval()):
            with pytest.raises(ValueError):  # noqa: PT011
                module(value)


def test_conditions_compile_as_those_of_the_plain_network():
    for forward in (several, none_of_them):
        emitted = npas_fx.transform(net(forward), 1.0, example_inputs=x(), solver="greedy")
        compiled = torch.compile(emitted, backend="eager", fullgraph=True, dynamic=False)
        torch.testing.assert_close(compiled(x()), emitted(x()), rtol=9, atol=9)


def reads_in_between(self, value):
    if value.sum() > 0 and self.look(value):
        raise ValueError
    return self.run(value)


def indexes_in_between(self, value):
    if value.ndim > 1 and value.shape[1] > 4:
        raise ValueError
    return self.run(value)


def goes_on_in_between(self, value):
    y = self.run(value)
    if value.sum() > 0:
        y = y + 1
        if value.sum() > 99:
            raise ValueError
    return y


def test_what_stands_between_them_is_not_run_in_vain(falls_back, check):
    for forward in (reads_in_between, goes_on_in_between):
        falls_back(
            net(forward, look=lambda value: value.max() > 9), x(), match="branches on a value"
        )
    check(net(indexes_in_between), x(), others=((x(9, 4),),))


def samples(self, value):
    mean, log_scale = self.run(value).chunk(2, -1)
    q = Normal(mean, log_scale.exp())
    p = Independent(Normal(torch.zeros_like(mean), torch.ones_like(mean)), 1)
    z = q.rsample()
    return z, q.log_prob(z), kl_divergence(Independent(q, 1), p), q.rsample((2,))


def chooses(self, value):
    one, other = Categorical(logits=self.run(value)), Categorical(self.run(value).softmax(-1))
    action = value.argmax(-1)
    return one.log_prob(action), one.entropy(), other.sample(), other.log_prob(action)


@pytest.fixture
def _validated(monkeypatch):
    # torch.compile switches it off for the whole process (torch 2.13).
    monkeypatch.setattr(Distribution, "_validate_args", True)


@pytest.mark.usefixtures("_validated")
@pytest.mark.parametrize("forward", [samples, chooses])
def test_distributions_are_traced(forward, check):
    captured = capture(net(forward), x())
    assert not captured.leaves
    assert len(_checks(captured)) >= 4
    emitted = check(net(forward), x(), others=((x(7, 4),),))
    with pytest.raises(ValueError, match=r"distribution\.py:\d+"):
        emitted(BAD)


@pytest.mark.usefixtures("_validated")
@pytest.mark.parametrize("forward", [samples, chooses])
def test_distributions_need_no_more_graphs_than_plain_ones(forward):
    emitted = npas_fx.transform(net(forward), 0.9, example_inputs=x(), solver="greedy")
    counts = []
    for model in (net(forward), emitted):
        torch._dynamo.reset()
        counts.append(torch._dynamo.explain(model)(x()).graph_count)
    assert counts[1] <= counts[0]


def _made_up(*instructions):
    """The code of another Python version, as far as it is looked at."""
    code = _Code((lambda: None).__code__)
    made = [
        SimpleNamespace(opname=name, argval=value, argrepr=text, offset=2 * k, opcode=opcode)
        for k, (name, value, text, opcode) in enumerate(instructions)
    ]
    code._at = {each.offset: each for each in made}
    code.next = {each.offset: each.offset + 2 for each in made[:-1]}
    return code


_JUMP, _OTHER = next(iter(dis.hasjrel)), dis.opmap["POP_TOP"]


def _plain(name, value=None, text=""):
    return name, value, text, _OTHER


def test_handlers_of_python_3_10_are_found():
    code = _made_up(
        ("SETUP_WITH", 14, "", _JUMP),
        _plain("LOAD_FAST"),
        ("POP_JUMP_IF_FALSE", 8, "", _JUMP),
        _plain("RAISE_VARARGS"),
        _plain("POP_BLOCK"),
        _plain("LOAD_CONST"),
        _plain("RETURN_VALUE"),
        _plain("WITH_EXCEPT_START"),
        ("POP_JUMP_IF_TRUE", 20, "", _JUMP),
        _plain("RERAISE"),
        _plain("POP_TOP"),
        _plain("RETURN_VALUE"),
    )
    code._table = None
    assert code._find_set_up() == dict.fromkeys(range(2, 10, 2), 14)
    assert code.passes([6], num_known=1)
    assert not code.passes([6], num_known=0)


@pytest.mark.parametrize(("before", "is_asked"), [("LOAD_CONST", True), ("BUILD_TUPLE", False)])
def test_a_comparison_of_python_3_13_asks_for_itself(before, is_asked):
    code = _made_up(
        _plain("LOAD_FAST"),
        _plain(before, 0),
        _plain("COMPARE_OP", ">", "bool(>)"),
        ("POP_JUMP_IF_FALSE", 8, "", _JUMP),
        _plain("RETURN_VALUE"),
    )
    assert (code.find_jump(4) is not None) is is_asked


def test_truth_is_asked_before_the_jump_in_python_3_13():
    code = _made_up(_plain("TO_BOOL"), ("POP_JUMP_IF_FALSE", 4, "", _JUMP), _plain("RETURN_VALUE"))
    assert code.find_jump(0).opname == "POP_JUMP_IF_FALSE"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="it has no table of exceptions")
def test_both_ways_to_find_handlers_are_for_their_own_version():
    assert _Code(caught.__code__)._table
    assert not _Code(if_not.__code__)._table
