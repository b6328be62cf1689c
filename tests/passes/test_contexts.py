"""Gradients switched off and on, and autocast switched off, inside ``forward``."""

import pytest
import torch
from torch import fx, nn

import npas_fx
from npas_fx.passes import contexts
from npas_fx.passes.capture import capture
from npas_fx.passes.contexts import SWITCHES
from two_layers import net, x


def no_grad(self, value):
    with torch.no_grad():
        y = self.a(value)
    return self.b(y) + self.b(self.a(value))


def enable_grad(self, value):
    with torch.enable_grad():
        return self.b(self.a(value))


def nested(self, value):
    with torch.no_grad():
        y = self.a(value)
        with torch.enable_grad():
            z = self.a(value)
        y = y + self.a(value)
    return self.b(y) * self.b(z)


@torch.no_grad()
def _frozen(self, value):
    return self.a(value)


def decorated(self, value):
    return self.b(_frozen(self, value) + self.a(value))


def autocast_off(self, value):
    with torch.autocast("cpu", enabled=False):
        y = self.a(value.float())
    return self.b(y), y


def both(self, value):
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        y = self.a(value.float())
    return self.b(y), y


def by_device(self, value):
    with torch.autocast(value.device.type, enabled=False):
        y = self.a(value.float())
    return self.b(y), y


FORWARDS = [no_grad, enable_grad, nested, decorated, autocast_off, both, by_device]
EACH = pytest.mark.parametrize("forward", FORWARDS, ids=lambda function: function.__name__)


@EACH
def test_recorded_and_the_same(forward, check):
    model = net(forward)
    captured = capture(model, x())
    assert not captured.leaves
    assert any(node.target in SWITCHES for node in captured.graph.nodes)
    check(model, x(), others=((x(7, 4),),))
    check(model, x(), example=False)


@EACH
def test_under_the_caller_s_own_contexts(forward):
    model, value = net(forward), x()
    emitted = npas_fx.transform(model, 1.0, example_inputs=value, solver="greedy")
    for mode, precision in ((True, True), (False, False), (False, True)):
        with torch.set_grad_enabled(mode), torch.autocast("cpu", torch.bfloat16, precision):
            got, expected = emitted(value), model(value)
            assert torch.is_grad_enabled() is mode
            assert torch.is_autocast_enabled("cpu") is precision
        pairs = zip(_all(got), _all(expected), strict=True)
        for mine, theirs in pairs:
            assert torch.equal(mine, theirs)
            assert (mine.dtype, mine.requires_grad) == (theirs.dtype, theirs.requires_grad)


def _all(output):
    return output if isinstance(output, tuple) else (output,)


def test_the_device_is_that_of_the_call():
    entered = [n for n in capture(net(by_device), x()).graph.nodes if n.target in SWITCHES]
    assert isinstance(entered[0].args[0], fx.Node)
    context = torch.autocast(device_type="cpu", enabled=False)  # as before the capture
    assert "_npas_fx_device" not in vars(context)


def test_an_error_halfway_leaves_nothing_behind():
    def forward(self, value):
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            y = self.a(value)
            if value.shape[1] == 4 and value.dtype == torch.float32:
                y = y.view(-1, value.shape[0], y.shape[1])
            y = y + torch.ones(3, 1)
        return self.b(y)

    emitted = npas_fx.transform(net(forward), 1.0, example_inputs=x(), solver="greedy")
    for mode in (True, False):
        with torch.set_grad_enabled(mode), torch.autocast("cpu", torch.bfloat16):
            with pytest.raises((npas_fx.GuardError, RuntimeError)):
                emitted(x(5, 4))
            assert torch.is_grad_enabled() is mode
            assert torch.is_autocast_enabled("cpu")
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")


def test_a_module_that_fails_inside_is_called_inside(check):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, value):
            with torch.enable_grad():
                value = self.fc(value)
                is_positive = value.sum() > 0
            return value if is_positive else -value

    def forward(self, value):
        with torch.no_grad():
            value = self.branches(self.b(self.a(value)))
        return self.b(self.a(value))

    model = net(forward)
    model.branches = Branches()
    assert capture(model, x()).leaves.keys() == {"branches"}
    check(model, x())


def test_a_copy_that_is_run_halfway_leaves_nothing_behind():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, value):
            value = self.fc(value)
            return (value, value * 2) if value.sum() < 1e9 else (-value, value)

    def forward(self, value):
        with torch.autocast("cpu", enabled=False):
            one, _ = self.asks(self.b(self.a(value)))
        return self.b(self.a(one))

    model = net(forward)
    model.asks = Asks()
    assert capture(model, x()).leaves.keys() == {"asks"}
    assert not contexts._here.entered


@EACH
def test_torch_compile_needs_one_graph(forward):
    value = x()
    emitted = npas_fx.transform(net(forward), 0.9, example_inputs=value, solver="greedy")
    compiled = torch.compile(emitted, backend="aot_eager", fullgraph=True)
    for mine, theirs in zip(_all(compiled(value)), _all(emitted(value)), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.set_grad_enabled(False),
        lambda: torch.set_grad_enabled(True),  # the caller may have switched them off
        lambda: torch.inference_mode(),
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    ],
    ids=["off", "on", "inference_mode", "autocast"],
)
def test_other_contexts_make_a_call(make):
    def forward(self, value):
        with make():
            y = self.a(value)
        return self.b(y.clone())

    captured = capture(net(forward), x())
    assert "in a way that a graph does not record" in captured.leaves[""]


def asks_grad(self, value):
    y = self.b(self.a(value))
    return y * 2 if torch.is_grad_enabled() else y


def asks_autocast(self, value):
    y = self.b(self.a(value))
    return y * 2 if torch.is_autocast_enabled("cpu") else y


def asks_inference_mode(self, value):
    y = self.b(self.a(value))
    return y * 2 if torch.is_inference_mode_enabled() else y


@pytest.mark.parametrize("forward", [asks_grad, asks_autocast, asks_inference_mode])
def test_what_the_caller_has_switched_is_not_fixed(forward, falls_back):
    model = net(forward)
    emitted = falls_back(model, x(), match=r"asks torch\.is_")
    plain = npas_fx.materialize(emitted)
    for context in (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")):
        with context():
            assert torch.equal(emitted(x().fill_(0.5)), plain(x().fill_(0.5)))


def asks_its_own(self, value):
    with torch.no_grad():
        y = self.a(value) * (2 if torch.is_grad_enabled() else 3)
    with torch.autocast("cpu", enabled=False):
        return self.b(y) * (2 if torch.is_autocast_enabled("cpu") else 3)


def test_what_the_code_has_switched_itself_is_known(check):
    assert not capture(net(asks_its_own), x()).leaves.keys() & {""}
    check(net(asks_its_own), x())
