"""``transform`` and what surrounds it, sentence by sentence as the documentation has it."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import socket

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

import npas_fx
from models import MLP, MODELS, loss_of
from npas_fx import Budget, BudgetError, InfeasibleBudgetError, NPASError, Plan, plan_of, transform
from npas_fx.passes.emitted import emission_of
from oracle import banks_of, count_trainable, generated, same_tensors, seeded
from strategies import BudgetSpec, NetworkSpec, PartSpec, budgets, networks


def make(seed: int = 0) -> nn.Module:
    return MODELS["mlp"].make(seed)


def inputs(batch_size: int = 4) -> tuple[Tensor, ...]:
    return MODELS["mlp"].inputs(batch_size)


SIZE = count_trainable(make())
BYTES = 4 * SIZE


class Mixed(nn.Module):
    """Weights of three dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.coarse = nn.ModuleList(nn.Linear(20, 20).bfloat16() for _ in range(2))
        self.plain = nn.ModuleList(nn.Linear(20, 20) for _ in range(2))
        self.fine = nn.ModuleList(nn.Linear(20, 20).double() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layers, dtype in (
            (self.coarse, torch.bfloat16),
            (self.plain, torch.float32),
            (self.fine, torch.float64),
        ):
            x = x.to(dtype)
            for layer in layers:
                x = torch.tanh(layer(x))
        return x


# What a budget means


@pytest.mark.parametrize(
    ("budget", "parameters"),
    [
        (0.25, SIZE // 4),
        (1.5, SIZE * 3 // 2),
        (1.0, SIZE),
        (0.333, math.floor(0.333 * SIZE)),
        ("25%", SIZE // 4),
        (" 150 % ", SIZE * 3 // 2),
        ("12.5%", SIZE // 8),
        (1000, 1000),
        ("1000", 1000),
        ("1_000", 1000),
        ("3.5k", 3500),
        ("0.0035M", 3500),
        ("0.000_003_5B", 3500),
        (Budget(parameters=777), 777),
    ],
)
def test_budgets_in_parameters(budget, parameters):
    shared = transform(make(), budget)
    assert count_trainable(shared) == plan_of(shared).parameters == parameters
    assert plan_of(shared).budget == Budget(parameters=parameters)


@pytest.mark.parametrize(
    ("budget", "amount"),
    [
        ("4KB", 4000),
        ("4KiB", 4096),
        ("0.005MB", 5000),
        ("0.004MiB", int(0.004 * 2**20)),
        ("0.000004GB", 4000),
        (Budget(bytes=4096), 4096),
    ],
)
def test_budgets_in_bytes(budget, amount):
    shared = transform(make(), budget)
    assert plan_of(shared).budget == Budget(bytes=amount)
    assert count_trainable(shared, in_bytes=True) == amount // 4 * 4


@pytest.mark.parametrize("share", [0.3, 0.61, 0.9, 1.4, 3.0])
def test_a_byte_budget_of_mixed_dtypes_is_kept_and_used(share):
    model = Mixed()
    amount = int(share * count_trainable(model, in_bytes=True))
    shared = transform(model, f"{amount / 1000}KB", example_inputs=torch.randn(3, 20))
    spent = count_trainable(shared, in_bytes=True)
    assert 0.999 * amount <= spent <= amount
    assert plan_of(shared).bytes == spent
    dtypes = {p.dtype for bank in banks_of(shared) for p in bank.parameters()}
    assert dtypes <= {torch.bfloat16, torch.float32, torch.float64}
    for bank in banks_of(shared):
        assert len({p.dtype for p in bank.parameters()}) == 1


@given(spec=networks(), budget=budgets())
def test_a_budget_means_the_same_in_every_form(spec, budget):
    model = spec.build()
    amount = budget.amount(model)
    wanted = Budget(bytes=amount) if budget.form == "bytes" else Budget(parameters=amount)
    assert npas_fx.plan(model, budget.of(model)) == npas_fx.plan(model, wanted)


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_a_small_int_is_a_number_of_parameters_and_asks_whether_a_share_was_meant(budget):
    with pytest.raises(InfeasibleBudgetError, match=re.escape(f"did you mean {budget}.0?")):
        transform(make(), budget)


def test_one_point_zero_is_no_one():
    assert count_trainable(transform(make(), 1.0)) == SIZE


@pytest.mark.parametrize(
    ("budget", "error", "why"),
    [
        (True, TypeError, "True is a bool"),
        (False, TypeError, "False is a bool"),
        (None, TypeError, "None is a NoneType"),
        ([0.5], TypeError, "is a list"),
        (1j, TypeError, "is a complex"),
        (torch.tensor([0.5]), TypeError, "is a Tensor"),
        (math.nan, BudgetError, "nan is not finite"),
        (math.inf, BudgetError, "inf is not finite"),
        (-math.inf, BudgetError, "-inf is not finite"),
        (-1, BudgetError, "-1 is not positive"),
        (-0.5, BudgetError, "-0.5 is not positive"),
        (0, BudgetError, "0 is not positive"),
        (0.0, BudgetError, "0.0 is not positive"),
        ("-25%", BudgetError, "'-25%' is not positive"),
        ("0", BudgetError, "'0' is not positive"),
        ("", BudgetError, "'' cannot be read"),
        ("lots", BudgetError, "'lots' cannot be read"),
        ("nan", BudgetError, "'nan' cannot be read"),
        ("1e6", BudgetError, "1e6"),
        ("3,5M", BudgetError, "'3,5M' cannot be read"),
        ("5 parrots", BudgetError, "unknown unit 'parrots'"),
        ("0.25", BudgetError, "not a whole number"),
        (1e-9, BudgetError, "less than one parameter"),
        ("0.0001k", BudgetError, "less than one"),
    ],
)
def test_a_budget_without_meaning_says_which_and_why(budget, error, why):
    with pytest.raises(error, match=re.escape(why)) as caught:
        transform(make(), budget)
    assert isinstance(caught.value, NPASError)
    if not isinstance(budget, Tensor):
        assert repr(budget) in str(caught.value)


def test_an_infeasible_budget_says_what_would_do():
    with pytest.raises(InfeasibleBudgetError, match="Use a budget of at least") as caught:
        transform(make(), 30)
    assert f"at least {caught.value.smallest} parameters" in str(caught.value)
    with pytest.raises(InfeasibleBudgetError, match="bytes") as caught:
        transform(make(), "0.1KB")
    assert f"at least {caught.value.smallest} bytes" in str(caught.value)
    transform(make(), Budget(bytes=caught.value.smallest))


def test_an_unknown_name_lists_those_that_there_are():
    for option in ("profile", "solver"):
        with pytest.raises(NPASError, match="'sorcery' is not known; there are"):
            transform(make(), 0.5, **{option: "sorcery"})
    with pytest.raises(NPASError, match="'sorcery' is not known; there are 'dedicated'"):
        transform(make(), 0.5, generators=["sorcery"])


# What comes out


def test_an_emitted_module_is_refused_with_a_message():
    shared = transform(make(), 0.5)
    for call in (
        lambda: transform(shared, 0.5),
        lambda: npas_fx.plan(shared, 0.5),
        lambda: npas_fx.apply(shared, plan_of(shared)),
    ):
        with pytest.raises(NPASError, match=r"already transformed.*materialize"):
            call()
    again = transform(npas_fx.materialize(shared), 0.5)
    assert count_trainable(again) == count_trainable(shared)


@given(spec=networks(), budget=budgets())
def test_dedicated_and_kept_parameters_carry_the_models_values(spec, budget):
    model = spec.build()
    shared = transform(model, budget.of(model), generators=["dedicated", "wavg"])
    plan = plan_of(shared)
    plain = [name for b in plan.banks if b.generator == "dedicated" for name in b.sites]
    for name in (*plain, *plan.kept):
        assert torch.equal(shared.get_parameter(name), model.get_parameter(name))
        assert shared.get_parameter(name) is not model.get_parameter(name)


def test_transform_is_apply_of_plan():
    model = make()
    whole = transform(model, 0.4, seed=3)
    halves = npas_fx.apply(model, npas_fx.plan(model, 0.4), seed=3)
    assert same_tensors(whole, halves)
    assert plan_of(whole) == plan_of(halves)


def test_a_plan_fits_another_model_of_the_architecture():
    plan = npas_fx.plan(make(), 0.4)
    shared = npas_fx.apply(make(seed=7), plan, example_inputs=inputs())
    assert torch.equal(shared.stem.bias, make(seed=7).stem.bias)
    with pytest.raises(npas_fx.PlanError):
        npas_fx.apply(MLP(width=20), plan)


def test_a_model_on_the_meta_device_can_be_planned_but_not_applied():
    with torch.device("meta"):
        model = MLP()
    plan = npas_fx.plan(model, 0.4)
    assert plan == npas_fx.plan(make(), 0.4)
    with pytest.raises(npas_fx.PlanError, match="meta"):
        npas_fx.apply(model, plan)
    assert count_trainable(npas_fx.apply(make(), plan)) == plan.parameters


def test_the_mode_of_the_model_is_kept():
    for mode in (True, False):
        shared = transform(make().train(mode), 0.5, example_inputs=inputs())
        assert {part.training for part in shared.modules()} == {mode}


def test_attribute_plan_is_the_plan_unless_the_model_has_one():
    assert transform(make(), 0.5).plan == plan_of(transform(make(), 0.5))
    spec = NetworkSpec(
        domain="vector", width=4, parts=(PartSpec("plain"),) * 2, names=("plan", "banks")
    )
    shared = transform(spec.build(), 0.7, example_inputs=spec.draw())
    assert isinstance(shared.plan, nn.Module)
    assert isinstance(plan_of(shared), Plan)


# The plan


def numbers(line: str) -> tuple[int, int]:
    cells = [cell.strip() for cell in line.split("│")[1:-1]]
    return int(cells[-2].replace(",", "")), int(cells[-1].replace(",", ""))


@given(spec=networks(), budget=budgets())
def test_a_plan_prints_as_a_table_that_adds_up(spec, budget):
    model = spec.build()
    plan = npas_fx.plan(model, budget.of(model))
    text = str(plan)
    rows = [line for line in text.splitlines() if re.search(r"│ +[\d,]+ │ +[\d,]+ │$", line)]
    parts = [numbers(line) for line in rows if "total" not in line]
    (total,) = [numbers(line) for line in rows if "total" in line]
    assert len(parts) == len(plan.banks) + 1
    assert total == (sum(p for p, _ in parts), sum(b for _, b in parts))
    assert total == (plan.parameters, plan.bytes)
    for name in (name for bank in plan.banks for name in bank.sites):
        assert name in text
    assert f"{plan.budget.amount:,} {plan.budget.resource}" in text
    assert plan.certificate.status in text
    fresh = [name for b in plan.banks if b.generator != "dedicated" for name in b.sites]
    assert plan.fresh_parameters == sum(model.get_parameter(name).numel() for name in fresh)
    sites = [name for b in plan.banks for name in b.sites]
    assert plan.site_parameters == sum(model.get_parameter(name).numel() for name in sites)
    assert f"{plan.fresh_parameters:,} of {plan.site_parameters:,} parameters start fresh" in text


@given(spec=networks(), budget=budgets())
def test_a_plan_goes_through_json_and_back(spec, budget):
    model = spec.build()
    plan = npas_fx.plan(model, budget.of(model))
    text = plan.to_json()
    back = Plan.from_json(text)
    assert back == plan
    assert back.to_json() == text
    assert json.loads(text)["certificate"].keys().isdisjoint({"seconds"})
    assert same_tensors(npas_fx.apply(model, back), npas_fx.apply(model, plan))


def test_certificate():
    certificate = npas_fx.plan(make(), 0.4).certificate
    assert 0 < certificate.bound <= certificate.objective
    assert certificate.gap == pytest.approx(
        (certificate.objective - certificate.bound) / certificate.objective
    )
    assert certificate.status == "optimal"
    assert certificate.seconds > 0
    assert certificate.candidates > 10
    assert "structure" in certificate.scope
    plan = npas_fx.plan(make(), 0.4)
    read = Plan.from_json(plan.to_json())
    assert read.certificate.seconds is None
    assert read.certificate == plan.certificate
    assert hash(read.certificate) == hash(plan.certificate)
    assert npas_fx.plan(make(), 1.0).certificate.objective == 0
    assert npas_fx.plan(make(), 2.0).certificate.objective <= 0


def test_certificate_of_the_greedy_solver_says_feasible_or_proves():
    best = npas_fx.plan(make(), 0.3).certificate
    greedy = npas_fx.plan(make(), 0.3, solver="greedy").certificate
    assert greedy.bound <= best.objective <= greedy.objective
    assert (greedy.status == "optimal") <= (greedy.gap <= 1e-6)


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (lambda d: d.update(parameters=d["parameters"] + 1), "add up to"),
        (lambda d: d.update(fresh_parameters=0), "fresh_parameters=0"),
        (lambda d: d["banks"][0].update(parameters=1), "add up to"),
        (lambda d: d.pop("budget"), "budget"),
        (lambda d: d.update(surprise=1), "surprise"),
        (lambda d: d.update(version=2), "version"),
        (lambda d: d["banks"][0]["sites"].append("hidden.0.bias"), "more than once"),
        (lambda d: d["kept"].pop("stem.bias"), "does not mention 'stem.bias'"),
        (lambda d: d["banks"][0]["sites"].append("no.weight"), "no weight 'no.weight'"),
        (lambda d: d["banks"][0].update(generator="sorcery"), "no generator 'sorcery'"),
        (lambda d: d["banks"][0]["size"].update(num_templates=0), "is no size|owns"),
        (lambda d: d["budget"].update(parameters=10), "more than its budget"),
        (lambda d: d["kept"].update({"no.bias": "why"}), "no parameter 'no.bias'"),
    ],
)
def test_an_edited_plan_that_does_not_hold_is_refused(edit, why):
    data = json.loads(npas_fx.plan(make(), 0.4).to_json())
    edit(data)
    with pytest.raises(npas_fx.PlanError, match=why):
        npas_fx.apply(make(), Plan.from_json(json.dumps(data)))


def test_a_plan_edited_by_hand_is_applied():
    data = json.loads(npas_fx.plan(make(), 1.0).to_json())
    banks = {bank["sites"][0]: bank for bank in data["banks"]}
    one, two = banks["hidden.0.weight"], banks["hidden.1.weight"]
    data["banks"].remove(two)
    one.update(sites=[*one["sites"], *two["sites"]], generator="tied")
    one.update(parameters=24 * 24 + 2, bytes=4 * (24 * 24 + 2))
    data["parameters"] -= 24 * 24 - 2
    data["bytes"] -= 4 * (24 * 24 - 2)
    data["fresh_parameters"] = 2 * 24 * 24
    data["certificate"] = None
    shared = npas_fx.apply(make(), Plan.from_json(json.dumps(data)), example_inputs=inputs())
    assert count_trainable(shared) == SIZE - 24 * 24 + 2
    weights = generated(shared, plan_of(shared))
    assert weights.keys() == {"hidden.0.weight", "hidden.1.weight"}
    one, two = ((w - w.mean()) / w.std() for w in weights.values())
    assert torch.allclose(one, two, atol=1e-5)  # the same but for scale and mean
    assert torch.equal(shared.stem.weight, make().stem.weight)


# plan_of, param_groups


class Wrapper(nn.Module):
    """What data-parallel wrappers look like."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Tensor) -> Tensor:
        return self.module(*args)


def test_plan_of_finds_the_plan(tmp_path):
    shared = transform(make(), 0.5, example_inputs=inputs())
    plan = shared.plan
    npas_fx.save(shared, tmp_path)
    compiled = torch.compile(shared, backend="eager")
    for found in (
        shared,
        copy.deepcopy(shared),
        compiled,
        Wrapper(shared),
        Wrapper(compiled),
        torch.compile(Wrapper(shared), backend="eager"),
        npas_fx.load(tmp_path, make(), example_inputs=inputs()),
    ):
        assert plan_of(found) == plan
    for stranger in (make(), Wrapper(make()), npas_fx.materialize(shared)):
        with pytest.raises(TypeError, match="was not made by npas_fx"):
            plan_of(stranger)


def test_a_wrapped_module_can_be_saved_and_materialized(tmp_path):
    shared = transform(make(), 0.5, example_inputs=inputs())
    wrapped = Wrapper(torch.compile(shared, backend="eager"))
    npas_fx.save(wrapped, tmp_path)
    assert same_tensors(npas_fx.load(tmp_path, make(), example_inputs=inputs()), shared)
    assert same_tensors(npas_fx.materialize(wrapped), npas_fx.materialize(shared))
    groups = npas_fx.param_groups(wrapped, 0.1, 0.2)
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in shared.parameters()}


def test_distributed_data_parallel():
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1
    )
    try:
        shared = transform(make(), 0.5, example_inputs=inputs())
        parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(shared))
        assert plan_of(parallel) == plan_of(shared)
        for module in (shared, parallel):
            loss = seeded(lambda module=module: loss_of(module(*inputs())))
            loss.backward()
        for ours, theirs in zip(shared.parameters(), parallel.parameters(), strict=True):
            assert torch.allclose(ours.grad, theirs.grad)
        with pytest.raises(NPASError, match="wrapped in DistributedDataParallel"):
            transform(nn.parallel.DistributedDataParallel(make()), 0.5)
    finally:
        torch.distributed.destroy_process_group()


def test_a_compiled_or_wrong_model_is_refused():
    with pytest.raises(NPASError, match="compiled"):
        transform(torch.compile(make(), backend="eager"), 0.5)
    with pytest.raises(TypeError, match=r"not a torch\.nn\.Module"):
        transform(lambda x: x, 0.5)


@given(spec=networks(), budget=budgets())
def test_param_groups_have_each_trainable_parameter_once(spec, budget):
    model = spec.build()
    shared = transform(model, budget.of(model))
    groups = npas_fx.param_groups(shared, lr=0.1, weight_decay=0.01)
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in shared.parameters() if p.requires_grad}
    named = {group["name"]: {id(p) for p in group["params"]} for group in groups}
    assert named.keys() <= {"banks", "coefficients", "rest"}
    assert all(group["params"] for group in groups)
    for bank in banks_of(shared):
        for name, parameter in bank.named_parameters():
            template = name in ("templates", "partial")
            assert id(parameter) in named["banks" if template else "coefficients"]
    decay = {group["name"]: group["weight_decay"] for group in groups}
    assert decay.get("coefficients", 0.0) == 0.0
    assert {decay[name] for name in decay if name != "coefficients"} <= {0.01}
    assert {group["lr"] for group in groups} <= {0.1}


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_param_groups_work_with_optimizers(optimizer):
    shared = transform(make(), 0.3)
    before = {name: p.detach().clone() for name, p in shared.named_parameters()}
    steps = optimizer(npas_fx.param_groups(shared, lr=0.01, weight_decay=0.01))
    loss_of(shared(*inputs())).backward()
    steps.step()
    assert all(not torch.equal(p, before[name]) for name, p in shared.named_parameters())


def test_templates_are_matrices():
    shared = transform(MODELS["wrn"].make(), 0.3)
    for bank in banks_of(shared):
        for name, parameter in bank.named_parameters():
            assert parameter.dim() == (1 if name == "gain" else 2)


def test_verify_runs_by_default_and_can_be_left_out(monkeypatch):
    calls = []
    monkeypatch.setattr("npas_fx.api.run_oracle", lambda *args, **kwargs: calls.append(args))
    transform(make(), 0.5, example_inputs=inputs())
    assert len(calls) == 1
    transform(make(), 0.5, example_inputs=inputs(), verify=False)
    transform(make(), 0.5)
    assert len(calls) == 1


def test_float_rounding_of_shares():
    """0.29 of 100 parameters are 29, though ``0.29 * 100`` is 28.999999999999996."""
    assert Budget.parse(0.29, model_parameters=100).parameters == 29
    assert Budget.parse("29%", model_parameters=100).parameters == 29
    assert BudgetSpec(0.5).of(make()) > 0


def test_a_model_whose_own_forward_depends_on_the_mode(tmp_path):
    class TwoWays(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            hidden = self.body(x).relu()
            return (self.head(hidden), hidden) if self.training else self.head(hidden)

    model, x = TwoWays(), torch.randn(3, 6)
    shared = npas_fx.transform(model, 1.0, example_inputs=x)
    assert [torch.equal(*pair) for pair in zip(shared(x), model(x), strict=True)] == [True, True]
    shared = npas_fx.transform(model, 0.8, example_inputs=x)
    assert count_trainable(shared) == int(0.8 * count_trainable(model))
    assert not hasattr(shared.head, "weight")
    npas_fx.save(shared, tmp_path)
    others = (copy.deepcopy(shared), npas_fx.materialize(shared), npas_fx.load(tmp_path, TwoWays()))
    for other in others:
        assert torch.equal(other.eval()(x), shared.eval()(x))
        assert len(other.train()(x)) == 2


class LooksAtItsType(nn.Module):
    """Asks with ``type(…) is``, which nothing that stands for a value can answer."""

    def __init__(self, factor=lambda: 1.0):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)
        self.factor = factor

    def forward(self, batch):
        y = self.b(self.a(batch["x"]).relu())
        return y * self.factor() * (2 if type(batch) is dict else 3)


@pytest.mark.parametrize("on_guard", ["error", "fallback"])
def test_where_a_graph_is_wrong_the_code_is_called(on_guard, tmp_path):
    model, batch = LooksAtItsType(), {"x": torch.randn(4, 6)}
    how = {"example_inputs": (batch,), "on_guard": on_guard}
    with pytest.warns(npas_fx.CaptureWarning, match="outputs in train mode"):
        shared = npas_fx.transform(model, 0.6, **how)
    other = {"x": torch.randn(7, 6)}
    plain = npas_fx.materialize(shared)
    torch.testing.assert_close(shared(other), plain(other), rtol=0, atol=0)
    shared(other).sum().backward()
    assert all(p.grad is not None for p in shared.parameters())
    assert sum(p.numel() for p in shared.parameters()) == npas_fx.plan_of(shared).parameters
    npas_fx.save(shared, tmp_path)
    loaded = npas_fx.load(tmp_path, LooksAtItsType())
    torch.testing.assert_close(loaded(other), shared(other), rtol=0, atol=0)


def test_rules_from_iterators_hold_when_the_model_is_captured_again():
    model, batch = LooksAtItsType(), {"x": torch.randn(4, 6)}
    with pytest.warns(npas_fx.CaptureWarning, match="outputs in train mode"):
        shared = npas_fx.transform(
            model,
            0.9,
            example_inputs=(batch,),
            exclude=(name for name in ["a.weight"]),
            generators=iter(["wavg"]),
        )
    plan = npas_fx.plan_of(shared)
    assert plan.kept["a.weight"] == "excluded"
    assert plan.banks[0].generator == "wavg"


class Blocks(nn.Module):
    """Hands its dict to blocks of the classes given, between two plain layers."""

    def __init__(self, *kinds):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(kind() for kind in kinds)

    def forward(self, batch):
        x = self.stem(batch["x"])
        for block in self.blocks:
            x = x.tanh() + block(batch)
        return self.head(x)


class LooksRight(LooksAtItsType):
    def forward(self, batch):
        return self.b(self.a(batch["x"]).relu())


class LooksElsewhere(LooksAtItsType):
    """Wrong in eval mode only."""

    def forward(self, batch):
        y = self.b(self.a(batch["x"]).relu())
        return y if self.training or type(batch) is dict else -y


class LooksOften(LooksAtItsType):
    def forward(self, batch):
        return [3 * super().forward(batch)][0]


def test_the_smallest_modules_that_are_wrong_are_called(tmp_path):
    model = Blocks(LooksRight, LooksAtItsType, LooksRight, LooksAtItsType)
    batch, other = {"x": torch.randn(4, 6)}, {"x": torch.randn(7, 6)}
    with pytest.warns(npas_fx.CaptureWarning, match=r"blocks\.1, blocks\.3 are called instead"):
        shared = npas_fx.transform(model, 0.6, example_inputs=(batch,))
    assert sorted(emission_of(shared).capture.leaves) == ["blocks.1", "blocks.3"]
    plain = npas_fx.materialize(shared)
    torch.testing.assert_close(shared(other), plain(other))
    npas_fx.save(shared, tmp_path)
    loaded = npas_fx.load(tmp_path, copy.deepcopy(model))
    torch.testing.assert_close(loaded(other), shared(other), rtol=0, atol=0)


def test_a_module_that_is_called_twice_is_compared_call_by_call():
    class Same(LooksAtItsType):
        def forward(self, batch, *others):
            return (batch, *others) if others else batch

    class Twice(Blocks):
        def forward(self, batch):
            same, right, wrong = self.blocks
            x = self.stem(same(batch)["x"]) + right(batch)
            x, y = same(x, right({"x": x.tanh()}))
            return self.head(x + y + wrong(batch))

    model, batch = Twice(Same, LooksRight, LooksAtItsType), {"x": torch.randn(4, 6)}
    with pytest.warns(npas_fx.CaptureWarning, match=r"\); blocks\.2 is called instead"):
        npas_fx.transform(model, 0.7, example_inputs=(batch,))


@pytest.mark.parametrize(
    ("kinds", "called"),
    [
        ((LooksElsewhere, LooksRight), r"blocks\.0 is called"),
        ((LooksAtItsType, LooksRight, LooksElsewhere), r"blocks\.0, blocks\.2 are called"),
        ((LooksAtItsType,) * 3, r"blocks\.0, blocks\.1, blocks\.2 are called"),
        ((LooksAtItsType, LooksElsewhere, LooksOften), "its own forward is called"),
    ],
)
def test_one_class_at_a_time_and_at_last_the_model_is_called(kinds, called):
    model, batch = Blocks(*kinds), {"x": torch.randn(4, 6)}
    with pytest.warns(npas_fx.CaptureWarning, match=called):
        shared = npas_fx.transform(model, 0.6, example_inputs=(batch,))
    plain = npas_fx.materialize(shared)
    for mode in (True, False):
        torch.testing.assert_close(shared.train(mode)(batch), plain.train(mode)(batch))


def test_what_is_no_fault_of_a_graph_is_an_error():
    """A model that gives something else each time is verified in no way."""
    numbers = itertools.count(1)
    model = LooksAtItsType(lambda: float(next(numbers)))
    with pytest.raises(npas_fx.VerificationError, match="outputs in train mode"):
        npas_fx.transform(model, 0.6, example_inputs=({"x": torch.randn(4, 6)},))
