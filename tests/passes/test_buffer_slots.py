"""Assignments to buffers are traced where a graph can say them; no other way goes by unseen."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

import npas_fx
from comparison import emit
from npas_fx.errors import GuardError
from npas_fx.passes.capture import capture
from npas_fx.passes.emitted import emission_of
from npas_fx.passes.probes import Probes
from npas_fx.passes.rebinding import rebind, rebound_by


class Two(nn.Module):
    """Two layers, a buffer that becomes another one, and a second buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("m", torch.zeros(8))
        self.register_buffer("n", torch.ones(8))
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)


def x(rows: int = 3, length: int = 5) -> Tensor:
    return torch.randn(rows, length, 8, generator=torch.Generator().manual_seed(rows + length))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    named = module.named_buffers(remove_duplicate=False)
    return {name: b.clone() for name, b in named if not name.startswith("npas_banks")}


def assert_goes_on_like(shared: nn.Module, plain: nn.Module) -> None:
    for rows in (3, 4):
        for mode in (True, False, True):
            results = []
            for module in (shared, plain):
                module.train(mode).zero_grad()
                output = module(given := x(rows).requires_grad_())
                output.sum().backward()
                results.append((output, given.grad, state_of(module)))
            torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def check_calls(model: nn.Module, **reasons: str) -> None:
    """Compare several calls, and see which modules are calls for which reasons."""
    shared = emit(model, 0.6, (x(),), verify=True)
    leaves = emission_of(shared).capture.leaves
    assert leaves.keys() == {path if path != "root" else "" for path in reasons}
    for path, reason in reasons.items():
        assert re.search(reason, leaves[path if path != "root" else ""]), leaves
    assert_goes_on_like(shared, npas_fx.materialize(shared))


class BoundTwice(Two):
    def forward(self, x: Tensor) -> Tensor:
        self.m = self.m + 1
        h = self.a(x) + self.m
        self.m += 1
        self.m = self.m + h.detach().mean((0, 1))
        return self.b(h) - self.m


class Exchanged(Two):
    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x) + self.m)
        self.m, self.n = self.n, self.m
        self.m += 1
        return h


class SetByName(Two):
    def forward(self, x: Tensor) -> Tensor:
        setattr(self, "m", self.m + 1)  # noqa: B010
        return self.b(self.a(x) + self.m)


def add_one(module: Two) -> None:
    module.m = module.m + 1


class SetByFunction(Two):
    def forward(self, x: Tensor) -> Tensor:
        add_one(self)
        return self.b(self.a(x) + self.m)


class OfTheInput(Two):
    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x) + self.m)
        self.m = x[0, 0].detach()
        return h


class OldAndNew(Two):
    def forward(self, x: Tensor) -> Tensor:
        old, h = self.m, self.a(x)
        self.m = self.m + 1
        return self.b(h + old) * self.m


class Below(nn.Module):
    """Binds and reads a buffer of a module that it calls twice, under two names."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.a = inner, nn.Linear(8, 8)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        self.first.m = self.first.m * 2
        return self.second(self.a(self.first(x))) + self.second.m


class PartlyFrozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Training(), Training()

    def train(self, mode: bool = True) -> PartlyFrozen:
        super().train(mode)
        self.one.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(x))


class Training(Two):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.m = self.m + 1
        return self.b(self.a(x) + self.m)


TRACED = (BoundTwice, Exchanged, SetByName, SetByFunction, OfTheInput, OldAndNew, PartlyFrozen)


@pytest.mark.parametrize("kind", [*TRACED, lambda: Below(OldAndNew()), lambda: Below(Training())])
def test_is_traced(kind):
    check_calls(kind())


class Called(Two):
    """Cannot be traced, and binds a buffer of a module."""

    def __init__(self, other: nn.Module | None = None) -> None:
        super().__init__()
        self.others = [] if other is None else [other]

    def forward(self, x: Tensor) -> Tensor:
        h, other = self.a(x), self.others[0] if self.others else self
        if h.sum() > -1e9:
            other.m = other.m + h.detach().mean((0, 1))
        return self.b(h)


class After(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.called, self.o = Called(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.called(x)) + self.called.m


class Before(After):
    def forward(self, x: Tensor) -> Tensor:
        return self.o(x) + self.called.m + self.called(x)


class Sets(After):
    def forward(self, x: Tensor) -> Tensor:
        self.called.m = self.called.m + 1
        return self.o(self.called(x))


class CalledFunction(Two):
    """Calls a function that binds the buffer."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if h.sum() > -1e9:
            add_one(self)
        return self.b(h)


class AroundFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.called, self.o = CalledFunction(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(x) + self.called.m + self.called(x) + self.called.m


class Beside(nn.Module):
    """Binds a buffer of a module that is not below it."""

    def __init__(self) -> None:
        super().__init__()
        self.reader = OldAndNew()
        self.writer = Called(self.reader)

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(self.writer(x))


class BesideUnread(Beside):
    def forward(self, x: Tensor) -> Tensor:
        return self.writer(self.reader.a(x))


class InAList(Two):
    def __init__(self) -> None:
        super().__init__()
        self.first = [self.m]

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) + self.first[0]
        if self.training:
            self.m = self.m + 1
        return self.b(h) + self.m


class TwoNames(Two):
    def __init__(self) -> None:
        super().__init__()
        self.n = self.m

    def forward(self, x: Tensor) -> Tensor:
        self.m = self.m + 1
        return self.b(self.a(x) + self.n) * self.m


class Cached(Two):
    def __init__(self) -> None:
        super().__init__()
        self.cache = None

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = self.m * 2 + 1
        h = self.b(self.a(x) * self.cache)
        self.m = self.m + 1
        return h


class Counted(Two):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = self.b(h) if self.m[0] < 2 else h
        self.m = self.m + 1
        return h


class Plain(Two):
    """Drops a tensor that is no buffer, for good."""

    def __init__(self) -> None:
        super().__init__()
        self.once = torch.ones(8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x))
        if self.once is not None:
            h, self.once = h + self.once, None
        return h


class FailsLater(Two):
    def __init__(self) -> None:
        super().__init__()
        self.inner = OldAndNew()

    def forward(self, x: Tensor) -> Tensor:
        self.m = self.m + 1
        h = self.inner(self.a(x)) + self.m
        return self.b(h) if h.sum() > -1e9 else h


class AroundFails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.fails = OldAndNew(), FailsLater()  # whose nodes are taken back

    def forward(self, x: Tensor) -> Tensor:
        h = self.fails(self.inner(x)) + self.inner.m
        return h if x.flatten(1).shape[1] == 40 else -h


CALLED = (
    (After, {"root": "'Called' object has no attribute 'm'"}),
    (Before, {"root": "'Called' object has no attribute 'm'"}),
    (Sets, {"root": "assigns the attribute 'm' of a module that is called"}),
    (AroundFunction, {"root": "reads the buffer 'called.m', which a call binds"}),
    (Beside, {"root": "may bind the buffer 'm' of a OldAndNew that is not below it"}),
    (BesideUnread, {"root": "may bind the buffer 'm' of a OldAndNew that is not below it"}),
    (InAList, {"root": "reads a buffer from a list"}),
    (TwoNames, {"root": "and it has further names"}),
    (Cached, {"root": "an earlier call left on the module"}),
    (Counted, {"root": "branches on a value"}),
    (Plain, {"root": "what an earlier call left on it"}),
    (FailsLater, {"root": "branches on a value"}),
    (AroundFails, {"fails": "branches on a value"}),
)


@pytest.mark.parametrize(("kind", "reasons"), CALLED)
def test_is_a_call(kind, reasons):
    check_calls(kind(), **reasons)


def test_without_an_example_it_is_a_call():
    leaves = capture(OldAndNew()).leaves
    assert "without an example" in leaves[""]


class LastRows(Two):
    """Keeps what has the shape of the example by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.m = torch.zeros(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x))
        self.m = h.detach().mean(0)
        return h * self.m.sum()


def test_another_shape_than_in_the_example_is_an_error_or_falls_back():
    shared = emit(LastRows(), 0.6, (x(),))
    assert not emission_of(shared).capture.leaves
    with pytest.raises(GuardError, match=r"'m' of shape \[5, 8\].*one of shape \[7, 8\]"):
        shared(x(3, 7))
    shared(x())
    falling = emit(LastRows(), 0.6, (x(),), on_guard="fallback")
    plain = npas_fx.materialize(falling)
    for length in (5, 7, 5, 5, 7):
        torch.testing.assert_close(falling(x(3, length)), plain(x(3, length)))
        torch.testing.assert_close(state_of(falling), state_of(plain))


def test_with_a_further_example_it_is_a_call():
    captured = capture(LastRows(), x(), more_examples=[x(3, 7)])
    assert "its shape or type does not stay" in captured.leaves[""]


def test_the_node_names_the_buffer():
    model = Below(OldAndNew())
    (mode,) = capture(model, x()).modes
    assert rebound_by(mode.graph) == {"first.m"}
    assert sum(node.target is rebind for node in mode.graph.nodes) == 3
    assert rebound_by(capture(OldAndNew(), x()).graph) == {"m"}


def test_flags_of_persistence_stay():
    class Gone(OldAndNew):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("m", self.m, persistent=False)

    shared = emit(Gone(), 0.6, (x(),))
    shared(x())
    assert "m" not in shared.state_dict()
    assert "n" in shared.state_dict()
    assert dict(shared.named_buffers())["m"].sum() == 8


class Kept(Two):
    """Keeps what is looked at later."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.a(x).softmax(-1)
        return self.b(self.last)


def test_what_a_call_keeps_in_an_attribute_is_read_in_it_but_not_set():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Kept()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.inner.last

    shared = emit(Reads(), 0.6, (x(),), verify=True)
    plain = npas_fx.materialize(shared)
    torch.testing.assert_close(shared(x(4)), plain(x(4)))
    assert not hasattr(shared.inner, "last")
    whole = emit(Reads(), 0.6, (x(),), **{"emit": "module"})
    whole(x(4))
    assert whole.inner.last.shape == (4, 5, 8)


class InOrder(Two):
    """Changes a shape in place, so that probes run all operations in order."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.m = self.m + 1
        h.transpose_(0, 1)
        return self.b(h) if h.shape[1] == x.shape[0] else h


def test_probes_bind_nothing(monkeypatch):
    found = []
    make_root = Probes.root

    def root(self: Probes) -> nn.Module:
        made = make_root(self)
        found.append((made, made.m))
        return made

    monkeypatch.setattr(Probes, "root", root)
    assert not capture(InOrder(), x()).leaves
    assert found
    assert all(made.m is m for made, m in found)
