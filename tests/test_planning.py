"""Plans: rules hold, the frontier is monotone, and what cannot be met is said exactly."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import combinations, pairwise
from statistics import median

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import npas_fx
from models import MODELS
from npas_fx import InfeasibleBudgetError, Plan, RuleError
from npas_fx.passes.capture import capture
from npas_fx.planning import make_plan
from npas_fx.rules import apply_rules
from npas_fx.solvers import SOLVERS, PlanningProblem
from npas_fx.solvers.floor import cheapest_plan
from npas_fx.solvers.reduce import reduce
from oracle import count_trainable
from pricers import pricer_of
from strategies import networks

SHARES = (0.05, 0.1, 0.25, 0.5, 0.9, 1.0, 1.5)


def bank_of(plan: Plan, name: str) -> tuple[str, ...]:
    return next(bank.sites for bank in plan.banks if name in bank.sites)


@st.composite
def rules(draw: st.DrawFn, names: list[str]) -> dict[str, object]:
    """Rules that may well contradict each other."""
    groups = st.lists(st.sampled_from(names), min_size=2, max_size=3, unique=True)
    drawn = {
        "keep_private": draw(st.lists(st.sampled_from(names), max_size=1)),
        "same_bank": draw(st.lists(groups, max_size=1)),
        "different_bank": draw(st.lists(groups, max_size=2)),
        "max_banks": draw(st.none() | st.integers(0, 2)),
    }
    return {rule: given_ for rule, given_ in drawn.items() if given_ or given_ == 0}


@given(spec=networks(), data=st.data(), share=st.sampled_from(SHARES))
def test_rules_hold_and_the_smallest_budget_is_exact(spec, data, share):
    model = spec.build()
    names = [site.name for site in npas_fx.inspect(model).sites]
    assume(len(names) > 1)
    given_ = data.draw(rules(names))
    amount, smallest = max(1, int(share * count_trainable(model))), None
    try:
        plan = npas_fx.plan(model, amount, **given_)
    except RuleError:
        return
    except InfeasibleBudgetError as err:
        smallest = err.smallest
    if smallest is not None:
        plan = npas_fx.plan(model, smallest, **given_)
        assert plan.parameters == smallest
        with pytest.raises(InfeasibleBudgetError) as caught:
            npas_fx.plan(model, smallest - 1, **given_)
        assert caught.value.smallest == smallest
    for name in given_.get("keep_private", []):
        assert bank_of(plan, name) == (name,)
    for group in given_.get("same_bank", []):
        assert len({bank_of(plan, name) for name in group}) == 1
    for group in given_.get("different_bank", []):
        assert len({bank_of(plan, name) for name in group}) == len(group)
    most = given_.get("max_banks")
    assert most is None or sum(len(bank.sites) > 1 for bank in plan.banks) <= most
    assert plan.certificate.bound <= plan.certificate.objective


@given(spec=networks(), shares=st.lists(st.sampled_from(SHARES), min_size=2, max_size=4))
def test_more_budget_is_never_worse_in_one_frontier(spec, shares):
    model = spec.build()
    assume(npas_fx.inspect(model).sites)
    amounts = [max(1, int(share * count_trainable(model))) for share in shares]
    try:
        plans = npas_fx.plan_frontier(model, amounts)
    except InfeasibleBudgetError:
        return
    assert [plan.budget.amount for plan in plans] == amounts
    plans.sort(key=lambda plan: plan.budget.amount)
    objectives = [plan.certificate.objective for plan in plans]
    assert objectives == sorted(objectives, reverse=True)
    for plan in plans:
        alone = npas_fx.plan(model, plan.budget).certificate
        assert plan.certificate.bound <= plan.certificate.objective
        # The frontier's candidates are those of all its budgets.
        slack = 1e-3 * abs(alone.objective) + 1e-9
        assert plan.certificate.objective <= alone.objective + slack


def test_a_frontier_takes_budgets_of_any_form_and_its_plans_apply():
    model = MODELS["mlp"].make()
    plans = npas_fx.plan_frontier(model, ["50%", 0.25, "4KB", 1.5], max_banks=2)
    assert [plan.budget.bytes for plan in plans] == [None, None, 4000, None]
    for plan in plans:
        shared = npas_fx.apply(model, plan)
        owned = count_trainable(shared) * (4 if plan.budget.bytes else 1)
        assert owned == getattr(plan, plan.budget.resource)
        assert owned >= 0.999 * plan.budget.amount
        assert owned <= plan.budget.amount
    assert plans[0].certificate.objective < plans[1].certificate.objective


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_plans_a_frontier(solver):
    model = MODELS["mlp"].make()
    plans = npas_fx.plan_frontier(model, [0.9, 0.3, 0.5], solver=solver)
    best = npas_fx.plan_frontier(model, [0.9, 0.3, 0.5])
    for plan, other in zip(plans, best, strict=True):
        assert plan.certificate.bound <= plan.certificate.objective
        assert other.certificate.objective <= plan.certificate.objective + 1e-9
    assert plans[0].certificate.objective <= plans[2].certificate.objective


def test_a_pinned_bank_stays_as_it_is_and_the_rest_fills_the_budget():
    model = MODELS["mlp"].make()
    first = npas_fx.plan(model, 0.4)
    pinned = next(bank for bank in first.banks if not bank.is_dedicated)
    for share in (0.6, 0.9, 1.0, 1.5):
        plan = npas_fx.plan(model, share, pin=[pinned])
        assert pinned in plan.banks
        assert plan.parameters >= 0.999 * plan.budget.amount
        assert count_trainable(npas_fx.apply(model, plan)) == plan.parameters


def test_one_percent_more_is_worth_about_what_the_plan_says():
    model = nn.Sequential(*[nn.Linear(32, 32, bias=False) for _ in range(12)])
    size = count_trainable(model)
    plan, more = npas_fx.plan_frontier(model, [int(0.3 * size), int(0.36 * size)])
    gained = plan.certificate.objective - more.certificate.objective
    assert plan.gain_of_one_percent is not None
    assert gained == pytest.approx(20 * plan.gain_of_one_percent, rel=0.3)
    assert npas_fx.plan(model, 1.0).gain_of_one_percent is not None
    assert npas_fx.plan(model, 0.3, solver="greedy").gain_of_one_percent is None


def chain(seed: int) -> nn.Module:
    """Up to 9 linear layers of few widths, in a chain."""
    random = torch.Generator().manual_seed(seed)
    widths = torch.randint(2, 9, (3,), generator=random) * 4
    number = int(torch.randint(5, 10, (1,), generator=random))
    chosen = widths[torch.randint(0, 3, (number + 1,), generator=random)].tolist()
    return nn.Sequential(*[nn.Linear(a, b, bias=False) for a, b in pairwise(chosen)])


def test_candidates_lose_little_against_all_partitions_and_sizes():
    losses = []
    for seed in range(8):
        inventory = capture(chain(seed)).inventory
        rules = apply_rules(inventory)
        pricer, number = pricer_of(rules), len(inventory.sites)
        everything = [
            candidate
            for length in range(1, number + 1)
            for members in combinations(range(number), length)
            for candidate in pricer.candidates(members, spacing=1.0)
        ]
        for share in (0.1, 0.25, 0.5):
            budget = int(share * inventory.num_parameters)
            best = SOLVERS["cp_sat"](
                PlanningProblem(
                    num_sites=number,
                    members=tuple(c.sites for c in everything),
                    price=tuple(c.price for c in everything),
                    cost={"parameters": tuple(c.parameters for c in everything)},
                    budget={"parameters": budget},
                )
            )
            plan = make_plan(rules, budget)
            assert best.objective is not None
            assert plan.certificate.objective >= best.bound
            losses.append(plan.certificate.objective / best.objective - 1)
    assert median(losses) <= 0.01
    assert max(losses) <= 0.1


def test_another_process_writes_the_same_plan_byte_for_byte():
    code = (
        "import sys, torch, npas_fx; from torch import nn\n"
        "torch.manual_seed(0)\n"
        "model = nn.Sequential(*[nn.Linear(16 + 4 * (k % 3), 16 + 4 * ((k + 1) % 3)) "
        "for k in range(10)])\n"
        "sys.stdout.write(npas_fx.plan(model, 0.3).to_json())"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": str(seed)},
        ).stdout
        for seed in (1, 2)
    }
    assert len(texts) == 1
    plan = Plan.from_json(texts.pop())
    assert plan.certificate is not None
    assert plan.certificate.reproducible


def test_plans_without_the_newer_fields_are_read():
    plan = npas_fx.plan(MODELS["mlp"].make(), 0.5)
    data = json.loads(plan.to_json())
    for field in ("reproducible", "rounds", "shadow_price"):
        del data["certificate"][field]
    assert Plan.from_json(json.dumps(data)).banks == plan.banks


class Reordered(nn.Module):
    """Layers in parallel, registered in any order; all of them at one depth."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        for k in order:
            setattr(self, f"layer{k}", nn.Linear(8 + 4 * (k % 4), 8, bias=False))
        self.number = len(order)

    def forward(self, x):
        return sum(getattr(self, f"layer{k}")(x[:, : 8 + 4 * (k % 4)]) for k in range(self.number))


@given(order=st.permutations(range(10)), share=st.sampled_from(SHARES[1:]))
def test_the_order_of_registration_does_not_matter(order, share):
    before = npas_fx.plan(Reordered(list(range(10))), share)
    after = npas_fx.plan(Reordered(order), share)
    assert before.certificate.objective == after.certificate.objective
    assert before.certificate.candidates == after.certificate.candidates
    assert sorted(b.parameters for b in before.banks) == sorted(b.parameters for b in after.banks)


def test_the_plan_is_no_worse_than_that_before_the_last_candidates():
    objectives = []

    def tiring(problem):
        """Greedy at first, then whatever takes the least."""
        found = SOLVERS["greedy"](problem)
        if objectives:
            chosen = cheapest_plan(reduce(problem), problem)
            price = sum(problem.price[c] for c in chosen)
            found = replace(found, chosen=chosen, objective=price)
        objectives.append(found.objective)
        return found

    certificate = npas_fx.plan(MODELS["gpt"].make(), 0.3, solver=tiring).certificate
    first, last = objectives
    assert certificate.objective == first < last
