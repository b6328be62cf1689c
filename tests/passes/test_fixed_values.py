"""What is made of sizes, constants and buffers that no call updates answers by its data."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import npas_fx
from npas_fx.passes.capture import capture
from two_layers import net, x


def shifts(self, value):
    """Asks a buffer in each way in which code may."""
    if self.shift > 1:
        value = value + max(self.shift, self.shift // 2)
    value = functional.pad(value, (self.shift, int(self.shift)))
    value = value[:, self.shift : value.shape[1] - self.shift]
    return self.run(value) * float(self.shift)


def with_shift(forward=shifts, shift=2):
    model = net(forward)
    model.register_buffer("shift", torch.tensor(shift))
    return model


def shared(model, *inputs, **how):
    return npas_fx.transform(
        model, 1.0, example_inputs=inputs, solver="greedy", verify=False, **how
    )


def test_a_buffer_that_no_call_updates_is_asked_for_its_value(check):
    model = with_shift()
    assert not capture(model, x()).leaves
    check(model, x(), others=[(x(5, 4),)])


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_another_value_is_refused(shift):
    """Wherever it comes from: a file, or code that sets it."""
    emitted = shared(with_shift(), x())
    emitted.load_state_dict({**emitted.state_dict(), "shift": torch.tensor(shift)})
    with pytest.raises(npas_fx.GuardError, match=r"captured for shift .*test_fixed_values"):
        emitted(x())


def test_another_value_goes_the_model_s_own_way():
    emitted, value = shared(with_shift(), x(), on_guard="fallback"), x()
    emitted.shift.fill_(1)
    torch.testing.assert_close(emitted(value), npas_fx.materialize(emitted)(value))


def test_a_shape_that_follows_a_buffer_is_guarded():
    """Also where no input is in it."""

    def forward(self, value):
        return self.run(value) if torch.zeros(self.shift).shape[0] == 2 else value

    emitted = shared(with_shift(forward), x())
    emitted.shift.fill_(3)
    with pytest.raises(npas_fx.GuardError):
        emitted(x())


def test_what_is_made_of_sizes_alone_is_asked_for_its_value(check):
    def forward(self, value):
        mask = torch.ones(value.shape[0], value.shape[1])
        return self.run(value) if torch.all(mask == 1) else value

    assert not capture(net(forward), x()).leaves
    check(net(forward), x(), others=[(x(5, 4),)])


@pytest.mark.parametrize("is_fixed", [True, False], ids=["mask of ones", "mask from the input"])
def test_only_what_can_be_asked_for_its_data_is_not_seen_to_be_traced(is_fixed, check):
    """Code that asks, as that of transformers does, goes the way that it goes without a trace."""

    def forward(self, value):
        mask = torch.ones(value.shape) if is_fixed else value.abs()
        if not isinstance(mask, torch.fx.Proxy) and torch.all(mask >= 0):
            return self.run(value)
        return self.run(value * torch.where(mask >= 0, 1, mask))

    graph = capture(net(forward), x()).graph
    assert not capture(net(forward), x()).leaves
    assert any(node.target is torch.where for node in graph.nodes) is not is_fixed
    check(net(forward), x(), others=[(x(5, 4),)])


@pytest.mark.parametrize(
    "update",
    [
        lambda self: self.shift.add_(1),
        lambda self: self.shift.add_(1) if self.training else None,
        lambda self: setattr(self, "shift", self.shift + 1),
    ],
    ids=["in place", "in train mode only", "by another"],
)
def test_a_buffer_that_calls_update_is_not_asked(update, falls_back):
    """Not even where the update comes later, or in the other mode."""

    def forward(self, value):
        value = self.run(value) if self.shift > 2 else self.run(-value)
        update(self)
        return value

    falls_back(with_shift(forward), x(), match="branches on a value")


def test_a_buffer_that_a_called_module_updates_is_not_asked(falls_back):
    class Counts(nn.Module):
        def forward(self, value):
            self.shift.add_(1)
            return value

    def forward(self, value):
        return self.counts(self.run(value) if self.shift > 2 else self.run(-value))

    model = with_shift(forward)
    model.counts = Counts()
    model.counts.register_buffer("shift", model.shift)
    falls_back(model, x(), match="branches on a value")


@pytest.mark.parametrize(
    "asked",
    [
        lambda self, value: (value * self.shift).sum() > 0,
        lambda self, value: (self.a.weight * self.shift).sum() > 0,
        lambda self, value: (torch.rand(()) * self.shift) > 0.5,
    ],
    ids=["input", "weight", "random number"],
)
def test_what_else_is_in_it_is_not_asked(asked, falls_back):
    def forward(self, value):
        return self.run(value) if asked(self, value) else self.run(-value)

    falls_back(with_shift(forward), x(), match="branches on a value")


def test_without_values_nothing_is_known():
    assert "" in capture(with_shift().to("meta"), x()).leaves


def test_a_compiled_guard_breaks_no_graph():
    emitted = shared(
        with_shift(lambda self, value: self.run(value) if self.shift > 1 else value), x()
    )
    compiled = torch.compile(emitted, fullgraph=True, backend="eager")
    value = x()
    torch.testing.assert_close(compiled(value), emitted(value))
    emitted.shift.fill_(1)
    with pytest.raises(RuntimeError, match="shift > 1 = True"):
        compiled(value)


def test_loading_needs_the_buffers_that_are_asked(tmp_path):
    emitted, value = shared(with_shift(), x()), x()
    npas_fx.save(emitted, tmp_path)
    assert torch.equal(npas_fx.load(tmp_path, with_shift())(value), emitted(value))
    with pytest.raises(npas_fx.StorageError, match="asks buffers for their values"):
        npas_fx.load(tmp_path, with_shift().to("meta"))
