"""The user's rules: what may be shared, what not, and what together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import npas_fx
from mlp_rules import WEIGHTS, emit, make, plain
from models import GPT, MODELS
from npas_fx import BankPlan, Inventory, RuleError, plan_of, transform
from npas_fx.generators import GENERATORS
from npas_fx.ir import Size
from npas_fx.rules import Pin, Rules, apply_rules
from oracle import count_trainable, shared_sites
from strategies import BudgetSpec, NetworkSpec, PartSpec, networks, smallest


def inventory() -> Inventory:
    return npas_fx.inspect(make())


def bank_of(
    *names: str,
    generator: str = "wavg",
    size: tuple[int, int, int] = (2, 30, 0),
    model: nn.Module | None = None,
) -> BankPlan:
    """A bank as a user may write it: templates, elements of each and of the partial one."""
    numels = [(model or make()).get_parameter(name).numel() for name in names]
    templates, length, partial = size
    if generator == "dedicated":
        templates, length = 1, numels[0]
        parameters = length
    else:
        tiles = sum(-(-numel // length) for numel in numels)
        parameters = templates * length + tiles * templates + partial
    return BankPlan(
        sites=names,
        generator=generator,
        size=Size(num_templates=templates, template_size=length, num_partial=partial),
        parameters=parameters,
        bytes=4 * parameters,
    )


PINS = [
    bank_of("stem.weight", "head.weight"),
    bank_of("hidden.0.weight", "hidden.1.weight", size=(2, 100, 7)),
]


def named(rules: Rules, members: Sequence[int]) -> tuple[str, ...]:
    return tuple(rules.inventory.sites[k].name for k in members)


def shared_names(shared: nn.Module) -> set[str]:
    return {name for sites in shared_sites(plan_of(shared)) for name in sites}


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


# different_bank


@pytest.mark.parametrize("pattern", ["hidden.*.weight", "hidden.*", re.compile("hidden")])
def test_the_weights_that_a_group_matches_are_kept_apart(pattern):
    rules = apply_rules(inventory(), different_bank=[[pattern], ["stem.weight", "head.weight"]])
    assert [named(rules, group) for group in rules.apart] == [
        ("hidden.0.weight", "hidden.1.weight"),
        ("stem.weight", "head.weight"),
    ]


def test_groups_to_keep_apart_are_not_joined():
    pairs = [["stem.weight", "head.weight"], ["head.weight", "hidden.1.weight"]]
    rules = apply_rules(inventory(), different_bank=pairs)
    assert rules.apart == ((0, 3), (2, 3))
    assert rules.groups == ()


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        ({"different_bank": [["stem.weight"]]}, r"\['stem.weight'\] are 1 weight"),
        ({"different_bank": [[]]}, r"\[\] are 0 weight"),
        (
            {"different_bank": [["stem.weight", "head.weight"]], "exclude": "head.weight"},
            r"'head.weight' cannot be in a bank.*\(excluded\)",
        ),
        (
            {"different_bank": [["stem.weight", "stem.bias"]]},
            r"'stem.bias' cannot be in a bank.*\(bias\)",
        ),
        (
            {
                "different_bank": [["stem.weight", "head.weight"]],
                "same_bank": [
                    ["stem.weight", "hidden.0.weight"],
                    ["hidden.0.weight", "head.weight"],
                ],
            },
            "same_bank wants 'stem.weight', 'hidden.0.weight', 'head.weight' in one bank, but "
            "different_bank keeps 'stem.weight', 'head.weight' apart",
        ),
    ],
)
def test_a_group_that_cannot_be_kept_apart_is_refused(rules, why):
    with pytest.raises(RuleError, match=why):
        apply_rules(inventory(), **rules)


def test_names_of_one_weight_cannot_be_kept_apart():
    found = npas_fx.inspect(MODELS["gpt"].make())
    with pytest.raises(RuleError, match="names of a tied weight are one weight"):
        apply_rules(found, different_bank=[["transformer.wte.weight", "lm_head.weight"]])


# max_banks


@pytest.mark.parametrize("number", [0, 1, 7, np.int64(3)])
def test_max_banks_is_a_number(number):
    found = apply_rules(inventory(), max_banks=number).max_banks
    assert found == number
    assert type(found) is int


@pytest.mark.parametrize("value", [True, False, 1.0, "1", [1]])
def test_what_is_no_number_of_banks_is_a_type_error(value):
    with pytest.raises(TypeError, match="max_banks"):
        emit(max_banks=value)


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        ({"max_banks": -1}, "max_banks=-1; give 0 or more"),
        (
            {"max_banks": 0, "same_bank": [["stem.weight", "head.weight"]]},
            r"max_banks=0, but 1 with .*: same_bank \('stem.weight', 'head.weight'\)\. Use "
            "max_banks=1 or more",
        ),
        ({"max_banks": 0, "pin": [0]}, r"max_banks=0, but 1 .*: pin\[0\] \('stem.weight', 'head"),
        ({"max_banks": 1, "pin": [0, 1]}, r"max_banks=1, but 2 .*: pin\[0\] .*; pin\[1\] \("),
        (
            {"max_banks": 1, "pin": [1], "same_bank": [["stem.weight", "head.weight"]]},
            r"max_banks=1, but 2 .*: pin\[0\] \('hidden.*; same_bank \('stem.weight', 'head",
        ),
    ],
)
def test_more_banks_than_are_allowed_are_refused(rules, why):
    pins = {"pin": [PINS[k] for k in rules["pin"]]} if "pin" in rules else {}
    with pytest.raises(RuleError, match=why):
        apply_rules(inventory(), **{**rules, **pins})


def test_only_banks_of_two_or_more_weights_are_counted():
    alone = [bank_of("stem.weight", generator="dedicated"), bank_of("head.weight")]
    assert len(apply_rules(inventory(), max_banks=0, pin=alone).pinned) == 2
    group = [["hidden.0.weight", "hidden.1.weight"]]  # is all in the pinned bank
    assert apply_rules(inventory(), max_banks=1, pin=PINS[1:], same_bank=group).max_banks == 1


def test_groups_may_have_to_end_in_one_bank_if_it_can_have_them():
    pairs = [["stem.weight", "head.weight"], ["hidden.0.weight", "hidden.1.weight"]]
    assert apply_rules(inventory(), max_banks=1, same_bank=pairs).max_banks == 1
    model = make()
    model.hidden.double()
    with pytest.raises(RuleError, match="max_banks=1, but 2 with two or more weights are wanted"):
        apply_rules(npas_fx.inspect(model), max_banks=1, same_bank=pairs)


# pin


@pytest.mark.parametrize("budget", [0.2, 0.5, 1.0, 1.7])
def test_the_banks_of_a_plan_can_be_pinned(budget):
    banks = npas_fx.plan(make(), budget).banks
    rules = apply_rules(inventory(), pin=banks)
    assert [(named(rules, pin.sites), pin.generator, pin.size) for pin in rules.pinned] == [
        (bank.sites, bank.generator, bank.size) for bank in banks
    ]


def test_a_pinned_bank_has_its_sites_in_any_order_and_by_any_name():
    bank = bank_of("head.weight", "stem.weight", size=(3, 40, 17))
    (pin,) = apply_rules(inventory(), pin=[bank], exclude="hidden.0.weight").pinned
    assert pin == Pin(sites=(0, 2), generator="wavg", size=bank.size)
    model = MODELS["gpt"].make()
    found = [
        apply_rules(
            npas_fx.inspect(model), pin=[bank_of(name, "transformer.wpe.weight", model=model)]
        )
        for name in ("transformer.wte.weight", "lm_head.weight")
    ]
    assert found[0] == found[1]


def test_a_bank_may_follow_a_generator_of_the_users_own():
    class Mine(type(GENERATORS["wavg"])):
        name = "mine"

    bank = replace(PINS[0], generator="mine")
    (pin,) = apply_rules(inventory(), pin=[bank], generators={"mine": Mine()}).pinned
    assert pin.generator == "mine"
    with pytest.raises(RuleError, match=r"pin\[0\]: no generator 'mine'; there are dedicated"):
        npas_fx.plan(make(), 0.5, pin=[bank])
    with pytest.raises(RuleError, match=r"pin\[0\]: no generator 'wavg'; .* dedicated, tied"):
        npas_fx.plan(make(), 0.5, pin=PINS, generators=["tied"])


def test_a_pinned_weight_of_its_own_may_be_private_too():
    alone = bank_of("stem.weight", generator="dedicated")
    rules = apply_rules(inventory(), pin=[alone], keep_private=["stem.weight", "head.weight"])
    assert named(rules, rules.pinned[0].sites) == ("stem.weight",)


@pytest.mark.parametrize("value", [3, ["stem.weight"], [None], [("stem.weight",)]])
def test_what_is_no_list_of_banks_is_a_type_error(value):
    for pin in (value, PINS[0], npas_fx.plan(make(), 0.5)):
        with pytest.raises(TypeError, match=r"pin.*plan\.banks\[0\]"):
            emit(pin=pin)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"sites": ()}, "has no sites"),
        ({"sites": ("stem.weight", "hed.weight")}, "no weight 'hed.weight'; near names: 'head.w"),
        ({"sites": ("stem.weight", "head.bias")}, r"'head.bias' cannot be in .*\(bias\)"),
        ({"sites": ("stem.weight", "stem.weight")}, "has a weight twice"),
        ({"generator": "nothing"}, "no generator 'nothing'; there are dedicated, tied, wavg"),
        ({"generator": "dedicated"}, "a dedicated bank is exactly one weight"),
        ({"generator": "tied"}, "tied weights have one shape"),
        ({"parameters": 90}, r"says parameters=90, but .* owns \d+; write that number"),
        ({"bytes": 90}, "says bytes=90, but"),
        ({"size": Size(num_templates=3, template_size=50)}, r"says parameters=\d+, but"),
        ({"size": Size(num_templates=0, template_size=50)}, "is no size"),
        ({"size": Size(num_templates=1, template_size=289)}, "is no size.* 1 to 288"),
    ],
)
def test_a_pinned_bank_that_does_not_fit_is_refused(change, why):
    with pytest.raises(RuleError, match=rf"pin\[1\].*{why}"):
        apply_rules(inventory(), pin=[PINS[1], replace(PINS[0], **change)])


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        ({"keep_private": "head.weight"}, r"pin\[0\] generates 'head.weight', but keep_private"),
        ({"exclude": "head.weight"}, r"pin\[0\]: 'head.weight' cannot be in .*\(excluded\)"),
        ({"include": "hidden.*"}, r"pin\[0\]: 'stem.weight' cannot be in .*\(not included\)"),
        (
            {"same_bank": [["stem.weight", "hidden.0.weight"]]},
            r"same_bank wants 'stem.weight', 'hidden.0.weight' in one bank, but pin\[0\] is "
            "without 'hidden.0.weight'",
        ),
        (
            {"different_bank": [WEIGHTS]},
            r"pin\[0\] has 'stem.weight', 'head.weight' in one bank, but different_bank keeps",
        ),
    ],
)
def test_a_pin_that_another_rule_contradicts_is_refused(rules, why):
    with pytest.raises(RuleError, match=why):
        apply_rules(inventory(), pin=PINS, **rules)


def test_a_weight_is_in_one_pinned_bank():
    with pytest.raises(RuleError, match=r"pin\[0\] and pin\[2\] both have 'stem.weight'"):
        apply_rules(inventory(), pin=[*PINS, bank_of("stem.weight")])


def test_a_pinned_bank_has_one_dtype():
    model = make()
    model.head.double()
    with pytest.raises(RuleError, match=r"one dtype.*float32.*float64"):
        apply_rules(npas_fx.inspect(model), pin=PINS)


def test_a_message_names_some_of_many_weights():
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(9)))
    with pytest.raises(RuleError, match=r"wants ('\d.weight', ){5}'5.weight' and 3 more in one"):
        npas_fx.plan(model, 0.9, same_bank=[["*.weight"]], keep_private="8.weight")


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


SIX = nn.Sequential(*(nn.Linear(3, 3) for _ in range(6)))


@given(data=st.data())
def test_rules_are_refused_just_when_no_choice_of_banks_keeps_them(data):
    groups = st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=3, unique=True), max_size=2)
    private = data.draw(st.sets(st.integers(0, 5), max_size=2), "private")
    together, apart, pins = (data.draw(groups, w) for w in ("together", "apart", "pins"))
    alone = data.draw(st.sets(st.integers(0, 5), max_size=1), "pinned alone")
    most = data.draw(st.none() | st.integers(0, 3), "max_banks")
    pinned = [*pins, *([k] for k in sorted(alone))]

    def keeps(banks: list[set[int]]) -> bool:
        bank_of = {k: bank for bank in banks for k in bank}
        return (
            all(len(bank_of[k]) == 1 for k in private)
            and all(set(group) <= bank_of[group[0]] for group in together)
            and all(bank_of[a] is not bank_of[b] for g in apart for a, b in combinations(g, 2))
            and all(set(pin) in banks for pin in pinned)
            and (most is None or sum(len(bank) > 1 for bank in banks) <= most)
        )

    kept = [banks for banks in every_choice(6) if keeps(banks)]
    try:
        rules = apply_rules(
            npas_fx.inspect(SIX),
            keep_private=[f"{k}.weight" for k in private],
            same_bank=[[f"{k}.weight" for k in group] for group in together],
            different_bank=[[f"{k}.weight" for k in group] for group in apart],
            max_banks=most,
            pin=[
                bank_of(
                    *(f"{k}.weight" for k in pin),
                    generator="dedicated" if len(pin) == 1 else "wavg",
                    size=(1, 4, 0),
                    model=SIX,
                )
                for pin in pinned
            ],
        )
    except RuleError:
        assert not kept
        return
    assert kept or most is not None  # a number of banks is the solver's to judge
    private, together, apart = rules.private, rules.groups, rules.apart
    pinned, most = [pin.sites for pin in rules.pinned], rules.max_banks
    assert [banks for banks in every_choice(6) if keeps(banks)] == kept


def every_choice(num_sites: int) -> Iterator[list[set[int]]]:
    """All ways to put sites into banks."""
    if num_sites == 0:
        yield []
        return
    last = num_sites - 1
    for banks in every_choice(last):
        yield [*banks, {last}]
        for k, bank in enumerate(banks):
            yield [*banks[:k], bank | {last}, *banks[k + 1 :]]


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


@given(spec=networks(), place=st.floats(0, 1), most=st.integers(1, 3))
def test_rules_about_banks_hold_in_the_plan(spec, place, most):
    model = spec.build()
    before = npas_fx.plan(model, BudgetSpec(0.5).amount(model)).banks
    pin = sorted(before, key=lambda bank: -len(bank.sites))[:1]
    # One weight of each of the others, and one of the pinned ones.
    apart = [bank.sites[0] for bank in before]
    rules = {"different_bank": [apart] if len(apart) > 1 else [], "max_banks": most, "pin": pin}
    plan = npas_fx.plan(model, BudgetSpec(place).amount(model, **rules), **rules)
    assert set(pin) <= set(plan.banks)
    assert sum(len(bank.sites) > 1 for bank in plan.banks) <= most
    assert all(len(set(bank.sites).intersection(apart)) < 2 for bank in plan.banks)


@pytest.mark.parametrize("budget", [0.3, 1.0, 1.5])
def test_a_pinned_bank_is_not_filled_up(budget):
    plan = npas_fx.plan(make(), budget, pin=PINS[1:])
    assert PINS[1] in plan.banks
    assert npas_fx.plan(make(), budget, pin=plan.banks).banks == plan.banks


def test_no_bank_is_shared_where_none_may_be():
    plan = npas_fx.plan(make(), 0.6, max_banks=0)
    assert all(len(bank.sites) == 1 for bank in plan.banks)


def test_an_error_says_what_a_rule_costs():
    model, least = make(), smallest(make())
    costly = smallest(model, max_banks=0)
    with pytest.raises(npas_fx.InfeasibleBudgetError) as caught:
        npas_fx.plan(model, least, max_banks=0)
    assert f"It could be {costly - least} parameters less without max_banks=0." in str(caught.value)
    assert caught.value.smallest == costly > least


def test_rules_that_only_the_solver_finds_to_contradict_are_refused():
    pairs = [["stem.weight", "head.weight"], ["hidden.0.weight", "hidden.1.weight"]]
    rules = {"same_bank": pairs, "max_banks": 1}
    assert sum(len(bank.sites) > 1 for bank in npas_fx.plan(make(), 0.9, **rules).banks) == 1
    with pytest.raises(RuleError, match=r"whatever the budget \(in the way: .*max_banks=1"):
        npas_fx.plan(make(), 0.9, different_bank=[["stem.weight", "hidden.1.weight"]], **rules)


@pytest.mark.parametrize(
    "rule",
    ["include", "exclude", "keep_private", "same_bank", "different_bank", "max_banks", "pin"],
)
def test_plan_takes_the_rules_of_transform(rule):
    for call in (npas_fx.plan, transform):
        with pytest.raises(TypeError, match=rule):
            call(make(), 0.5, **{rule: 3.5})


def test_rules_keep_what_is_known_of_the_blocks():
    inventory = npas_fx.inspect(GPT(depth=3))
    assert inventory.repeats
    rules = apply_rules(inventory, exclude=inventory.repeats[0].sites[0][0])
    assert rules.inventory.repeats == inventory.repeats
    assert rules.inventory.places() == inventory.places()
