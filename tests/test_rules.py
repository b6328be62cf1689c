"""The user's rules: what may be shared, what not, and what together."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import npas_fx
from models import GPT, MODELS
from npas_fx import RuleError, plan_of, transform
from npas_fx.rules import apply_rules
from oracle import count_trainable, shared_sites
from strategies import BudgetSpec, NetworkSpec, PartSpec, networks, smallest

WEIGHTS = ["stem.weight", "hidden.0.weight", "hidden.1.weight", "head.weight"]
BIASES = ["stem.bias", "hidden.0.bias", "hidden.1.bias", "head.bias"]


def make() -> nn.Module:
    return MODELS["mlp"].make()


def emit(budget=0.5, **rules) -> nn.Module:
    return transform(make(), budget, example_inputs=MODELS["mlp"].inputs(3), **rules)


def plain(shared: nn.Module) -> set[str]:
    """Names of the model's weights that are still parameters with their values."""
    before = dict(make().named_parameters())
    after = dict(shared.named_parameters())
    found = before.keys() & after.keys()
    assert all(torch.equal(before[name], after[name]) for name in found)
    return found & set(WEIGHTS)


def shared_names(shared: nn.Module) -> set[str]:
    return {name for sites in shared_sites(plan_of(shared)) for name in sites}


# Patterns


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("hidden.0.weight", {"hidden.0.weight"}),
        ("hidden.*.weight", {"hidden.0.weight", "hidden.1.weight"}),
        ("hidden.?.weight", {"hidden.0.weight", "hidden.1.weight"}),
        ("hidden.[1-9].weight", {"hidden.1.weight"}),
        ("*", set(WEIGHTS)),
        (re.compile(r"^h"), {"hidden.0.weight", "hidden.1.weight", "head.weight"}),
        (re.compile(r"\.1\."), {"hidden.1.weight"}),
        (["stem.weight", re.compile("head")], {"stem.weight", "head.weight"}),
        (("stem.*",), {"stem.weight"}),
    ],
)
def test_patterns_are_names_globs_and_regular_expressions(pattern, names):
    shared = emit(1.0 if len(names) == 4 else 0.9, exclude=pattern)
    plan = plan_of(shared)
    excluded = {name for name, reason in plan.kept.items() if reason == "excluded"}
    assert excluded == names
    assert names <= plain(shared)
    assert not names & {name for bank in plan.banks for name in bank.sites}


def test_a_glob_is_over_the_whole_name():
    with pytest.raises(RuleError, match="matches no parameter"):
        emit(exclude="weight")
    with pytest.raises(RuleError, match="matches no parameter"):
        emit(exclude="HIDDEN.*")


def test_an_exact_name_is_no_glob():
    class Brackets(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleDict({"a[0]": nn.Linear(4, 4), "a0": nn.Linear(4, 4)})

        def forward(self, x):
            return self.layers["a0"](self.layers["a[0]"](x))

    plan = npas_fx.plan(Brackets(), 1.0, exclude="layers.a[0].weight")
    assert [n for n, reason in plan.kept.items() if reason == "excluded"] == ["layers.a[0].weight"]


@pytest.mark.parametrize("rule", ["include", "exclude", "keep_private"])
def test_an_unmatched_pattern_lists_near_names(rule):
    with pytest.raises(RuleError, match=f"{rule}: 'hiden.0.weight'.*'hidden.0.weight'"):
        emit(**{rule: ["stem.weight", "hiden.0.weight"]})
    with pytest.raises(RuleError, match=f"{rule}: .*zzz.*near names: '"):
        emit(**{rule: re.compile("zzz")})


def test_an_unmatched_pattern_of_a_group_lists_near_names():
    with pytest.raises(RuleError, match=r"same_bank: 'hidden.9.weight'.*'hidden\.[01]\.weight'"):
        emit(same_bank=[["stem.weight", "hidden.9.weight"]])


@pytest.mark.parametrize("rule", ["include", "exclude", "keep_private"])
@pytest.mark.parametrize("value", [3, [3], [["stem.weight"]], [None]])
def test_what_is_no_pattern_is_a_type_error(rule, value):
    with pytest.raises(TypeError, match=rule):
        emit(**{rule: value})


@pytest.mark.parametrize("value", ["stem.weight", ["stem.weight", "head.weight"], [3], 3])
def test_what_is_no_list_of_groups_is_a_type_error(value):
    with pytest.raises(TypeError):
        emit(same_bank=value)


# include and exclude


def test_only_what_is_included_is_shared():
    shared = emit(0.8, include="hidden.*.weight")
    assert shared_names(shared) <= {"hidden.0.weight", "hidden.1.weight"}
    assert shared_names(shared)
    assert {"stem.weight", "head.weight"} <= plain(shared)
    kept = plan_of(shared).kept
    assert kept["stem.weight"] == kept["head.weight"] == "not included"


def test_exclude_wins_over_include():
    shared = emit(0.9, include="hidden.*.weight", exclude="hidden.1.weight")
    assert shared_names(shared) <= {"hidden.0.weight"}
    kept = plan_of(shared).kept
    assert kept["hidden.1.weight"] == "excluded"
    assert kept["stem.weight"] == "not included"


def test_include_that_leaves_nothing_says_why():
    with pytest.raises(RuleError, match=r"include='\*.bias' leaves no weight.*\(bias\)"):
        emit(include="*.bias")
    with pytest.raises(RuleError, match="excluded"):
        emit(include="stem.weight", exclude="*")


def test_excluded_weights_cost_what_they_are():
    with pytest.raises(npas_fx.InfeasibleBudgetError, match=r"576 excluded.*'hidden.0.weight' 576"):
        emit(0.3, exclude="hidden.0.weight")
    assert count_trainable(emit(0.5, exclude="hidden.0.weight")) == count_trainable(emit(0.5))


def test_biases_can_be_excluded_which_changes_nothing():
    assert npas_fx.plan(make(), 0.5, exclude="*.bias") == npas_fx.plan(make(), 0.5)


def test_a_pattern_of_same_bank_passes_over_what_stays_in_any_case():
    assert emit(0.5, same_bank=[["stem.*", "head.*"]]).plan == (
        emit(0.5, same_bank=[["stem.weight", "head.weight"]]).plan
    )


# keep_private


@pytest.mark.parametrize("budget", [0.6, 1.0, 2.0])
def test_private_weights_stay_parameters_of_their_own(budget):
    shared = emit(budget, keep_private=["stem.weight", "head.weight"])
    assert {"stem.weight", "head.weight"} <= plain(shared)
    plan = plan_of(shared)
    for name in ("stem.weight", "head.weight"):
        (bank,) = [bank for bank in plan.banks if name in bank.sites]
        assert bank.generator == "dedicated"
    assert count_trainable(shared) == plan.budget.parameters


def test_private_weights_are_named_where_they_do_not_fit():
    with pytest.raises(npas_fx.InfeasibleBudgetError, match=r"keep_private.*'hidden\.0\.weight'"):
        emit(0.3, keep_private="hidden.0.weight")


def test_with_everything_private_nothing_is_shared_and_more_cannot_be_used():
    shared = emit(1.5, keep_private="*")
    assert plain(shared) == set(WEIGHTS)
    assert count_trainable(shared) == count_trainable(make())


def test_private_and_excluded_is_excluded():
    plan = plan_of(emit(0.9, keep_private="stem.weight", exclude="stem.weight"))
    assert plan.kept["stem.weight"] == "excluded"


# same_bank


@pytest.mark.parametrize("budget", [0.15, 0.5, 1.0, 2.0])
def test_a_group_ends_in_one_bank(budget):
    group = ["stem.weight", "head.weight"]
    shared = emit(budget, same_bank=[group])
    (bank,) = [bank for bank in plan_of(shared).banks if set(bank.sites) & set(group)]
    assert set(group) <= set(bank.sites)
    assert bank.generator != "dedicated"
    assert not set(group) & plain(shared)
    assert count_trainable(shared) == plan_of(shared).budget.parameters


def test_others_may_join_a_group():
    group = ["hidden.0.weight", "head.weight"]
    model = make()
    least = smallest(model, same_bank=[group])
    (bank,) = [
        bank
        for bank in npas_fx.plan(model, least, same_bank=[group]).banks
        if set(group) <= set(bank.sites)
    ]
    assert set(bank.sites) > set(group)


def test_groups_with_a_weight_in_common_are_one():
    shared = emit(
        0.9, same_bank=[["stem.weight", "head.weight"], ["head.weight", "hidden.1.weight"]]
    )
    (bank,) = [bank for bank in plan_of(shared).banks if "head.weight" in bank.sites]
    assert {"stem.weight", "head.weight", "hidden.1.weight"} <= set(bank.sites)


def test_groups_take_patterns():
    shared = emit(0.95, same_bank=[["hidden.*.weight"]])
    (bank,) = [bank for bank in plan_of(shared).banks if "hidden.0.weight" in bank.sites]
    assert "hidden.1.weight" in bank.sites


def test_a_group_of_one_asks_for_nothing():
    assert npas_fx.plan(make(), 0.5, same_bank=[["stem.weight"]]) == npas_fx.plan(make(), 0.5)
    assert npas_fx.plan(make(), 0.5, same_bank=[]) == npas_fx.plan(make(), 0.5)


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        (
            {"same_bank": [["stem.weight", "head.weight"]], "keep_private": "head.weight"},
            "keep_private keeps 'head.weight'",
        ),
        (
            {"same_bank": [["stem.weight", "head.weight"]], "exclude": "head.weight"},
            r"'head.weight' cannot be in a bank.*\(excluded\)",
        ),
        (
            {"same_bank": [["*.weight"]], "exclude": "head.weight"},
            r"'head.weight' cannot be in a bank.*\(excluded\)",
        ),
        (
            {"same_bank": [["stem.weight", "head.weight"]], "include": "stem.weight"},
            r"'head.weight' cannot be in a bank.*\(not included\)",
        ),
        (
            {"same_bank": [["stem.weight", "stem.bias"]]},
            r"'stem.bias' cannot be in a bank.*\(bias\)",
        ),
    ],
)
def test_rules_that_cannot_hold_together_are_refused(rules, why):
    with pytest.raises(RuleError, match=why):
        emit(0.9, **rules)


def test_a_group_has_one_dtype():
    spec = NetworkSpec(
        domain="vector", width=5, parts=(PartSpec("plain"),), names=("a",), dtype="mixed"
    )
    with pytest.raises(RuleError, match=r"one dtype.*float32.*float64"):
        transform(spec.build(), 0.9, same_bank=[["stem.weight", "head.weight"]])


# Tied weights


@pytest.mark.parametrize("name", ["transformer.wte.weight", "lm_head.weight", "lm_*", "*.wte.*"])
def test_a_tied_weight_goes_by_any_of_its_names(name):
    example = MODELS["gpt"]
    model = example.make()
    shared = transform(model, 0.9, example_inputs=example.inputs(2), exclude=name)
    assert shared.lm_head.weight is shared.transformer.wte.weight
    assert torch.equal(shared.lm_head.weight, model.lm_head.weight)
    assert sum(reason == "excluded" for reason in plan_of(shared).kept.values()) == 1
    private = npas_fx.plan(model, 0.9, keep_private=name)
    (bank,) = [b for b in private.banks if b.sites[0].split(".")[-2] in ("wte", "lm_head")]
    assert bank.generator == "dedicated"
    group = npas_fx.plan(model, 0.9, same_bank=[[name, "transformer.wpe.weight"]])
    (bank,) = [b for b in group.banks if "transformer.wpe.weight" in b.sites]
    assert {"wte", "lm_head"} & {site.split(".")[-2] for site in bank.sites}


def test_two_names_of_one_weight_are_one_weight():
    example = MODELS["gpt"]
    model = example.make()
    both = ["transformer.wte.weight", "lm_head.weight"]
    assert npas_fx.plan(model, 0.9, keep_private=both) == npas_fx.plan(
        model, 0.9, keep_private=both[0]
    )
    assert npas_fx.plan(model, 0.9, same_bank=[both]) == npas_fx.plan(model, 0.9)


# All of it together


@given(spec=networks(), seed=st.integers(0, 99), place=st.floats(0, 1))
def test_rules_hold_in_the_emitted_module(spec, seed, place):
    model = spec.build()
    weights = [n for b in npas_fx.plan(model, 1.0).banks for n in b.sites]
    order = torch.randperm(len(weights), generator=torch.Generator().manual_seed(seed)).tolist()
    weights = [weights[k] for k in order]
    dtype_of = {name: model.get_parameter(name).dtype for name in weights}
    exclude, private, group = weights[:1], weights[1:2], weights[2:4]
    group = [name for name in group if dtype_of[name] == dtype_of[group[0]]]
    rules = {"exclude": exclude or None, "keep_private": private or None, "same_bank": [group]}
    budget = BudgetSpec(place).amount(model, **rules)
    shared = transform(model, budget, example_inputs=spec.draw(), **rules)
    plan = plan_of(shared)
    for name in (*exclude, *private):
        assert torch.equal(shared.get_parameter(name), model.get_parameter(name))
    assert all(plan.kept[name] == "excluded" for name in exclude)
    if len(group) > 1:
        assert [set(group) <= set(b.sites) for b in plan.banks if group[0] in b.sites] == [True]
    free = len(weights) > 2
    assert count_trainable(shared) == budget or not free
    assert count_trainable(shared) <= budget


def test_rules_keep_what_is_known_of_the_blocks():
    inventory = npas_fx.inspect(GPT(depth=3))
    assert inventory.repeats
    rules = apply_rules(inventory, exclude=inventory.repeats[0].sites[0][0])
    assert rules.inventory.repeats == inventory.repeats
    assert rules.inventory.places() == inventory.places()
