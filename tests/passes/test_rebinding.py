"""Buffers that a call binds to other tensors are bound as in the plain model, call after call."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import npas_fx
from comparison import emit
from npas_fx.passes.capture import capture
from npas_fx.passes.emitted import emission_of
from npas_fx.passes.rebinding import carry_buffers

WAYS = ({}, {"emit": "module"}, {"on_guard": "fallback"})


class Two(nn.Module):
    """Two layers, and a buffer."""

    def __init__(self, buffer: Tensor | None = None, persistent: bool = True) -> None:
        super().__init__()
        self.register_buffer("m", buffer, persistent=persistent)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)


class Mean(Two):
    """A running mean."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.training:
            self.m = 0.9 * self.m + 0.1 * h.detach().mean((0, 1))
        return self.b(h - self.m)


class Indices(Two):
    """A buffer that has the length of the input, as in ConViT."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(1, 3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        if self.m.shape[0] != n:
            self.m = torch.arange(n).float().view(-1, 1).expand(-1, 3)
        return self.b(self.a(x) + self.m.sum(-1)[:, None])


class Kept(Indices):
    """The same as a persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("m", self.m)


class Mask(Two):
    """A mask that is registered once it is needed."""

    def __init__(self) -> None:
        super().__init__(persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        if self.m is None or self.m.shape[0] < n:
            self.register_buffer("m", torch.ones(n, n).tril(), persistent=False)
        return self.b(self.m[:n, :n] @ self.a(x))


class Deleted(Two):
    """A buffer of the first call only."""

    def __init__(self) -> None:
        super().__init__(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if hasattr(self, "m"):
            h = h + self.m
            del self.m
        return self.b(h)


class Emptied(Two):
    """The same, but None is assigned."""

    def __init__(self) -> None:
        super().__init__(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.m is not None:
            h = h + self.m
            self.m = None
        return self.b(h)


class ByName(Two):
    """Goes round ``nn.Module.__setattr__``."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self._buffers["m"] = self.m + h.detach().mean((0, 1))
        return self.b(h - self.m)


class Around(nn.Module):
    """Calls another one, which may have to be a call, between weights of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.before, self.inner, self.after = nn.Linear(8, 8), inner, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.inner(self.before(x)))


class Asks(Around):
    """Asks for the shape of what the call gives, for which probes run it."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(self.before(x))
        return self.after(h if h.shape[2] == 8 else -h)


KINDS = (Mean, Indices, Mask, Deleted, Emptied, ByName)


def x(length: int = 5, rows: int = 2) -> Tensor:
    return torch.randn(rows, length, 8, generator=torch.Generator().manual_seed(length + rows))


def assert_goes_on_like(shared: nn.Module, plain: nn.Module, lengths=(5, 5, 4, 7)) -> None:
    """Train and evaluate in turns; outputs, gradients and buffers are the same after each call."""
    for length in lengths:
        for is_training in (True, False, True):
            results = []
            for module in (shared, plain):
                module.train(is_training).zero_grad()
                output = module(given := x(length, 3).requires_grad_())
                output.square().sum().backward()
                results.append((output, given.grad, buffers(module)))
            torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: b for name, b in module.named_buffers() if not name.startswith("npas_banks")}


def transformed(model: nn.Module, **how) -> nn.Module:
    return emit(model, 0.6, (x(),), verify=True, **how)


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_call_is_as_that_of_the_model(kind, how, around):
    torch.manual_seed(0)
    model = Around(kind()) if around else kind()
    shared = transformed(model, **how)
    plain = npas_fx.materialize(shared)
    assert buffers(plain).keys() == buffers(model).keys()
    assert_goes_on_like(shared, plain)
    later = npas_fx.materialize(shared)
    torch.testing.assert_close(buffers(later), buffers(plain))
    assert_goes_on_like(copy.deepcopy(shared), later)
    assert shared.state_dict().keys() >= plain.state_dict().keys() - {
        name for name, _ in plain.named_parameters()
    }


@pytest.mark.parametrize("kind", [Kept, Mask])
def test_what_a_probe_binds_is_not_there_in_the_other_mode(kind):
    model = Asks(kind())
    (mode,) = capture(model, x()).modes
    assert mode.leaves.keys() == {"inner"}
    shared = transformed(model)
    assert_goes_on_like(shared, npas_fx.materialize(shared))


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("kind", [Mean, Indices, Mask, ByName])
def test_buffers_of_other_shapes_are_saved_and_loaded(kind, how, tmp_path):
    shared = transformed(Around(kind()), **how)
    shared(x(7))
    npas_fx.save(shared, tmp_path)
    loaded = npas_fx.load(tmp_path, Around(kind()))
    torch.testing.assert_close(buffers(loaded), buffers(shared))
    assert_goes_on_like(loaded, npas_fx.materialize(shared))


def test_what_load_state_dict_refuses_load_refuses_too(tmp_path):
    model, shared = Kept(), transformed(Kept())
    for module in (model, shared):
        module(x())
    with pytest.raises(RuntimeError, match="size mismatch for m"):
        Kept().load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for m"):
        transformed(Kept()).load_state_dict(shared.state_dict())
    npas_fx.save(shared, tmp_path)
    with pytest.raises(npas_fx.NPASError, match=r"m has the shape \[5, 3\], not \[1, 3\]"):
        npas_fx.load(tmp_path, Kept())


class Undone(Two):
    """Binds a buffer before it takes another way for long inputs."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(8))
        self.c = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.m += 1
        self.m = self.m * 2 + self.a(x).detach().mean((0, 1))
        return self.b(x - self.m) if x.shape[1] < 6 else self.c(x + self.m)


@pytest.mark.parametrize("around", [False, True])
def test_a_fallback_undoes_what_was_bound(around):
    model = Undone()
    shared = transformed(Around(model) if around else model, on_guard="fallback")
    assert_goes_on_like(shared, npas_fx.materialize(shared))


class Later(Indices):
    """Needs no other buffer for the example; a longer input makes one."""

    def __init__(self, is_empty: bool = False) -> None:
        super().__init__()
        self.m = None if is_empty else torch.zeros(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 5:
            self.m = torch.ones(x.shape[1], 3)
        h = self.a(x)
        return self.b(h if self.m is None else h + self.m.sum() + self.m.shape[0])


@pytest.mark.parametrize("is_empty", [False, True])
def test_after_a_fallback_the_graph_does_not_rely_on_what_it_has_bound(is_empty):
    shared = transformed(Later(is_empty), on_guard="fallback")
    assert not emission_of(shared).capture.leaves
    plain = npas_fx.materialize(shared)
    assert_goes_on_like(shared, plain, (5, 7, 5))


class Swapped(Two):
    """Two buffers, of which one becomes the other, or a part of it."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(8))
        self.register_buffer("n", torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        self.n += 1
        self.m = self.n[:8]
        return self.b(self.a(x) + self.m)


@pytest.mark.parametrize("how", WAYS)
def test_one_buffer_may_be_part_of_another(how, tmp_path):
    shared = transformed(Around(Swapped()), **how)
    plain = npas_fx.materialize(shared)
    assert_goes_on_like(shared, plain)
    npas_fx.save(shared, tmp_path)
    torch.testing.assert_close(buffers(npas_fx.load(tmp_path, Around(Swapped()))), buffers(plain))


def test_carried_buffers_are_tied_as_they_are_now():
    class Tied(Two):
        def __init__(self) -> None:
            super().__init__(torch.zeros(8))
            self.register_buffer("n", self.m, persistent=False)

        def forward(self) -> None:
            self.m, self.n = self.m + 1, self.n

    model, other = Tied(), Tied()
    carry_buffers(model, other)
    assert other.m is other.n
    assert other.m is not model.m
    model()
    carry_buffers(model, other)
    assert torch.equal(other.m, torch.ones(8))
    assert torch.equal(other.n, torch.zeros(8))
    assert "n" not in other.state_dict()


class Counter(Two):
    """A counter without a batch in it, bound anew in both modes, twice a call."""

    def __init__(self) -> None:
        super().__init__(torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.m = self.m + 1
        h = self.a(x) * self.m
        self.m = self.m + 1
        return self.b(h / (1 + self.m))


class Differentiable(Two):
    """Keeps what backward needs: an in-place copy would break it."""

    def __init__(self) -> None:
        super().__init__(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * self.m
        if self.training:
            self.m = (0.5 * self.m + 0.5 * h.mean((0, 1))).detach()
        return self.b(h * self.m)


class Running(nn.Module):
    """Batch statistics by hand, with weights of its own, so that it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 1, 8))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean, var = x.mean((0, 1)), x.var((0, 1))
            with torch.no_grad():
                self.mean = torch.lerp(self.mean, mean, 0.1)
                self.var = torch.lerp(self.var, var, 0.1)
            self.steps = self.steps + 1
        else:
            mean, var = self.mean, self.var
        return (x - mean) * (var + 1e-5).rsqrt() * self.scale


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), Running(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.norm(self.first(x))))


class Quantize(nn.Module):
    """A codebook that follows moving averages of what is assigned to it, as in VQ-VAE."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("codes", torch.randn(6, 8))
        self.register_buffer("sizes", torch.ones(6))
        self.register_buffer("sums", self.codes.clone())
        self.into, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.into(x)
        flat = z.flatten(0, 1)
        nearest = torch.cdist(flat, self.codes).argmin(1)
        quantized = nn.functional.embedding(nearest, self.codes).view_as(z)
        if self.training:
            hot = nn.functional.one_hot(nearest, 6).to(flat.dtype)
            with torch.no_grad():
                self.sizes = 0.9 * self.sizes + 0.1 * hot.sum(0)
                self.sums = 0.9 * self.sums + 0.1 * hot.t() @ flat
                self.codes = self.sums / self.sizes.clamp(min=1e-3)[:, None]
        commitment = (z - quantized.detach()).square().mean()
        return self.out(z + (quantized - z).detach()), commitment


class Target(nn.Module):
    """A target that follows the online weights, which are generated, as in BYOL."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.predict = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("target", self.online.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.target = 0.9 * self.target + 0.1 * self.online.weight
        return self.predict(self.online(x)) - nn.functional.linear(x, self.target)


class OfChild(nn.Module):
    """Binds a buffer of a module below it, which reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.child, self.a = Mean(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.child.m = self.child.m + 1
        return self.child(self.a(x)) + self.child.m


TRACED = (Mean, Counter, Differentiable, Normed, Target, OfChild)


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("kind", TRACED)
def test_a_tensor_of_the_same_kind_is_traced(kind, how, around, tmp_path):
    torch.manual_seed(0)
    model = Around(kind()) if around else kind()
    shared = transformed(model, **how)
    assert not emission_of(shared).capture.leaves
    plain = npas_fx.materialize(shared)
    assert_goes_on_like(shared, plain)
    assert_goes_on_like(copy.deepcopy(shared), npas_fx.materialize(shared))
    npas_fx.save(shared, tmp_path)
    loaded = npas_fx.load(tmp_path, copy.deepcopy(model))
    torch.testing.assert_close(buffers(loaded), buffers(shared))
    assert_goes_on_like(loaded, npas_fx.materialize(loaded))
    assert_goes_on_like(shared.double().float(), npas_fx.materialize(shared))
    fresh = transformed(model, **how)
    fresh.load_state_dict(loaded.state_dict())
    assert_goes_on_like(fresh, npas_fx.materialize(loaded))


@pytest.mark.parametrize("how", WAYS)
def test_a_codebook_of_moving_averages(how):
    torch.manual_seed(0)
    shared = transformed(Quantize(), **how)
    assert not emission_of(shared).capture.leaves
    plain = npas_fx.materialize(shared)
    for module in (shared, plain):
        for step in range(4):
            output, loss = module.train()(x(5 + step))
            (output.square().mean() + loss).backward()
    torch.testing.assert_close(buffers(shared), buffers(plain))
    torch.testing.assert_close(shared.eval()(x()), plain.eval()(x()))


@pytest.mark.parametrize("kind", [*KINDS, *TRACED, Quantize])
def test_is_right_in_both_modes(kind, check):
    check(Wrapped(kind()), x(), others=((x(4),), (x(7, 3),)))


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.a = inner, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.a(x))
