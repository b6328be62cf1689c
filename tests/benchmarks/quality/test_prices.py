from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import npas_fx
from npas_fx.ir import Plan, Profile
from npas_fx.profiles.structure import (
    ALIKE,
    ROLE_FACTORS,
    Assumptions,
    StructureProfile,
    profile_structure,
)
from quality.contestant import count_parameters
from quality.plans import describe_plan, group_sites, plan_groups, shuffle_groups
from quality.prices import PRICES, price_plan
from small_tasks import TASKS, make_model

torch.set_num_threads(1)

MODELS = {name: make_model(task) for name, task in TASKS.items()}
INVENTORIES = {name: npas_fx.inspect(model) for name, model in MODELS.items()}
PROFILES = {
    (price, task): profiler(inventory)
    for price, profiler in PRICES.items()
    for task, inventory in INVENTORIES.items()
}
FROM_SIZES = {
    "missing parameters": lambda share: 1 - share,
    "missing parameters, squared": lambda share: (1 - share) ** 2,
    "logarithm of reuse": lambda share: -math.log(share),
    "reuse": lambda share: 1 / share - 1,
}
STRUCTURAL = [price for price in PRICES if price not in FROM_SIZES]
shares = st.floats(0.01, 0.99)


def sites_of(task: str) -> st.SearchStrategy[list[int]]:
    numbers = st.integers(0, len(INVENTORIES[task].sites) - 1)
    return st.lists(numbers, min_size=1, unique=True).map(sorted)


def assume(task: str, **changes: object) -> StructureProfile:
    return profile_structure(INVENTORIES[task], Assumptions(**changes))


def number_of(task: str, role: str) -> list[int]:
    return [k for k, site in enumerate(INVENTORIES[task].sites) if site.role == role]


@pytest.mark.parametrize("price", PRICES)
@given(data=st.data(), lower=shares, higher=shares)
def test_sharing_costs_something_and_more_the_less_a_bank_owns(
    price: str, data: st.DataObject, lower: float, higher: float
) -> None:
    task = data.draw(st.sampled_from(list(TASKS)))
    profile, sites = PROFILES[price, task], data.draw(sites_of(task))
    lower, higher = sorted([lower, higher])
    assert profile.price(sites, lower) >= profile.price(sites, higher) >= 0
    assert profile.price(sites, 0.01) > profile.price(sites, 0.99) > 0


@pytest.mark.parametrize("price", PRICES)
@pytest.mark.parametrize("task", TASKS)
def test_more_than_all_parameters_cost_nothing(price: str, task: str) -> None:
    assert PROFILES[price, task].price([0, 1], 2.0) <= 0


@pytest.mark.parametrize("price", PRICES)
def test_the_planner_takes_the_price(price: str) -> None:
    model = MODELS["pictures"]
    budget = count_parameters(model) // 2
    plan = npas_fx.plan(model, budget, profile=PRICES[price])
    assert plan.parameters == budget
    assert plan.certificate is not None
    assert plan.certificate.objective > 0
    described = describe_plan(plan, INVENTORIES["pictures"])
    # What was filled in since lowers no price.
    paid = price_plan(PROFILES[price, "pictures"], INVENTORIES["pictures"], described)
    assert 0 < paid <= plan.certificate.objective + 1e-9


@pytest.mark.parametrize("task", TASKS)
def test_dedicated_weights_are_free(task: str) -> None:
    inventory = INVENTORIES[task]
    described = describe_plan(npas_fx.plan(MODELS[task], 1.0), inventory)
    assert described.count("dedicated") == len(inventory.sites)
    for price in PRICES:
        assert price_plan(PROFILES[price, task], inventory, described) == 0


@cache
def some_plan() -> Plan:
    """Of the characters' network; one of its banks has a partial template."""
    model = MODELS["characters"]
    names = shuffle_groups(group_sites(model, lambda site: None), 3, 0)
    plan = plan_groups(model, 0.5, names[:2])
    assert any(bank.size.num_partial for bank in plan.banks)
    assert any(bank.is_dedicated for bank in plan.banks)
    return plan


@pytest.mark.parametrize("price", FROM_SIZES)
def test_prices_of_plans_from_sizes_are_sums_over_banks(price: str) -> None:
    inventory, plan = INVENTORIES["characters"], some_plan()
    numel = {site.name: site.numel for site in inventory.sites}
    expected = 0.0
    for bank in plan.banks:
        of_sites = sum(numel[name] for name in bank.sites)
        size = bank.size
        owned = size.num_templates * size.template_size + size.num_partial
        if not bank.is_dedicated:
            part = of_sites / sum(numel.values())
            expected += part * FROM_SIZES[price](owned / of_sites)
    priced = price_plan(PROFILES[price, "characters"], inventory, describe_plan(plan, inventory))
    assert priced == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("price", PRICES)
def test_partial_templates_lower_the_price(price: str) -> None:
    inventory, plan = INVENTORIES["characters"], some_plan()
    described = describe_plan(plan, inventory)
    shorter = re.sub(r",\d+\](?!,\")", ",0]", described)  # the last number of a bank, not of sites
    assert shorter != described
    profile = PROFILES[price, "characters"]
    assert price_plan(profile, inventory, described) < price_plan(profile, inventory, shorter)


@pytest.mark.parametrize("price", ["as shipped", "all alike", "missing parameters", "reuse"])
def test_a_plan_to_which_nothing_was_added_costs_what_its_certificate_says(price: str) -> None:
    # Tied weights have one size, and the smallest budget that they can meet leaves nothing over.
    model, inventory = MODELS["characters"], INVENTORIES["characters"]
    arguments = {"generators": ["tied"], "profile": PRICES[price]}
    with pytest.raises(npas_fx.InfeasibleBudgetError) as refusal:
        npas_fx.plan(model, 1, **arguments)
    plan = npas_fx.plan(model, refusal.value.smallest, **arguments)
    assert not any(bank.size.num_partial for bank in plan.banks)
    priced = price_plan(PROFILES[price, "characters"], inventory, describe_plan(plan, inventory))
    assert priced == plan.certificate.objective > 0


@pytest.mark.parametrize("task", TASKS)
@given(data=st.data(), share=shares)
def test_as_shipped_is_what_the_planner_uses(task: str, data: st.DataObject, share: float) -> None:
    sites = data.draw(sites_of(task))
    shipped = profile_structure(INVENTORIES[task])
    assert PROFILES["as shipped", task].price(sites, share) == shipped.price(sites, share)
    spelled_out = assume(
        task, role_factors=ROLE_FACTORS, alike=ALIKE, depth_decay=3.0, conflict=0.5
    )
    assert spelled_out.price(sites, share) == shipped.price(sites, share)


def price_of(price: str, task: str, sites: Sequence[int], share: float = 0.5) -> float:
    profile: Profile = PROFILES[price, task]
    return profile.price(sites, share)


@pytest.mark.parametrize("task", TASKS)
@given(data=st.data(), share=shares)
def test_the_price_of_conflict_is_a_part_of_the_price(
    task: str, data: st.DataObject, share: float
) -> None:
    sites = data.draw(sites_of(task))
    free, shipped, double = (
        price_of(price, task, sites, share)
        for price in ("no price of conflict", "as shipped", "double price of conflict")
    )
    assert double - shipped == pytest.approx(shipped - free, abs=1e-8)
    kinds = {(s.kind, s.role, s.shape) for s in map(INVENTORIES[task].sites.__getitem__, sites)}
    if len(kinds) > 1:
        assert free < shipped < double
    else:
        assert free == pytest.approx(double, abs=1e-8)


@pytest.mark.parametrize(
    ("price", "role"),
    [
        ("writers cost double", "residual_writer"),
        ("readers cost double", "residual_reader"),
        ("projections cost double", "parallel_projection"),
    ],
)
def test_a_role_costs_double_next_to_the_others(price: str, role: str) -> None:
    sites, (head,) = INVENTORIES["characters"].sites, number_of("characters", "head")
    for site in number_of("characters", role):
        ratio = price_of(price, "characters", [site]) / price_of(price, "characters", [head])
        expected = 2 * sites[site].numel / (ROLE_FACTORS["head"] * sites[head].numel)
        assert ratio == pytest.approx(expected, rel=1e-5)


def test_all_roles_alike_price_single_weights_by_their_sizes() -> None:
    for task, inventory in INVENTORIES.items():
        total = sum(site.numel for site in inventory.sites)
        prices = [price_of("all roles alike", task, [k]) for k in range(len(inventory.sites))]
        sizes = [site.numel / total for site in inventory.sites]
        ratios = [price / size for price, size in zip(prices, sizes, strict=True)]
        assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-5)
        shipped = [price_of("as shipped", task, [k]) for k in range(len(inventory.sites))]
        assert max(shipped) / min(shipped) != pytest.approx(max(prices) / min(prices))


def test_roles_without_a_factor_of_their_own_are_priced_as_before() -> None:
    task = "characters"
    sites = INVENTORIES[task].sites
    first, second = number_of(task, "head")[0], number_of(task, "embedding")[0]
    ratios = {
        price: price_of(price, task, [first]) / price_of(price, task, [second])
        for price in ("as shipped", "writers cost double", "readers cost double")
    }
    expected = 4 * sites[first].numel / (2 * sites[second].numel)
    assert ratios == pytest.approx(dict.fromkeys(ratios, expected), rel=1e-5)


def far_apart(task: str) -> list[int]:
    """Two weights of one role and shape, far from each other in depth."""
    sites = INVENTORIES[task].sites
    pairs = [
        (abs(a.depth - b.depth), j, k)
        for j, a in enumerate(sites)
        for k, b in enumerate(sites[:j])
        if (a.role, a.shape, a.kind) == (b.role, b.shape, b.kind)
    ]
    _, later, earlier = max(pairs)
    return [earlier, later]


def test_distance_in_depth_costs_what_the_decay_says() -> None:
    pair = far_apart("characters")
    none, shipped, tenfold = (
        price_of(price, "characters", pair)
        for price in ("no decay with depth", "as shipped", "tenfold decay with depth")
    )
    assert none < shipped < tenfold
    # Without it, weights of one role and shape are the same weight: one template makes both.
    alone = price_of("no price of conflict", "characters", pair[:1])
    assert none < alone


@pytest.mark.parametrize("task", TASKS)
def test_only_what_is_asked_for_makes_weights_alike(task: str) -> None:
    sites = INVENTORIES[task].sites
    for price, is_alike in (
        ("alike by role only", lambda a, b: a.role == b.role),
        ("alike by shape only", lambda a, b: a.shape == b.shape),
        ("all alike", lambda a, b: True),
    ):
        similarity = PROFILES[price, task].similarity
        for j, a in enumerate(sites):
            for k, b in enumerate(sites):
                assert similarity[j, k] == (1 if is_alike(a, b) else 0)


@pytest.mark.parametrize("price", STRUCTURAL)
def test_likenesses_of_all_assumptions_are_at_most_one(price: str) -> None:
    for task in TASKS:
        profile = PROFILES[price, task]
        assert isinstance(profile, StructureProfile)
        assert sum(profile.assumptions.alike.values()) == pytest.approx(1)
        assert profile.similarity.max() <= 1 + 1e-12
        assert profile.importance.sum() == pytest.approx(1)


def test_no_two_prices_are_the_same() -> None:
    sites = range(len(INVENTORIES["characters"].sites))
    parts = [list(sites[:5]), list(sites[3:12]), list(sites[8:]), [2, 5], [2], [4]]
    priced = {
        price: tuple(price_of(price, "characters", part, 0.3) for part in parts) for price in PRICES
    }
    assert len(set(priced.values())) == len(PRICES)


@pytest.mark.parametrize("price", FROM_SIZES)
def test_prices_from_sizes_see_no_difference_between_weights(price: str) -> None:
    profile = PROFILES[price, "characters"]
    count = len(INVENTORIES["characters"].sites)
    off_diagonal = profile.distance + torch.eye(count).numpy()
    assert (off_diagonal == 1).all()
    by_numel: dict[int, set[float]] = {}
    for k, site in enumerate(INVENTORIES["characters"].sites):
        by_numel.setdefault(site.numel, set()).add(profile.price([k], 0.3))
    assert all(len(prices) == 1 for prices in by_numel.values())
