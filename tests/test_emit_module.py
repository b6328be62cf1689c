"""``emit="module"``: the user's own class over the same banks as the graph, and equal to it."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

import npas_fx
from comparison import assert_same
from comparison import emit as emit_any
from models import MODELS, loss_of
from npas_fx.banks import Bank
from npas_fx.errors import GuardError, NPASError
from oracle import generated
from strategies import NetworkSpec, networks


def emit(model: nn.Module, *args: Any, budget: float = 0.5, **options: Any) -> Any:
    torch.manual_seed(0)
    return emit_any(model, budget, args, emit="module", **options)


def both(model: nn.Module, *args: Any, budget: float = 0.5) -> tuple[Any, Any]:
    """The graph and the user's class, with equal banks."""
    shared = emit_any(model, budget, args)
    own = npas_fx.apply(
        model, npas_fx.plan_of(shared), example_inputs=args, emit="module", verify=False
    )
    own.load_state_dict(shared.state_dict())
    return shared, own


class Net(nn.Module):
    """Blocks of equal layers, and methods besides ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(3)
        )
        self.head = nn.Linear(8, 4)
        self.calls = 0

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def fit(self, batches: list[Tensor], *, lr: float = 0.1, accumulate: int = 1) -> list[float]:
        """A loop of training inside of one method."""
        optimizer = torch.optim.SGD(self.parameters(), lr=lr)
        losses = []
        for k, batch in enumerate(batches, start=1):
            loss = self(batch).square().mean()
            loss.backward()
            losses.append(loss.item())
            if k % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
        return losses

    @property
    def width(self) -> int:
        return self.stem.weight.shape[0]


def x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (5, 6)), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def num_generated(monkeypatch):
    """How often banks have generated, as a list that grows."""
    seen = []
    run = Bank.forward
    monkeypatch.setattr(Bank, "forward", lambda self: (seen.append(self), run(self))[1])
    return seen


def banks_of(module: nn.Module) -> int:
    return sum(isinstance(part, Bank) for part in module.modules())


@given(networks(), st.sampled_from((0.3, 0.6, 1.0, 1.4)))
def test_it_is_equal_to_the_graph(spec: NetworkSpec, budget: float):
    model = spec.build()
    shared, own = both(model, *spec.draw(), budget=budget)
    assert isinstance(own, type(model))
    assert own.state_dict().keys() == shared.state_dict().keys()
    assert dict(own.named_parameters()).keys() == dict(shared.named_parameters()).keys()
    assert_same(own, model, spec.draw(3))
    assert_same(shared, model, spec.draw(3))


@pytest.mark.parametrize("name", MODELS)
def test_models_are_trained_alike(name):
    torch.manual_seed(0)
    model, draw = MODELS[name].make(), MODELS[name].draw
    inputs = draw(4)
    modules = both(model, *inputs)
    losses: list[list[float]] = [[], []]
    for module, seen in zip(modules, losses, strict=True):
        optimizer = torch.optim.AdamW(npas_fx.param_groups(module, 1e-2, 0.01))
        for step in range(3):
            torch.manual_seed(step)
            loss = loss_of(module(*inputs))
            seen.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    assert losses[0][0] != losses[0][2]


def test_classes_methods_and_attributes_are_the_users():
    model = Net()
    own = emit(model, x())
    assert isinstance(own, Net)
    assert isinstance(own.stem, nn.Linear)
    assert type(own.stem).__name__ == "Linear"
    assert (own.width, own.calls, own.stem.out_features) == (8, 0, 8)
    assert own.plan is npas_fx.plan_of(own)
    assert type(model.stem) is nn.Linear
    assert npas_fx.plan_of(torch.compile(own)) is own.plan


def test_methods_and_submodules_compute_and_train_as_plain_ones():
    own = emit(Net(), x())
    plain = npas_fx.materialize(own)
    assert type(plain) is Net
    weights = generated(own, own.plan)
    for run in (
        Net.features,
        lambda net, x: net.blocks[1](net.stem(x)),
        lambda net, _: net.blocks[0][0].weight,
    ):
        expected, got = run(plain, x()), run(own, x())
        assert torch.equal(got, expected)
        plain.zero_grad()
        own.zero_grad()
        expected.square().sum().backward()
        got.square().sum().backward()
        theirs = [
            (weights[n], p.grad)
            for n, p in plain.named_parameters()
            if n in weights and p.grad is not None
        ]
        assert theirs
        banks = [p for n, p in own.named_parameters() if n.startswith("npas_banks.")]
        wanted = torch.autograd.grad(
            [w for w, _ in theirs],
            banks,
            [g for _, g in theirs],
            allow_unused=True,
            retain_graph=True,
        )
        for bank, gradient in zip(banks, wanted, strict=True):
            assert (bank.grad is None) == (gradient is None)
            if gradient is not None:
                torch.testing.assert_close(bank.grad, gradient)


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference"])
def test_each_bank_generates_once_in_an_outermost_call(num_generated, mode):
    own = emit(Net(), x())
    number = banks_of(own)
    context = {
        "grad": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
    }
    with context[mode]():
        for run in (own, own.forward, own.features):
            num_generated.clear()
            run(x())
            assert len(num_generated) == number
        num_generated.clear()
        own.blocks[0](x(5, 8))
        assert 1 <= len(num_generated) <= number
        num_generated.clear()
        layer = own.blocks[0][0]
        assert torch.equal(layer.weight, layer.weight)
        assert len(num_generated) == 2


def test_gradients_are_not_lost_to_what_was_generated_without(num_generated):
    class Peek(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                scale = self.features(x).abs().max()
            return super().forward(x) / scale

        def frozen_first(self, x: Tensor) -> Tensor:
            self.features(x)
            with torch.enable_grad():
                return self.features(x)

    model = Peek()
    own = emit(model, x())
    assert_same(own, model, (x(),))
    num_generated.clear()
    own(x())
    assert len(num_generated) == banks_of(own)
    for parameter in own.head.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        features = own.frozen_first(x())
    features.sum().backward()
    banks = [p for n, p in own.named_parameters() if n.startswith("npas_banks.")]
    assert any(p.grad is not None and p.grad.any() for p in banks)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_method_that_trains_never_sees_stale_weights(accumulate):
    """Backward through spent weights, and steps, inside of one outermost call."""
    _, own = both(Net(), x())
    by_hand = copy.deepcopy(own)
    batches = [x() * k for k in range(1, 5)]
    losses = own.fit(batches, accumulate=accumulate)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for k, batch in enumerate(batches):
        loss = by_hand(batch).square().mean()
        assert loss.item() == losses[k]
        loss.backward()
        if (k + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    for name, tensor in own.state_dict().items():
        assert torch.equal(tensor, by_hand.state_dict()[name]), name


def test_banks_that_are_replaced_within_a_method_are_read_anew():
    class Swapping(Net):
        def change(self, how: str, x: Tensor) -> tuple[Tensor, Tensor]:
            before = self(x)
            with torch.no_grad():
                for name, parameter in self.named_parameters():
                    if not name.endswith("templates"):
                        continue
                    if how == "in place":
                        parameter.mul_(2)
                    elif how == "data":
                        parameter.data = parameter.data * 2
            if how == "load":
                state = {
                    n: t * 2 if n.endswith("templates") else t for n, t in self.state_dict().items()
                }
                self.load_state_dict(state)
            if how == "assign":
                state = {
                    n: t * 2 if n.endswith("templates") else t for n, t in self.state_dict().items()
                }
                self.load_state_dict(state, assign=True)
            return before, self(x)

    for how in ("in place", "data", "load", "assign"):
        for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            own = emit(Swapping(), x())
            twice = copy.deepcopy(own)
            with torch.no_grad():
                for name, parameter in twice.named_parameters():
                    if name.endswith("templates"):
                        parameter.mul_(2)
            with context():
                before, after = own.change(how, x())
                assert torch.equal(after, twice(x())), (how, context)
                assert not torch.equal(before, after)


@torch.inference_mode()
def test_banks_whose_changes_torch_does_not_count_are_read_anew():
    class Doubling(Net):
        def change(self, x: Tensor) -> tuple[Tensor, Tensor]:
            before = self.features(x)
            for name, parameter in self.named_parameters():
                if name.endswith("templates"):
                    parameter.mul_(2)
            return before, self.features(x)

    own = copy.deepcopy(emit(Doubling(), x()))
    assert all(parameter.is_inference() for parameter in own.parameters())
    before, after = own.change(x())
    assert not torch.equal(before, after)
    assert torch.equal(after, own.features(x()))


def test_a_weight_that_is_changed_in_place_is_refused():
    class Clamped(Net):
        def clamp(self) -> None:
            with torch.no_grad():
                self.blocks[0][0].weight.clamp_(-0.01, 0.01)

    own = emit(Clamped(), x())
    with pytest.raises(GuardError, match=r"blocks\.\d\.\d\.weight was changed in place.*exclude"):
        own.clamp()
    own = emit(Clamped(), x(), exclude="blocks.*")
    own.clamp()
    assert own.blocks[0][0].weight.abs().max() <= 0.01


def test_weights_that_forward_changes_or_reads_from_a_list_stay_plain():
    class Odd(Net):
        def __init__(self) -> None:
            super().__init__()
            self.listed = [self.blocks[0][0].weight]

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.blocks[1][0].weight.mul_(0.5)
            return super().forward(x) + self.listed[0].sum()

    model = Odd()
    own = emit(model, x())
    kept = npas_fx.plan_of(own).kept
    assert "behind torch's back" in kept["blocks.0.0.weight"]
    assert kept["blocks.1.0.weight"] == "changed in place"
    plain = npas_fx.materialize(own)
    for _ in range(2):
        torch.testing.assert_close(own(x()), plain(x()))


def test_what_forward_sees_of_the_module_is_what_the_plain_one_has():
    class Looking(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, list[str], list[str], list[str]]:
            penalty = sum(p.square().sum() for p in self.parameters())
            inner = next(self.blocks.parameters()).sum()
            return (
                super().forward(x) * penalty + inner,
                [name for name, _ in self.named_parameters()],
                [name for name, _ in self.named_children()],
                [name for name, _ in self.named_modules()],
            )

    model = Looking()
    own = emit(model, x())
    assert own(x())[1:] == model(x())[1:]
    plain = npas_fx.materialize(own)
    torch.testing.assert_close(own(x())[0], plain(x())[0])
    names = dict(own.named_parameters())
    assert any(name.startswith("npas_banks.") for name in names)
    assert not any(
        name in names for bank in own.plan.banks for name in bank.sites if not bank.is_dedicated
    )
    assert "npas_banks" in dict(own.named_children())


def test_a_sequential_is_still_a_sequence_of_its_layers():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 6))
    own = emit(model, x())
    assert len(own) == 4
    assert [type(layer).__name__ for layer in own] == ["Linear", "ReLU", "Linear", "Linear"]
    assert own[-1].weight.shape == (6, 6)
    assert torch.equal(own[:2](x()), own[1](own[0](x())))
    assert_same(own, model, (x(),))


def test_copies_are_apart_also_of_a_part_and_in_the_midst_of_a_call():
    class Copying(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, nn.Module]:
            features = self.features(x)
            return self.head(features), copy.deepcopy(self)

    own = emit(Copying(), x())
    output, copied = own(x())
    part = copy.deepcopy(own.blocks)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.add_(1)
    assert torch.equal(copied(x())[0], output)
    assert torch.equal(part[0](x(5, 8)), copied.blocks[0](x(5, 8)))
    assert not torch.equal(own(x())[0], output)


def test_the_user_may_put_a_weight_of_their_own_and_take_it_away():
    own = emit(Net(), x())
    name = next(name for bank in own.plan.banks if not bank.is_dedicated for name in bank.sites)
    path, _, attribute = name.rpartition(".")
    module = own.get_submodule(path)
    with pytest.raises(TypeError, match="cannot assign"):
        setattr(module, attribute, torch.zeros(1))
    mine = nn.Parameter(torch.zeros_like(module.weight))
    module.weight = mine
    assert module.weight is mine
    assert name in dict(own.named_parameters())
    own(x())
    del module.weight
    assert not hasattr(module, "weight")


def test_a_module_of_its_class_that_the_users_code_makes_is_plain():
    class Growing(Net):
        def another(self) -> nn.Module:
            return type(self)()

    made = emit(Growing(), x()).another()
    assert isinstance(made.stem.weight, nn.Parameter)
    assert made(x()).shape == (5, 4)


def test_classes_that_register_those_derived_from_them():
    class Strict(Net):
        def __init_subclass__(cls, **kwargs: Any) -> None:
            raise TypeError("only one such class")

    model = Strict()
    assert_same(emit(model, x()), model, (x(),))
    assert_same(emit_any(model, 0.5, (x(),), on_guard="fallback"), model, (x(),))


def test_what_takes_the_place_of_a_method_in_a_derived_class_stays():
    class Steps(Net):
        @property
        def features(self) -> Any:
            return super().features

        def fit(self, batches: list[Tensor]) -> Any:
            yield from (self(batch) for batch in batches)

        @staticmethod
        def scale(x: Tensor) -> Tensor:
            return 2 * x

    own = emit(Steps(), x())
    plain = npas_fx.materialize(own)
    assert torch.equal(own.features(own.scale(x())), plain.features(plain.scale(x())))
    assert torch.equal(next(own.fit([x()])), next(plain.fit([x()])))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_modules(kind):
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(6, 6, num_layers=2, bidirectional=True, batch_first=True)
            self.head = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0])

    model = Reader()
    own = emit(model, x(2, 4, 6))
    assert any(
        "rnn" in name for bank in own.plan.banks if not bank.is_dedicated for name in bank.sites
    )
    assert_same(own, model, (x(3, 5, 6),))
    copied = copy.deepcopy(own).double()
    assert copied(x(2, 4, 6).double()).dtype == torch.float64
    own.rnn.flatten_parameters()
    assert own.rnn(x(2, 4, 6))[0].grad_fn is not None


class Meeting(Net):
    """Waits in the midst of each call until another thread is there too."""

    meet = threading.Barrier(1)

    def features(self, x: Tensor) -> Tensor:
        self.meet.wait(timeout=60)
        found = super().features(x)
        self.meet.wait(timeout=60)
        return found


def test_threads_do_not_see_each_others_calls(num_generated):
    own = emit(Meeting(), x())
    Meeting.meet = threading.Barrier(2)

    def gradient(scale: float) -> list[Tensor]:
        loss = own(scale * x()).square().mean()
        return list(torch.autograd.grad(loss, list(own.parameters())))

    num_generated.clear()
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(gradient, (1.0, 2.0)))
    assert len(num_generated) == 2 * banks_of(own)
    Meeting.meet = threading.Barrier(1)
    for got, scale in zip(together, (1.0, 2.0), strict=True):
        torch.testing.assert_close(got, gradient(scale))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_inside(reentrant):
    class Saving(Net):
        def features(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = x + torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
            return x

    own, recomputed = emit(Saving(), x()), []
    own.blocks[0].register_forward_hook(lambda *_: recomputed.append(True))
    assert_same(own, Net(), (x(),))  # which keeps all for backward
    assert len(recomputed) == 2  # in each mode once


def test_function_transforms():
    own = emit(Net(), x())
    parameters = {name: p.detach() for name, p in own.named_parameters()}

    def loss(p: dict[str, Tensor]) -> Tensor:
        return functional_call(own, p, (x(),)).square().mean()

    gradients = torch.func.grad(loss)(parameters)
    own(x()).square().mean().backward()
    for name, parameter in own.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


def test_function_transforms_of_a_method_that_swaps_parameters():
    class Twice(Net):
        def twice(self, one: dict[str, Tensor], two: dict[str, Tensor], x: Tensor) -> Tensor:
            first, second = (functional_call(self, each, (x,)) for each in (one, two))
            return (first - second).square().mean()

    own = emit(Twice(), x())
    parameters = {name: p.detach() for name, p in own.named_parameters()}

    def loss(p: dict[str, Tensor]) -> Tensor:
        return own.twice(p, {name: 2 * value for name, value in p.items()}, x())

    def by_hand(p: dict[str, Tensor]) -> Tensor:
        doubled = {name: 2 * value for name, value in p.items()}
        first, second = (functional_call(own, each, (x(),)) for each in (p, doubled))
        return (first - second).square().mean()

    found, expected = torch.func.grad(loss)(parameters), torch.func.grad(by_hand)(parameters)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_generated_weights_are_freed_with_what_was_computed_of_them():
    own = emit(Net(), x())
    seen = []
    own.blocks[0][0].register_forward_hook(
        lambda module, *_: seen.append(weakref.ref(module.weight))
    )
    gc.disable()
    try:
        loss = own(x()).sum()
        loss.backward()
        del loss
        assert [ref() for ref in seen] == [None]
    finally:
        gc.enable()


def test_saved_and_loaded_it_is_of_the_users_class(tmp_path):
    own = emit(Net(), x())
    npas_fx.save(own, tmp_path)
    loaded = npas_fx.load(tmp_path, Net(), example_inputs=x())
    assert isinstance(loaded, Net)
    assert torch.equal(loaded.features(x()), own.features(x()))
    with pytest.raises(TypeError, match=r"npas_fx\.save"):
        torch.save(own, tmp_path / "whole.pt")


@pytest.mark.zoo
def test_a_compiled_one_computes_the_same_in_one_graph():
    torch.compiler.reset()
    own = emit(Net(), x())
    compiled = torch.compile(own, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x()), own(x()))
    features = torch.compile(own.features, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(features(x()), own.features(x()))
    torch.compiler.reset()


def test_options_that_are_not_known():
    with pytest.raises(NPASError, match="emit='modul' is not known; there are 'graph', 'module'"):
        npas_fx.transform(Net(), 0.5, emit="modul")
    with pytest.raises(NPASError, match="on_guard='warn' is not known"):
        npas_fx.plan(Net(), 0.5, on_guard="warn")


class Asks(Net):
    """Can be compiled, but not be traced without an example."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if x.shape[0] > 3 else 1)


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        (Net, "module"),
        (Asks, "graph"),
        pytest.param(Asks, "module", marks=pytest.mark.zoo),
    ],
)
def test_it_can_be_compiled_before_it_is_ever_called(kind, way):
    torch.compiler.reset()
    own = npas_fx.transform(kind(), 0.5, emit=way)
    compiled = torch.compile(copy.deepcopy(own), fullgraph=True, backend="aot_eager")
    for rows in (5, 5, 7):
        torch.testing.assert_close(compiled(x(rows, 6)), own(x(rows, 6)))
    torch.compiler.reset()
