"""What is said where no plan fits: numbers to type back, rules in the user's words."""

from __future__ import annotations

import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import npas_fx
from npas_fx import BankPlan, Budget, InfeasibleBudgetError, NPASError, RuleError
from npas_fx.errors import BudgetError
from npas_fx.infeasible import say_infeasible
from npas_fx.ir import Size
from npas_fx.rules import Rules, apply_rules
from npas_fx.solvers import PlanningProblem
from npas_fx.solvers.floor import find_obstacle
from npas_fx.solvers.selection import Obstacle

# Weights of 6 elements and biases of 2: 7 sites, 14 parameters that stay.
MODEL = nn.Sequential(*(nn.Linear(3, 2) for _ in range(7)))
PIN = BankPlan(
    sites=("4.weight", "5.weight"),
    generator="tied",
    size=Size(num_templates=1, template_size=6),
    parameters=8,
    bytes=32,
)
ALL = {
    "keep_private": "0.weight",
    "same_bank": [["1.weight", "2.weight"], ["3.weight", "6.weight"]],
    "different_bank": [["0.weight", "1.weight"], ["2.weight", "3.weight"]],
    "max_banks": 2,
    "pin": [PIN],
}
SAID = {
    "private": "keep_private",
    "same_bank[0]": "same_bank of '1.weight', '2.weight'",
    "same_bank[1]": "same_bank of '3.weight', '6.weight'",
    "different_bank[0]": "different_bank of '0.weight', '1.weight'",
    "different_bank[1]": "different_bank of '2.weight', '3.weight'",
    "max_banks": "max_banks=2",
    "pin[0]": "pin of '4.weight', '5.weight'",
}


def say(
    obstacle: Obstacle,
    *,
    asked: object = 0.5,
    budget: Budget | None = None,
    stays: int = 14,
    **rules,
) -> NPASError:
    inventory = npas_fx.inspect(MODEL)
    budget = budget or Budget.parse(asked, model_parameters=inventory.num_parameters)
    return say_infeasible(apply_rules(inventory, **rules), budget, asked, obstacle, stays)


@given(smallest=st.integers(0, 10**9), stays=st.integers(0, 10**9))
def test_the_smallest_budget_counts_what_stays_and_is_said_as_it_may_be_typed(smallest, stays):
    for resource in ("parameters", "bytes"):
        error = say(
            Obstacle(smallest={resource: smallest}), budget=Budget(**{resource: 1}), stays=stays
        )
        assert isinstance(error, InfeasibleBudgetError)
        assert error.smallest == smallest + stays
        assert f"the cheapest plan needs {smallest + stays} {resource}" in str(error)
        assert f"Use a budget of at least {smallest + stays} {resource}" in str(error)
        assert pickle.loads(pickle.dumps(error)).smallest == error.smallest


def test_what_cannot_be_shared_is_said():
    error = say(Obstacle(smallest={"parameters": 30}), exclude="6.weight", keep_private="0.weight")
    assert str(error) == (
        "budget=0.5 (28 parameters) cannot be met: the cheapest plan needs 44 parameters: 20 of "
        "them stay plain (14 bias, 6 excluded; the largest are '6.weight' 6, '0.bias' 2, '1.bias' "
        "2, '2.bias' 2); 6 are in weights that keep_private names, the largest '0.weight'. Use a "
        "budget of at least 44 parameters"
    )
    assert "no weight can be shared" in str(say(Obstacle(smallest={"parameters": 0}), exclude="*"))


def test_a_small_count_may_have_been_meant_as_a_share():
    error = say(Obstacle(smallest={"parameters": 30}), asked=1)
    assert str(error).endswith("; budget=1 means 1 parameters, did you mean 1.0?")


@given(st.dictionaries(st.sampled_from(sorted(SAID)), st.integers(1, 10**6)))
def test_the_four_rules_that_cost_the_most_are_said_from_the_top(saved):
    savings = {rule: {"parameters": less} for rule, less in saved.items()}
    savings |= {rule: {"bytes": 5} for rule in SAID if rule not in saved}
    text = str(say(Obstacle(smallest={"parameters": 30}, savings=savings), **ALL))
    found = re.findall(r"(\d+) parameters less without (.*?)(?=, or |\. Use)", text)
    least = sorted(saved.values(), reverse=True)[:4]
    assert [int(less) for less, _ in found] == least
    rule_of = {said: rule for rule, said in SAID.items()}
    assert [saved[rule_of[said]] for _, said in found] == least
    assert len({said for _, said in found}) == len(least)
    assert ("It could be" in text) == bool(saved)


def test_savings_in_bytes_are_for_budgets_in_bytes():
    savings = {"max_banks": {"bytes": 12, "parameters": 3}}
    obstacle = Obstacle(smallest={"bytes": 40}, savings=savings)
    text = str(say(obstacle, asked="0.06kB", max_banks=1))
    assert "It could be 12 bytes less without max_banks=1. Use a budget of at least 54 b" in text


@pytest.mark.parametrize("rule", SAID)
def test_where_no_budget_would_do_the_rules_are_to_blame(rule):
    error = say(Obstacle(smallest={}, blocking=(rule,)), **ALL)
    assert isinstance(error, RuleError)
    assert not isinstance(error, BudgetError)
    assert str(error) == (
        f"no plan keeps all of the rules, whatever the budget (in the way: {SAID[rule]}). Drop or "
        "loosen it"
    )


def test_weights_that_no_bank_may_have_are_named():
    blocking = (*list(SAID)[:5], "site 3", "site 6")
    text = str(say(Obstacle(smallest={}, blocking=blocking), **ALL))
    said = "; ".join(list(SAID.values())[:4])
    why = f"in the way: {said}; and 1 more; they leave no bank for '3.weight', '6.weight'"
    assert f"({why}). Drop or loosen one of these, or more where one is not enough" in text


@st.composite
def rules_of_six(draw: st.DrawFn) -> Rules:
    pairs = st.lists(st.sampled_from(range(6)), min_size=2, max_size=2, unique=True)
    groups = st.lists(pairs, max_size=2)
    given = {
        "keep_private": [f"{k}.weight" for k in draw(st.sets(st.integers(0, 6), max_size=2))],
        "max_banks": draw(st.none() | st.integers(0, 2)),
        "pin": draw(st.sampled_from([None, [PIN]])),
    }
    for rule in ("same_bank", "different_bank"):
        given[rule] = [[f"{k}.weight" for k in group] for group in draw(groups)]
    try:
        return apply_rules(npas_fx.inspect(MODEL), **given)
    except RuleError:
        return apply_rules(npas_fx.inspect(MODEL), max_banks=given["max_banks"])


@given(rules=rules_of_six(), neighbours=st.sets(st.integers(0, 5)))
def test_whatever_the_solver_finds_is_said(rules, neighbours):
    members = [(k,) for k in range(7)] + [(k, k + 1) for k in sorted(neighbours | {4})]
    problem = PlanningProblem(
        num_sites=7,
        members=tuple(members),
        price=(0.0,) * len(members),
        cost={"parameters": tuple(6 if len(sites) == 1 else 8 for sites in members)},
        budget={"parameters": 0},
        private=rules.private,
        same_bank=rules.groups,
        different_bank=rules.apart,
        max_banks=rules.max_banks,
        pin=tuple(members.index(pin.sites) for pin in rules.pinned),
    )
    obstacle = find_obstacle(problem)
    error = say_infeasible(rules, Budget(parameters=1), 1, obstacle, 14)
    if "parameters" in obstacle.smallest:
        assert isinstance(error, InfeasibleBudgetError)
        assert str(error).count(" less without ") == min(4, len(obstacle.savings))
    else:
        assert isinstance(error, RuleError)
        assert "in the way: " in str(error)
