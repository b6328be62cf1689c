"""``on_guard="fallback"``: where the graph refuses a call, the user's class runs it instead."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import npas_fx
from comparison import assert_same, emit
from npas_fx.errors import GuardError
from npas_fx.passes.capture import capture
from npas_fx.passes.fall_back import changed_before_guards


class Lengths(nn.Module):
    """Takes another way for long inputs, after it has changed buffers and drawn random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.few, self.many = nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("seen", torch.zeros(()))
        self.after = nn.BatchNorm1d(6)

    def forward(self, x: Tensor, scale: float | None = None, *, flip: bool = False) -> Tensor:
        self.seen += 1
        length = x.shape[1]
        x = self.drop(self.norm(x.flatten(0, 1)))
        x = self.after(self.many(x) if length > 3 else self.few(x))
        return (-x if flip else x) * (1.0 if scale is None else scale)


def x(rows: int = 4, length: int = 3) -> Tensor:
    return torch.randn(rows, length, 6, generator=torch.Generator().manual_seed(rows + length))


CALLS = (
    ((x(),), {}),
    ((x(5),), {}),
    ((x(4, 7),), {}),
    ((x(), 0.5), {}),
    ((x(4, 7),), {"flip": True}),
)


@pytest.mark.parametrize("call", range(len(CALLS)))
@pytest.mark.parametrize("budget", [0.6, 1.3])
def test_every_call_is_as_that_of_the_model(call, budget):
    torch.manual_seed(0)
    model = Lengths()
    shared = emit(model, budget, (x(),), on_guard="fallback")
    args, kwargs = CALLS[call]
    assert_same(shared, model, args, kwargs)
    assert_same(copy.deepcopy(shared), model, args, kwargs)


def test_without_it_the_line_is_named():
    shared = emit(Lengths(), 0.6, (x(),))
    with pytest.raises(GuardError, match=r"test_fall_back\.py:\d+"):
        shared(x(4, 7))
    with pytest.raises(GuardError, match="scale"):
        shared(x(), 0.5)


def test_the_graph_runs_where_it_can(monkeypatch):
    shared = emit(Lengths(), 0.6, (x(),), on_guard="fallback")
    assert isinstance(shared, Lengths)
    monkeypatch.setattr(Lengths, "forward", lambda *_, **__: pytest.fail("the class was run"))
    shared(x())
    with pytest.raises(pytest.fail.Exception, match="the class was run"):
        shared(x(4, 7))


def test_what_the_model_raises_is_raised_as_it_is():
    shared = emit(Lengths(), 0.6, (x(),), on_guard="fallback")
    with pytest.raises(RuntimeError) as info:
        shared(torch.randn(4, 7, 5))
    assert info.value.__context__ is None


def test_the_budget_and_the_names_are_those_without_it():
    model = Lengths()
    strict = emit(model, 0.6, (x(),))
    shared = emit(model, 0.6, (x(),), on_guard="fallback")
    assert shared.state_dict().keys() == strict.state_dict().keys()
    shared.load_state_dict(strict.state_dict())
    torch.manual_seed(0)
    expected = strict(x())
    torch.manual_seed(0)
    assert torch.equal(shared(x()), expected)


def test_saved_and_loaded_it_falls_back(tmp_path):
    shared = emit(Lengths(), 0.6, (x(),), on_guard="fallback").eval()
    npas_fx.save(shared, tmp_path)
    loaded = npas_fx.load(tmp_path, Lengths().eval(), example_inputs=x())
    assert torch.equal(loaded(x(4, 7)), shared(x(4, 7)))
    plain = npas_fx.materialize(loaded)
    torch.testing.assert_close(plain(x(4, 7)), shared(x(4, 7)))


@pytest.mark.zoo
def test_compiled_it_falls_back():
    torch.compiler.reset()
    shared = emit(Lengths(), 0.6, (x(),), on_guard="fallback").eval()
    compiled = torch.compile(shared, backend="aot_eager")
    for length in (3, 7):
        torch.testing.assert_close(compiled(x(4, length)), shared(x(4, length)))
    torch.compiler.reset()


def test_buffers_that_may_have_changed_before_a_guard():
    model = Lengths()
    found = changed_before_guards(capture(model, (x(),)).graph, model)
    norm = {f"norm.{name}" for name, _ in model.norm.named_buffers()}
    assert found == {"seen", *norm}
