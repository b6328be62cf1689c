"""The invariants of the design, on random networks and budgets."""

from __future__ import annotations

import copy
import json
import math
import random
import tempfile
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor, nn

import npas_fx
from npas_fx import InfeasibleBudgetError, Plan, plan_of, transform
from npas_fx.passes.capture import capture
from npas_fx.propose import propose
from npas_fx.rules import apply_rules
from oracle import (
    assert_close,
    banks_of,
    by_formula,
    count_trainable,
    generated,
    gradients,
    largest,
    run_original,
    same_tensors,
    seeded,
    shared_sites,
    snapshot,
)
from pricers import pricer_of
from strategies import EVERYTHING, BudgetSpec, NetworkSpec, PartSpec, budgets, networks, smallest


def emit(spec: NetworkSpec, budget: BudgetSpec, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The original and the emitted module; without the library's own check of them."""
    model = spec.build()
    original = copy.deepcopy(model)
    options = {"example_inputs": spec.draw(), "verify": False, **options}
    return original, transform(model, budget.of(model), **options)


def coarsest(model: nn.Module) -> torch.dtype:
    return min((p.dtype for p in model.parameters()), key=lambda dtype: dtype.itemsize)


def loss_of(output: Tensor, seed: int = 0) -> Tensor:
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
    return (output - target.to(output.dtype)).square().mean()


def in_mode(module: nn.Module, mode: bool, x: tuple[Tensor, ...]) -> Tensor:
    """The output of a copy, with the same random numbers each time."""
    return seeded(lambda: copy.deepcopy(module).train(mode)(*x))


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


# 1. Rewrite oracle


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@example(spec=EVERYTHING[0], budget=BudgetSpec(0.1))
@example(spec=EVERYTHING[1], budget=BudgetSpec(0.4, "bytes"))
@example(spec=EVERYTHING[2], budget=BudgetSpec(0.3))
@given(spec=networks(), budget=budgets())
def test_emitted_module_is_the_original_with_generated_weights(spec, budget, mode):
    original, shared = emit(spec, budget)
    original.train(mode)
    shared.train(mode)
    x, dtype = spec.draw(batch_size=9, seed=5), coarsest(original)
    ours = dict(shared.named_buffers())
    buffers = {name: ours[name].clone() for name, _ in original.named_buffers()}
    parameters = trainable(shared)
    expected = seeded(
        lambda: run_original(original, generated(shared, plan_of(shared)), shared, x, buffers)
    )
    got = seeded(lambda: shared(*x))
    assert_close("output", got, expected, dtype)
    for name, buffer in buffers.items():
        assert_close(name, ours[name].double(), buffer.double(), dtype)
    if parameters:
        got_gradients = gradients(loss_of(got), parameters)
        expected_gradients = gradients(loss_of(expected), parameters)
        floor = 1e-3 * max(map(largest, expected_gradients.values()))
        for name, gradient in expected_gradients.items():
            assert_close(name, got_gradients[name], gradient, dtype, is_gradient=True, floor=floor)


@given(spec=networks(), budget=budgets(), seed=st.integers(0, 3))
def test_banks_generate_what_the_formula_says(spec, budget, seed):
    _, shared = emit(spec, budget)
    noise = torch.Generator().manual_seed(seed)
    for bank in banks_of(shared):
        with torch.no_grad():  # not as at birth, where much is zero or one
            for parameter in bank.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=noise)
        parameters = dict(bank.named_parameters())
        weights, expected = bank(), by_formula(bank)
        dtype = weights[0].dtype
        probes = [torch.randn(w.shape, generator=noise).double() for w in weights]
        for weight, other in zip(weights, expected, strict=True):
            assert_close("weight", weight.double(), other, dtype)
        total = sum((w.double() * p).sum() for w, p in zip(weights, probes, strict=True))
        wanted = sum((w * p).sum() for w, p in zip(expected, probes, strict=True))
        got, want = gradients(total, parameters), gradients(wanted, parameters)
        for name in parameters:
            assert_close(name, got[name], want[name], dtype, is_gradient=True)


# 2. Budget


@example(spec=EVERYTHING[0], budget=BudgetSpec(0.1))
@example(spec=EVERYTHING[1], budget=BudgetSpec(0.4, "bytes"))
@example(spec=EVERYTHING[2], budget=BudgetSpec(0.3))
@given(spec=networks(), budget=budgets())
def test_the_budget_is_kept_and_used(spec, budget):
    original, shared = emit(spec, budget)
    plan, in_bytes = plan_of(shared), budget.form == "bytes"
    amount = budget.amount(original)
    spent = count_trainable(shared, in_bytes=in_bytes)
    assert plan.budget.amount == amount
    assert spent <= amount
    assert plan.parameters == count_trainable(shared)
    assert plan.bytes == count_trainable(shared, in_bytes=True)
    assert plan.model_parameters == count_trainable(original)
    sites = [dict(original.named_parameters())[name] for b in plan.banks for name in b.sites]
    if not sites:
        assert spent == count_trainable(original, in_bytes=in_bytes)
    elif in_bytes:  # what is left is less than one number
        assert amount - spent < max(weight.element_size() for weight in sites)
        assert spent >= 0.999 * amount or amount < 8000
    else:
        assert spent == amount


@example(spec=EVERYTHING[0], budget=BudgetSpec(0.1))
@example(spec=EVERYTHING[1], budget=BudgetSpec(0.4, "bytes"))
@example(spec=EVERYTHING[2], budget=BudgetSpec(0.3))
@given(spec=networks(max_parts=3), budget=budgets())
def test_every_trainable_element_is_live(spec, budget):
    """What the plain network would move, the banks behind it move: all of their elements.

    A weight that is constant has zero coefficients at birth; these move in the first step, and what
    they multiply in the second. So an element must have had a gradient after two steps when any
    weight element that it takes part in has one in the plain network in both steps.
    """
    original, shared = emit(spec, budget)
    plan, parameters = plan_of(shared), trainable(shared)
    assume(parameters)
    shared.train()
    original.train()
    got = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in parameters.items()}
    plain: dict[str, Tensor] = {}
    for step in range(2):
        x = spec.draw(batch_size=16, seed=10 + step)
        for name, moved in moved_in_plain(original, shared, plan, x, step).items():
            plain[name] = plain.get(name, torch.tensor(True)) & moved
        found = gradients(loss_of(seeded(lambda x=x: shared(*x), step), step), parameters)
        with torch.no_grad():
            for name, parameter in parameters.items():
                got[name] |= found[name] != 0
                parameter -= 0.05 * found[name]
    for name, live in got.items():
        if name in plain:
            assert bool((live | ~plain[name]).all()), name
    names_of = {id(p): name for name, p in parameters.items()}
    for bank, sites in zip(banks_of(shared), shared_sites(plan), strict=True):
        moved = tiles_of(bank, [plain[site] for site in sites])
        reached = {
            "templates": moved.any(0).expand(bank.size.num_templates, -1),
            "coefficients": moved.any(1, keepdim=True).expand(-1, bank.size.num_templates),
            "gain": torch.stack([plain[site].any() for site in sites]),
            "partial": moved.any(0).repeat(bank.size.partial_rows)[None, : bank.size.num_partial],
        }
        for kind, parameter in bank.named_parameters():
            live = got[names_of[id(parameter)]]
            assert bool((live | ~reached[kind]).all()), (kind, sites)


def moved_in_plain(
    original: nn.Module, shared: nn.Module, plan: Plan, x: tuple[Tensor, ...], step: int
) -> dict[str, Tensor]:
    """Which elements of the original's weights have a gradient that is more than rounding."""
    weights = {
        name: weight.detach().requires_grad_() for name, weight in generated(shared, plan).items()
    }
    buffers = {name: b.clone() for name, b in shared.named_buffers() if "npas_banks" not in name}
    names = {name for name, _ in original.named_buffers()}
    buffers = {name: b for name, b in buffers.items() if name in names}
    output = seeded(lambda: run_original(original, weights, shared, x, buffers), step)
    kept = {
        name: parameter
        for name, parameter in trainable(shared).items()
        if name in dict(original.named_parameters())
    }
    found = gradients(loss_of(output, step), {**weights, **kept})
    scale = 1e-5 * max(map(largest, found.values()))
    return {name: gradient.abs() > scale for name, gradient in found.items()}


def tiles_of(bank: nn.Module, masks: list[Tensor]) -> Tensor:
    """``(R, P)``: the elements of all weights as the bank cuts them."""
    size, rows = bank.size.template_size, []
    for mask in masks:
        flat = mask.flatten()
        padded = torch.cat([flat, flat.new_zeros(-flat.numel() % size)])
        rows.append(padded.view(-1, size))
    return torch.cat(rows)


@given(spec=networks(max_parts=3), in_bytes=st.booleans())
def test_smallest_is_exactly_the_smallest(spec, in_bytes):
    model = spec.build()
    least = smallest(model, in_bytes=in_bytes)

    def write(amount: int) -> Any:
        return f"{amount / 1000:.3f}KB" if in_bytes else amount

    plan = npas_fx.plan(model, write(least))
    assert (plan.bytes if in_bytes else plan.parameters) == least
    if least > 1:
        with pytest.raises(InfeasibleBudgetError) as caught:
            npas_fx.plan(model, write(least - 1))
        assert caught.value.smallest == least
        assert str(least) in str(caught.value)


# 3. Round trip


@example(spec=EVERYTHING[0], budget=BudgetSpec(0.1))
@example(spec=EVERYTHING[1], budget=BudgetSpec(0.4, "bytes"))
@example(spec=EVERYTHING[2], budget=BudgetSpec(0.3))
@given(spec=networks(), budget=budgets())
def test_save_load_copy_and_materialize_are_bit_for_bit(spec, budget):
    original, shared = emit(spec, budget)
    x = spec.draw(batch_size=7, seed=3)
    loss = loss_of(seeded(lambda: shared(*x)))
    for parameter, gradient in zip(
        trainable(shared).values(), gradients(loss, trainable(shared)).values(), strict=True
    ):
        parameter.data -= 0.01 * gradient
    with tempfile.TemporaryDirectory() as folder:
        npas_fx.save(shared, folder)
        loaded = npas_fx.load(folder, spec.build(), example_inputs=x)
        weightless = npas_fx.load(folder, spec.build("meta"), example_inputs=x)
    plain = npas_fx.materialize(shared.eval())
    assert type(plain) is type(original)
    assert plain.state_dict().keys() == original.state_dict().keys()
    for name, weight in generated(shared, plan_of(shared)).items():
        assert torch.equal(plain.get_parameter(name), weight)
    others = {
        "deepcopy": copy.deepcopy(shared),
        "loaded": loaded,
        "loaded into a meta model": weightless,
    }
    for what, other in others.items():
        assert same_tensors(other, shared), what
        assert plan_of(other) == plan_of(shared), what
    for mode in (False, True):
        expected = in_mode(shared, mode, x)
        for what, other in {**others, "plain": plain}.items():
            assert torch.equal(in_mode(other, mode, x), expected), (what, mode)


# 4. Identity


@given(spec=networks(), more=st.integers(0, 3))
def test_with_everything_dedicated_it_is_the_model(spec, more):
    model, x = spec.build(), spec.draw()
    size = count_trainable(model)
    assume(size)
    options: dict[str, Any] = {"generators": ["dedicated"]} if more else {}
    shared = transform(model, size * (1 + more), example_inputs=x, **options)
    assert all(bank.generator == "dedicated" for bank in plan_of(shared).banks)
    assert not banks_of(shared)
    for mode in (True, False):
        assert torch.equal(in_mode(shared, mode, x), in_mode(model, mode, x))


# 5. Monotone


@given(spec=networks(), places=st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_more_budget_is_never_worse(spec, places):
    model = spec.build()
    amounts = sorted(BudgetSpec(place).amount(model) for place in places)
    plans = [npas_fx.plan(model, amount) for amount in amounts]
    for less, more in pairwise(plans):
        assert more.certificate.objective <= less.certificate.objective + slack(more, less)


@given(spec=networks(), budget=budgets(), generator=st.sampled_from(["wavg", "tied"]))
def test_more_candidates_are_never_worse(spec, budget, generator):
    model = spec.build()
    amount = budget.of(model)
    try:
        fewer = npas_fx.plan(model, amount, generators=[generator])
    except InfeasibleBudgetError:
        return
    more = npas_fx.plan(model, amount)
    assert more.certificate.objective <= fewer.certificate.objective + slack(more, fewer)


def slack(*plans: Plan) -> float:
    """What may be missing to the optimum where it was not proven."""
    certificates = [p.certificate for p in plans if p.certificate.status != "optimal"]
    return sum(certificate.gap * abs(certificate.objective) for certificate in certificates)


@given(spec=networks(), budget=budgets())
def test_renaming_changes_nothing_but_names(spec, budget):
    model, renamed = spec.build(), spec.renamed().build()
    here = npas_fx.plan(model, budget.of(model))
    there = npas_fx.plan(renamed, budget.of(model))
    names = zip(
        model.named_parameters(remove_duplicate=False),
        renamed.named_parameters(remove_duplicate=False),
        strict=True,
    )
    new_name = {old: new for (old, _), (new, _) in names}
    data = json.loads(here.to_json())
    data["kept"] = {new_name[name]: reason for name, reason in data["kept"].items()}
    for bank in data["banks"]:
        bank["sites"] = [new_name[name] for name in bank["sites"]]
    assert data == json.loads(there.to_json())


# 6. Certificate


@given(spec=networks(max_parts=2), budget=budgets(("int",)))
def test_no_cover_by_the_candidates_is_better_than_the_plan(spec, budget):
    model = spec.build()
    amount = budget.amount(model)
    inventory = capture(model).inventory
    assume(1 <= len(inventory.sites) <= 6)
    candidates = propose(pricer_of(apply_rules(inventory), above=amount > count_trainable(model)))
    certificate = npas_fx.plan(model, amount).certificate
    assert certificate.candidates >= len(candidates)
    kept = [p for p in inventory.kept if p.is_trainable]
    best = best_cover(
        [(c.sites, c.parameters, Fraction(c.price)) for c in candidates],
        len(inventory.sites),
        amount - sum(math.prod(p.shape) for p in kept),
    )
    assert certificate.bound <= certificate.objective
    if certificate.rounds == 0:
        assert certificate.bound <= best
    if certificate.status == "optimal":
        assert certificate.objective <= best + certificate.gap * abs(certificate.objective)


def best_cover(
    candidates: list[tuple[tuple[int, ...], int, Fraction]], num_sites: int, budget: int
) -> Fraction:
    """Least price of all exact covers within the budget: all of them, but for those beaten."""
    best: dict[frozenset[int], list[tuple[int, Fraction]]] = {frozenset(): [(0, Fraction(0))]}

    def covers(sites: frozenset[int]) -> list[tuple[int, Fraction]]:
        if sites not in best:
            first, found = min(sites), []
            for members, cost, price in candidates:
                if first in members and sites.issuperset(members):
                    rest = covers(sites.difference(members))
                    found += [(cost + c, price + p) for c, p in rest if cost + c <= budget]
            front: list[tuple[int, Fraction]] = []
            for cost, price in sorted(found):
                if not front or price < front[-1][1]:
                    front.append((cost, price))
            best[sites] = front
        return best[sites]

    return min(price for _, price in covers(frozenset(range(num_sites))))


# 7. Honest capture


@example(spec=EVERYTHING[0], budget=BudgetSpec(0.1))
@example(spec=EVERYTHING[1], budget=BudgetSpec(0.4, "bytes"))
@example(spec=EVERYTHING[2], budget=BudgetSpec(0.3))
@given(spec=networks(), budget=budgets())
def test_every_parameter_is_accounted_for_once(spec, budget):
    model = spec.build()
    plan = npas_fx.plan(model, budget.of(model))
    listed = [name for bank in plan.banks for name in bank.sites] + list(plan.kept)
    assert sorted(listed) == sorted(name for name, _ in model.named_parameters())
    assert all(plan.kept.values())
    for name, parameter in model.named_parameters():
        assert (plan.kept.get(name) == "frozen") == (not parameter.requires_grad)
        if parameter.requires_grad and parameter.dim() > 1 and parameter.numel() > 1:
            # These networks have nothing that could not be generated, but scales of shape (1, C).
            is_vector = parameter.numel() == max(parameter.shape)
            assert plan.kept.get(name) in ((None, "vector") if is_vector else (None,))
    inventory = capture(model).inventory
    everywhere = [name for item in inventory for name in (item.name, *item.aliases)]
    named = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert sorted(everywhere) == sorted(named)


# 8. Names


@example(spec=EVERYTHING[0], budget=BudgetSpec(0.1))
@example(spec=EVERYTHING[1], budget=BudgetSpec(0.4, "bytes"))
@example(spec=EVERYTHING[2], budget=BudgetSpec(0.3))
@given(spec=networks(), budget=budgets())
def test_what_is_not_shared_is_what_it_was_under_its_names(spec, budget):
    original, shared = emit(spec, budget)
    plan = plan_of(shared)
    gone = {name for sites in shared_sites(plan) for name in sites}
    before = dict(original.named_parameters(remove_duplicate=False))
    gone_tensors = {id(before[name]) for name in gone}
    after = dict(shared.named_parameters(remove_duplicate=False))
    stays = {name: p for name, p in before.items() if id(p) not in gone_tensors}
    for name, parameter in stays.items():
        assert type(after[name]) is nn.Parameter
        assert torch.equal(after[name], parameter)
        assert after[name].requires_grad == parameter.requires_grad
        assert after[name].data_ptr() != parameter.data_ptr()
    of_banks = {id(p) for bank in banks_of(shared) for p in bank.parameters()}
    others = {name: p for name, p in after.items() if name not in stays}
    assert {id(p) for p in others.values()} == of_banks
    assert len(others) == len(of_banks)  # each under one key
    state, own = shared.state_dict(), original.state_dict()
    tensors = [key for bank in banks_of(shared) for key in bank.tensors()]
    assert len(state) == len(tensors) + sum(name not in before or name in stays for name in own)
    for name, buffer in original.named_buffers():
        assert torch.equal(dict(shared.named_buffers())[name], buffer)
    copied = copy.deepcopy(shared)
    for parameter in copied.parameters():
        parameter.data.zero_()
    copied.load_state_dict(state)
    assert same_tensors(copied, shared)


# Birth


@example(spec=EVERYTHING[0], budget=BudgetSpec(0.1), seed=0)
@example(spec=EVERYTHING[1], budget=BudgetSpec(0.4, "bytes"), seed=0)
@example(spec=EVERYTHING[2], budget=BudgetSpec(0.3), seed=0)
@given(spec=networks(), budget=budgets(), seed=st.integers(0, 3))
def test_generated_weights_start_with_the_moments_of_the_given_ones(spec, budget, seed):
    original, shared = emit(spec, budget, seed=seed)
    for name, weight in generated(shared, plan_of(shared)).items():
        given_weight = original.get_parameter(name).detach().double()
        weight = weight.detach().double()
        if (given_weight == given_weight.flatten()[0]).all():
            assert torch.equal(weight, given_weight), name
            continue
        std = given_weight.std(correction=0)
        assert abs(weight.mean() - given_weight.mean()) <= 0.03 * std, name
        assert abs(weight.std(correction=0) / std - 1) <= 0.03, name


@pytest.mark.parametrize("kind", ["wavg", "tied"])
@pytest.mark.parametrize("value", [0.0, 0.3])
def test_constant_weights_are_reproduced_and_train(kind, value):
    spec = NetworkSpec(
        domain="vector", width=6, parts=(PartSpec("plain"),) * 3, names=("a", "b", "c")
    )
    model = spec.build()
    nn.init.constant_(model.c.layer0.weight, value)
    names = [f"{name}.layer0.weight" for name in "abc"]
    private = ["stem.weight", "head.weight"]
    least = smallest(model, same_bank=[names], keep_private=private, generators=[kind])
    shared = transform(model, least, same_bank=[names], keep_private=private, generators=[kind])
    weight = generated(shared, plan_of(shared))["c.layer0.weight"]
    assert torch.equal(weight, model.c.layer0.weight)
    optimizer = torch.optim.SGD(shared.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(shared(*spec.draw(seed=step))).backward()
        optimizer.step()
    after = generated(shared, plan_of(shared))["c.layer0.weight"]
    assert bool((after != weight).any())


# Determinism


@given(spec=networks(), budget=budgets(), seed=st.integers(0, 3))
def test_the_same_input_gives_the_same_plan_and_module(spec, budget, seed):
    _, one = emit(spec, budget, seed=seed)
    torch.manual_seed(99)  # what happened before does not matter
    _, two = emit(spec, budget, seed=seed)
    assert plan_of(one).to_json() == plan_of(two).to_json()
    assert same_tensors(one, two)


def test_another_seed_gives_other_banks():
    spec = NetworkSpec(domain="vector", width=6, parts=(PartSpec("plain"),), names=("a",))
    _, one = emit(spec, BudgetSpec(0.2), seed=0)
    _, two = emit(spec, BudgetSpec(0.2), seed=1)
    assert not torch.equal(banks_of(one)[0].templates, banks_of(two)[0].templates)


# Nothing that was given changes


def with_history(spec: NetworkSpec) -> nn.Module:
    """A model in the middle of its life: gradients, mixed modes, a hook."""
    model = spec.build()
    seeded(lambda: loss_of(model(*spec.draw()))).backward()
    model.eval()
    model.stem.train()
    model.head.register_forward_hook(lambda module, args, output: None)
    model.note = {"a": 1}
    return model


@given(spec=networks(), budget=budgets(), mode=st.booleans())
def test_transform_changes_nothing_that_it_was_given(spec, budget, mode):
    model, x = with_history(spec), spec.draw()
    model.train(mode)
    before, inputs_before = snapshot(model), [t.clone() for t in x]
    amount = budget.of(model)
    shared = transform(model, amount, example_inputs=x)
    plan = npas_fx.plan(model, amount)
    npas_fx.apply(model, plan)
    npas_fx.materialize(shared, model)
    with tempfile.TemporaryDirectory() as folder:
        npas_fx.save(shared, folder)
        npas_fx.load(folder, model, example_inputs=x)
    seeded(lambda: loss_of(shared.train()(*x))).backward()
    with torch.no_grad():
        for parameter in shared.parameters():
            parameter.fill_(1)
        for buffer in shared.buffers():
            buffer.fill_(0)
    assert snapshot(model) == before
    assert all(torch.equal(a, b) for a, b in zip(x, inputs_before, strict=True))


class Branching(nn.Module):
    """Cannot be traced, and only finds out after it has done a lot."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.first(x)
        self.count += 1
        random.random()
        np.random.rand()
        return x if self.last.sum() > 0 else self.last


def _broken_solver(problem: Any) -> Any:
    random.random(), np.random.rand(), torch.rand(1)
    raise ArithmeticError("broken")


SPEC = NetworkSpec(
    domain="vector",
    width=5,
    parts=(PartSpec("batch_norm"), PartSpec("functional_dropout"), PartSpec("plain")),
    names=("plan", "meta", "code"),
)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (with_history(SPEC), {"budget": 1}),
        (with_history(SPEC), {"budget": float("nan")}),
        (with_history(SPEC), {"budget": 0.5, "exclude": "nothing"}),
        (with_history(SPEC), {"budget": 0.5, "example_inputs": torch.zeros(2, 77)}),
        (Branching(), {"budget": 0.5}),
    ],
    ids=["infeasible", "budget", "rule", "example", "trace"],
)
def test_transform_changes_nothing_when_it_raises(model, options):
    before = snapshot(model)
    with pytest.raises(npas_fx.NPASError):
        transform(model, **options)
    assert snapshot(model) == before


def test_transform_changes_no_model_when_a_solver_raises():
    model = with_history(SPEC)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    before = snapshot(model)
    with pytest.raises(ArithmeticError):
        transform(model, 0.5, solver=_broken_solver)
    random.setstate(states[0])  # the solver is not ours, nor is what it draws
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    assert snapshot(model) == before
