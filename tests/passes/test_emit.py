"""The emitted module owns what is kept under its own names and the banks, and runs the graph."""

import copy
import pickle
import traceback

import pytest
import torch
from torch import nn

import npas_fx
from npas_fx.build import build_banks
from npas_fx.passes.capture import capture
from npas_fx.passes.emit import choose_bank_name, emit
from npas_fx.passes.emitted import emission_of
from npas_fx.planning import resolve_generators


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.BatchNorm1d(8)
        self.again = self.blocks[1]
        self.register_buffer("once", torch.ones(8), persistent=False)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x).relu()
        return self.norm(self.again(x)) + self.once


def transform(model, budget=0.5):
    return npas_fx.transform(
        model, budget, example_inputs=torch.randn(4, 8), solver="greedy", verify=False
    )


def test_names_of_what_is_kept_and_of_the_banks():
    torch.manual_seed(0)
    model = Model()
    emitted = transform(model)
    own = {name for name, _ in emitted.named_parameters() if not name.startswith("npas_banks.")}
    plain = {name for name, _ in model.named_parameters()}
    shared = {name for bank in emitted.plan.banks if not bank.is_dedicated for name in bank.sites}
    assert shared
    assert own == plain - shared
    assert all(
        name.split(".")[1].startswith("bank")
        for name, _ in emitted.named_parameters()
        if name not in own
    )
    assert "again.weight" not in dict(emitted.named_parameters(remove_duplicate=False))
    assert sum(p.numel() for p in emitted.parameters()) == emitted.plan.parameters
    assert not any(tensor.is_meta for tensor in (*emitted.parameters(), *emitted.buffers()))
    assert emitted.again is emitted.blocks.get_submodule("1")


def test_state_dicts_tell_the_versions_of_the_users_classes():
    class Head(nn.Module):
        _version = 3

        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, value):
            return self.fc(value)

        def _load_from_state_dict(self, state_dict, prefix, metadata, *others):
            assert metadata["version"] == self._version  # else it would convert them
            super()._load_from_state_dict(state_dict, prefix, metadata, *others)

    class Model(Head):
        _version = 2

        def __init__(self):
            super().__init__()
            self.head = Head()

        def forward(self, value):
            return self.head(self.fc(value))

    given = {"example_inputs": torch.zeros(2, 4), "solver": "greedy"}
    shared, own = (
        npas_fx.transform(Model(), 0.8, emit=way, **given) for way in ("graph", "module")
    )
    own.load_state_dict(shared.state_dict())
    shared.load_state_dict(copy.deepcopy(shared).state_dict())


def test_a_site_that_no_graph_reads_is_refused():
    model = Model()
    captured = capture(model, torch.randn(4, 8))
    plan = npas_fx.plan(model, 0.5, example_inputs=torch.randn(4, 8), solver="greedy")
    banks = build_banks(plan, captured.inventory, resolve_generators(None))
    name = next(bank.sites[0] for bank in plan.banks if not bank.is_dedicated)
    for node in [n for n in captured.graph.nodes if n.target == name]:
        node.target = "norm.weight"
    with pytest.raises(npas_fx.RewriteError, match=f"{name} of bank bank0 is not read"):
        emit(captured, plan, model, banks)


def test_copies_are_bit_equal_and_apart():
    emitted = transform(Model())
    copied = copy.deepcopy(emitted)
    x = torch.randn(4, 8)
    assert torch.equal(copied(x), emitted(x))
    assert npas_fx.plan_of(copied) is npas_fx.plan_of(emitted)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(1)
    assert not torch.equal(copied(x), emitted(x))
    copied.load_state_dict(emitted.state_dict())
    emitted.eval()
    copied.eval()
    assert torch.equal(copied(x), emitted(x))


def test_moves_to_another_dtype():
    emitted = transform(Model()).double()
    assert emitted(torch.randn(4, 8, dtype=torch.float64)).dtype == torch.float64


def test_runs_under_autocast():
    emitted = transform(Model())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = emitted.get_submodule(emission_of(emitted).banks)
        assert all(w.dtype == torch.float32 for bank in weights.children() for w in bank())
        assert emitted(torch.randn(4, 8)).isfinite().all()


@pytest.mark.parametrize("way", ["graph", "module"])
def test_backward_may_run_under_autocast_too(way):
    given = {"example_inputs": torch.randn(4, 8), "solver": "greedy", "emit": way}
    emitted = npas_fx.transform(Model(), 0.5, **given)
    templates = [p for name, p in emitted.named_parameters() if name.endswith("templates")]
    value, gradients = torch.randn(4, 8), []
    for inside in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = emitted(value).float().square().sum()
            if inside:
                gradients.append(torch.autograd.grad(loss, templates))
        if not inside:
            gradients.append(torch.autograd.grad(loss, templates))
    torch.testing.assert_close(*gradients, rtol=0.02, atol=0.02)


def test_pickle_is_refused_with_the_way_to_do_it():
    with pytest.raises(TypeError, match=r"npas_fx\.save"):
        pickle.dumps(transform(Model()))


def test_the_name_of_the_banks_is_free():
    model = Model()
    assert choose_bank_name(model) == "npas_banks"
    model.npas_banks = 1
    model.npas_banks_2 = 2
    assert choose_bank_name(model) == "npas_banks_3"


def test_tracebacks_show_the_generated_line():
    emitted = transform(Model())
    with pytest.raises(RuntimeError) as caught:
        emitted(torch.randn(4, 7))
    text = "".join(traceback.format_exception(caught.value))
    assert "linear(" in text
    assert "npas_fx graph" in text


def test_constants_of_the_graph_are_buffers_that_are_not_saved(check):
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.inner.mask = torch.ones(4)
            self.scales = [torch.full((4,), 2.0)]

        def forward(self, x):
            return self.inner(x) * self.inner.mask * self.scales[0]

    model = Constant()
    emitted = check(model, torch.randn(3, 4))
    assert emitted.state_dict().keys() == {
        name
        for name, _ in (*emitted.named_parameters(), *emitted.named_buffers())
        if "mask" not in name and "constant" not in name
    }
    model.inner.mask.zero_()
    assert emitted.inner.mask[0] == 1


def test_a_model_with_everything_kept_has_no_banks():
    emitted = npas_fx.transform(nn.Sequential(nn.LayerNorm(4)), 1.0, solver="greedy")
    assert not emission_of(emitted).bank_of
    assert torch.equal(emitted(torch.ones(2, 4)), torch.zeros(2, 4))


def test_materialize_gives_the_users_class_with_the_same_outputs():
    model = Model()
    emitted = transform(model).eval()
    plain = npas_fx.materialize(emitted)
    assert type(plain) is Model
    x = torch.randn(4, 8)
    assert torch.equal(plain(x), emitted(x))
    assert plain.again is plain.blocks[1]
