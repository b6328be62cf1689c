from __future__ import annotations

import itertools
import math
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import npas_fx
from npas_fx.ir import BankPlan, Inventory, Mixture, Plan, Size
from quality.contestant import count_parameters
from quality.plans import (
    Drawn,
    Proportional,
    count_generation_flops,
    cut_groups,
    describe_plan,
    group_sites,
    plan_groups,
    read_banks,
    shuffle_groups,
)
from small_tasks import TASKS, make_model

torch.set_num_threads(1)

Groups = list[list[str]]
MODELS = {name: make_model(task) for name, task in TASKS.items()}
INVENTORIES = {name: npas_fx.inspect(model) for name, model in MODELS.items()}
NAMES = {name: [site.name for site in each.sites] for name, each in INVENTORIES.items()}
tasks = st.sampled_from(list(TASKS))


def partitions(task: str) -> st.SearchStrategy[Groups]:
    """Some of the weights in groups of one and more, the others in none."""
    labels = st.lists(
        st.integers(0, 4), min_size=len(NAMES[task]), max_size=len(NAMES[task])
    ).filter(lambda drawn: any(label > 0 for label in drawn))

    def collect(drawn: list[int]) -> Groups:
        groups = [
            [name for name, own in zip(NAMES[task], drawn, strict=True) if own == label]
            for label in range(1, 5)
        ]
        return [group for group in groups if group]

    return labels.map(collect)


def nested_names() -> st.SearchStrategy[Groups]:
    sizes = st.lists(st.integers(1, 9), min_size=1, max_size=5)
    return sizes.map(
        lambda drawn: [[f"{group}.{k}" for k in range(size)] for group, size in enumerate(drawn)]
    )


def sites_of(plan: Plan) -> set[frozenset[str]]:
    return {frozenset(bank.sites) for bank in plan.banks}


def share_of(bank: BankPlan, inventory: Inventory) -> float:
    numel = {site.name: site.numel for site in inventory.sites}
    owned = bank.size.num_templates * bank.size.template_size + bank.size.num_partial
    return owned / sum(numel[name] for name in bank.sites)


@settings(max_examples=6)
@given(st.data(), tasks, st.floats(0, 1))
def test_each_group_has_a_bank_and_the_rest_is_dedicated(
    data: st.DataObject, task: str, generosity: float
) -> None:
    groups, model = data.draw(partitions(task)), MODELS[task]
    with pytest.raises(npas_fx.InfeasibleBudgetError) as refusal:
        plan_groups(model, 1, groups)
    smallest, total = refusal.value.smallest, count_parameters(model)
    assert smallest < total
    budget = smallest + int(generosity * (total - smallest))
    plan = plan_groups(model, budget, groups)
    alone = set(NAMES[task]) - {name for group in groups for name in group}
    assert sites_of(plan) == {frozenset(group) for group in [*groups, *([n] for n in alone)]}
    for bank in plan.banks:
        if len(bank.sites) > 1:
            assert bank.generator == "wavg"
        if bank.sites[0] in alone:
            assert bank.is_dedicated
    # A group of one may be dedicated: it then shares nothing, and nothing can be spent on it.
    assert plan.parameters == budget or all(bank.is_dedicated for bank in plan.banks)


@settings(max_examples=3)
@given(st.data(), tasks)
def test_the_smallest_budget_that_a_refusal_names_is_met(data: st.DataObject, task: str) -> None:
    groups, model = data.draw(partitions(task)), MODELS[task]
    with pytest.raises(npas_fx.InfeasibleBudgetError) as refusal:
        plan_groups(model, 1, groups)
    smallest = refusal.value.smallest
    assert plan_groups(model, smallest, groups).parameters == smallest
    with pytest.raises(npas_fx.InfeasibleBudgetError) as again:
        plan_groups(model, smallest - 1, groups)
    assert again.value.smallest == smallest


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("share", [0.5, 2.0])
def test_a_budget_is_met_to_the_parameter_with_everything_in_groups(
    task: str, share: float
) -> None:
    model = MODELS[task]
    groups = shuffle_groups(group_sites(model, lambda site: None), 3, 0)
    budget = round(share * count_parameters(model))
    plan = plan_groups(model, budget, groups)
    assert plan.parameters == budget
    assert sites_of(plan) == {frozenset(group) for group in groups}
    assert not any(bank.is_dedicated for bank in plan.banks)


def test_groups_of_equal_weights_get_equal_shares() -> None:
    model = MODELS["characters"]
    groups = [
        [name for name in NAMES["characters"] if name.endswith(f"{part}.weight")]
        for part in ("query", "key", "value")
    ]
    # Three banks of two templates for three weights of 256 each, with a coefficient for each pair.
    saved = 3 * (3 * 256 - (2 * 256 + 3 * 2))
    plan = plan_groups(model, count_parameters(model) - saved, groups)
    sizes = [bank.size for bank in plan.banks if not bank.is_dedicated]
    assert sizes == [Size(num_templates=2, template_size=256)] * 3


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_no_group_gets_all_and_none_nothing(share: float) -> None:
    # Sizes come in steps of up to a half, and the budget is used up: shares are equal up to that.
    model, inventory = MODELS["characters"], INVENTORIES["characters"]
    for seed in range(2):
        groups = shuffle_groups(group_sites(model, lambda site: None), 4, seed)
        plan = plan_groups(model, share, groups)
        shares = [share_of(bank, inventory) for bank in plan.banks]
        assert max(shares) < 2 * share
        assert min(shares) > share / 3


def test_banks_follow_only_the_given_generators() -> None:
    model = MODELS["characters"]
    groups = group_sites(model, lambda site: (site.role, site.shape))
    repeated = [group for group in groups if len(group) > 1]
    with pytest.raises(npas_fx.InfeasibleBudgetError) as refusal:
        plan_groups(model, 1, repeated, ["tied"])
    plan = plan_groups(model, refusal.value.smallest, repeated, ["tied"])
    assert {bank.generator for bank in plan.banks} == {"tied", "dedicated"}
    # The weights of a group but one, less a gain for each.
    numel = {site.name: site.numel for site in INVENTORIES["characters"].sites}
    saved = sum(sum(numel[n] for n in group[1:]) - len(group) for group in repeated)
    assert plan.parameters == count_parameters(model) - saved


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99), tasks)
def test_equal_shares_are_cheapest(first: float, second: float, task: str) -> None:
    profile = Proportional(INVENTORIES[task])
    # Two halves of a bank of the same weights, with what is left for both between them.
    apart = profile.price([1], Mixture(first, 4, 1)) + profile.price([1], Mixture(second, 4, 1))
    assert 2 * profile.price([1], Mixture((first + second) / 2, 4, 1)) <= apart + 1e-12
    assert profile.price([1], Mixture(max(first, second), 4, 1)) <= profile.price(
        [1], Mixture(min(first, second), 4, 1)
    )
    assert profile.price([1, 2], Mixture(first, 4, 1)) > 0


@pytest.mark.parametrize("task", TASKS)
def test_grouping_puts_each_weight_into_one_group_by_its_key(task: str) -> None:
    sites = {site.name: site for site in INVENTORIES[task].sites}
    groups = group_sites(MODELS[task], lambda site: (site.role, site.shape))
    assert Counter(name for group in groups for name in group) == Counter(list(sites))
    keys = [{(sites[name].role, sites[name].shape) for name in group} for group in groups]
    assert all(len(key) == 1 for key in keys)
    assert len({min(key) for key in keys}) == len(groups)
    for group in groups:
        depths = [sites[name].depth for name in group]
        assert depths == sorted(depths)


@given(nested_names(), st.integers(1, 10))
def test_cutting_keeps_the_order_within_runs_of_one_length(groups: Groups, length: int) -> None:
    runs = cut_groups(groups, length)
    assert [n for run in runs for n in run] == [n for group in groups for n in group]
    assert all(len({name.partition(".")[0] for name in run}) == 1 for run in runs)
    for group in groups:
        own = [len(run) for run in runs if run[0] in group]
        assert all(size == length for size in own[:-1])
        assert 1 <= own[-1] <= length


@given(nested_names(), st.integers(1, 12), st.integers(0, 2**32))
def test_shuffling_deals_all_names_to_groups_of_equal_size(
    groups: Groups, number: int, seed: int
) -> None:
    names = [name for group in groups for name in group]
    dealt = shuffle_groups(groups, number, seed)
    assert Counter(name for group in dealt for name in group) == Counter(names)
    assert len(dealt) == min(number, len(names))
    sizes = [len(group) for group in dealt]
    assert max(sizes) - min(sizes) <= 1
    assert dealt == shuffle_groups(groups, number, seed)


def test_other_seeds_deal_other_groups() -> None:
    groups = [[str(k) for k in range(30)]]
    assert len({str(shuffle_groups(groups, 5, seed)) for seed in range(20)}) == 20


def draw_plan(task: str, share: float, seed: int) -> Plan:
    budget = round(share * count_parameters(MODELS[task]))
    return npas_fx.plan(MODELS[task], budget, profile=lambda inventory: Drawn(inventory, seed))


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_draws_the_same_plan_and_others_draw_others(task: str) -> None:
    plans = [draw_plan(task, 0.25, seed) for seed in (0, 0, 1)]
    first, again, other = (describe_plan(plan, INVENTORIES[task]) for plan in plans)
    assert first == again
    assert first != other


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_drawn_plans_meet_their_budgets(task: str, share: float) -> None:
    plan = draw_plan(task, share, 3)
    assert plan.parameters == round(share * count_parameters(MODELS[task]))


@given(st.integers(0, 1000), st.lists(st.integers(0, 9), min_size=1, unique=True).map(sorted))
def test_drawn_prices_fall_with_the_share_and_are_never_free(seed: int, sites: list[int]) -> None:
    profile = Drawn(INVENTORIES["pictures"], seed)
    prices = [
        profile.price(sites, Mixture(share, 4, 1)) for share in (0.01, 0.1, 0.5, 0.9, 1.0, 3.0)
    ]
    assert prices == sorted(prices, reverse=True)
    assert prices[-1] > 0
    again = Drawn(INVENTORIES["pictures"], seed)
    assert [again.price(sites, Mixture(share, 4, 1)) for share in (0.01, 0.1)] == prices[:2]


def test_drawn_prices_differ_between_seeds_banks_and_roles() -> None:
    inventory = INVENTORIES["characters"]
    prices = {
        (seed, sites): Drawn(inventory, seed).price(sites, Mixture(0.5, 4, 1)) / len(sites)
        for seed in range(5)
        for sites in ((2,), (3,), (2, 3), (2, 4))
    }
    assert len(set(prices.values())) == len(prices)


def test_each_seed_draws_factors_of_banks_and_of_roles() -> None:
    sites = INVENTORIES["characters"].sites
    own = [k for k, site in enumerate(sites) if site.role == "parallel_projection"]
    banks = [bank for size in (1, 2, 3) for bank in itertools.combinations(own, size)]
    logarithms = np.array(
        [
            [
                math.log(Drawn(INVENTORIES["characters"], seed).price(bank, Mixture(0.5, 4, 1)))
                for bank in banks
            ]
            for seed in range(5)
        ]
    )
    logarithms -= np.log([sum(sites[k].numel for k in bank) for bank in banks])
    of_role = logarithms.mean(axis=1)  # what the banks draw evens out over 129 of them
    assert of_role.std() > 0.15
    of_bank = logarithms - of_role[:, None]
    assert of_bank.std() > 0.3
    assert abs(np.corrcoef(of_bank)[np.triu_indices(5, 1)]).max() < 0.4


@given(st.integers(0, 100))
def test_drawn_distances_are_distances(seed: int) -> None:
    distance = Drawn(INVENTORIES["pictures"], seed).distance
    assert np.array_equal(distance, distance.T)
    assert (np.diag(distance) == 0).all()
    assert (distance[~np.eye(len(distance), dtype=bool)] > 0).all()
    assert not np.array_equal(distance, Drawn(INVENTORIES["pictures"], seed + 1).distance)


@cache
def plans_that_mix(task: str) -> list[Plan]:
    model = MODELS[task]
    one_bank = group_sites(model, lambda site: None)
    return [
        npas_fx.plan(model, 0.25),
        npas_fx.plan(model, 1.0),
        plan_groups(model, 0.45, one_bank),
    ]


@pytest.mark.parametrize("task", TASKS)
def test_banks_are_read_as_they_were_described(task: str) -> None:
    number = {name: index for index, name in enumerate(NAMES[task])}
    partial = ranks = 0
    of_limited_rank = npas_fx.plan(MODELS[task], 0.99, generators=["recursive"])
    for plan in [*plans_that_mix(task), of_limited_rank]:
        expected = [
            (tuple(number[name] for name in bank.sites), bank.generator, bank.size)
            for bank in plan.banks
        ]
        described = describe_plan(plan, INVENTORIES[task])
        assert list(read_banks(described)) == expected
        assert " " not in described
        partial += sum(bank.size.num_partial > 0 for bank in plan.banks)
        ranks += sum(bank.size.rank > 0 for bank in plan.banks)
    assert partial  # or partial templates were not described
    assert ranks  # or ranks were not


@pytest.mark.parametrize("task", TASKS)
def test_operations_are_those_of_the_banks_that_are_emitted(task: str) -> None:
    for plan in plans_that_mix(task):
        shared = npas_fx.apply(MODELS[task], plan)
        banks = [part for part in shared.modules() if hasattr(part, "templates")]
        exact = 0
        for bank in banks:
            mixed = len(bank.templates)
            if hasattr(bank, "partial_coefficients"):
                mixed += bank.partial_coefficients.shape[1]
            for weight in bank():
                exact += 2 * mixed * weight.numel()  # a product and a sum for each template
        assert count_generation_flops(plan, INVENTORIES[task]) == exact


def test_dedicated_weights_cost_no_operations() -> None:
    plan = npas_fx.plan(MODELS["characters"], 1.0)
    assert all(bank.is_dedicated for bank in plan.banks)
    assert count_generation_flops(plan, INVENTORIES["characters"]) == 0
