from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import npas_fx
from npas_fx.ir import Mixture, Plan, Profile
from npas_fx.profiles.structure import (
    ROLE_FACTORS,
    UNLIKE,
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
    assert (
        profile.price(sites, Mixture(lower, 4, 1))
        >= profile.price(sites, Mixture(higher, 4, 1))
        >= 0
    )
    assert profile.price(sites, Mixture(0.01, 4, 1)) > profile.price(sites, Mixture(0.99, 4, 1)) > 0


@pytest.mark.parametrize("price", PRICES)
@pytest.mark.parametrize("task", TASKS)
def test_more_than_all_parameters_cost_nothing(price: str, task: str) -> None:
    assert PROFILES[price, task].price([0, 1], Mixture(2.0, 4, 1)) <= 0


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


@pytest.mark.parametrize(
    "price", ["as shipped", "all weights alike", "missing parameters", "reuse"]
)
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
    assert PROFILES["as shipped", task].price(sites, Mixture(share, 4, 1)) == shipped.price(
        sites, Mixture(share, 4, 1)
    )
    spelled_out = assume(task, role_factors=ROLE_FACTORS, unlike=UNLIKE, growth=0.5)
    assert spelled_out.price(sites, Mixture(share, 4, 1)) == shipped.price(
        sites, Mixture(share, 4, 1)
    )


def price_of(
    price: str,
    task: str,
    sites: Sequence[int],
    share: float = 0.5,
    templates: int = 4,
    parts: float = 2.0,
) -> float:
    profile: Profile = PROFILES[price, task]
    return profile.price(sites, Mixture(share, templates, parts))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("part", ["reuse", "rank", "parts", "distance in depth"])
@given(data=st.data(), share=shares)
def test_each_part_adds_to_the_price(
    task: str, part: str, data: st.DataObject, share: float
) -> None:
    sites = data.draw(sites_of(task))
    free, shipped, double = (
        price_of(price, task, sites, share)
        for price in (f"no price of {part}", "as shipped", f"double price of {part}")
    )
    assert double - shipped == pytest.approx(shipped - free, abs=1e-8)
    assert free <= shipped


@pytest.mark.parametrize("task", TASKS)
@given(data=st.data(), share=shares)
def test_unlike_weights_cost_more_if_a_factor_is_all_that_tells_them_apart(
    task: str, data: st.DataObject, share: float
) -> None:
    sites = data.draw(sites_of(task))
    for templates, parts in ((1, 1.0), (2, 1.0), (4, 3.0)):
        free, shipped = (
            price_of(price, task, sites, share, templates, parts)
            for price in ("no price of a factor only", "as shipped")
        )
        added = shipped - free
        if (templates, parts) == (1, 1.0):
            first = added
        assert added == pytest.approx(first / (templates * parts) ** 2, abs=1e-8)
    assert (first > 1e-7) == (len(sites) > 1)


@pytest.mark.parametrize(
    ("price", "role"),
    [
        ("writers cost double", "residual_writer"),
        ("readers cost double", "residual_reader"),
        ("projections cost double", "parallel_projection"),
    ],
)
def test_a_role_costs_double_next_to_one_whose_factor_is_1(price: str, role: str) -> None:
    inventory, (other,) = INVENTORIES["characters"], number_of("characters", "head")
    for site in number_of("characters", role):
        doubled, shipped = (
            PROFILES[each, "characters"].importance[site]
            / PROFILES[each, "characters"].importance[other]
            for each in (price, "as shipped")
        )
        assert doubled / shipped == pytest.approx(2 / ROLE_FACTORS[inventory.sites[site].role])


@pytest.mark.parametrize(
    ("price", "growth"),
    [("all weights matter alike", 0.0), ("weights matter by their size", 1.0)],
)
def test_how_much_size_matters(price: str, growth: float) -> None:
    for task, inventory in INVENTORIES.items():
        expected = [ROLE_FACTORS[site.role] * site.numel**growth for site in inventory.sites]
        found = PROFILES[price, task].importance
        assert found == pytest.approx([each / sum(expected) for each in expected])


@pytest.mark.parametrize("task", TASKS)
def test_where_all_are_alike_only_depth_tells_weights_apart(task: str) -> None:
    profile = PROFILES["all weights alike", task]
    assert isinstance(profile, StructureProfile)
    assert (profile.distance == abs(profile.depth[:, None] - profile.depth)).all()
    assert profile.distance.max() == 1


def test_eigenvalues_find_templates_for_what_is_alike() -> None:
    """Weights of one role and shape, near to each other, cost less than weights of any."""
    sites = INVENTORIES["characters"].sites
    up = [k for k, site in enumerate(sites) if site.name.endswith("up.weight")]
    down = [k for k, site in enumerate(sites) if site.name.endswith("down.weight")]
    price = "eigenvalues of likeness"
    same = price_of(price, "characters", up[:2]) + price_of(price, "characters", down[:2])
    mixed = sum(price_of(price, "characters", [up[k], down[k]]) for k in range(2))
    assert same < mixed
    near, far = price_of(price, "characters", up[:2]), price_of(price, "characters", up[::2])
    assert near < far


def test_no_two_prices_are_the_same() -> None:
    sites = range(len(INVENTORIES["characters"].sites))
    parts = [list(sites[:5]), list(sites[3:12]), list(sites[8:]), [2, 5], [2], [4]]
    priced = {
        price: tuple(
            price_of(price, "characters", part, share, templates)
            for part in parts
            for share, templates in ((0.3, 4), (0.02, 1))
        )
        for price in PRICES
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
        by_numel.setdefault(site.numel, set()).add(profile.price([k], Mixture(0.3, 4, 1)))
    assert all(len(prices) == 1 for prices in by_numel.values())


def test_a_described_bank_has_the_price_of_its_generator() -> None:
    inventory, profile = INVENTORIES["characters"], PROFILES["as shipped", "characters"]
    members = number_of("characters", "parallel_projection")[:2]
    shape = inventory.sites[members[0]].shape
    assert all(inventory.sites[k].shape == shape for k in members)
    numel, rank = math.prod(shape), 2
    described = json.dumps([[members, "recursive", 1, numel, 0, rank]])
    owned = numel + 2 + 2 * rank * sum(shape)  # with two coefficients
    expected = profile.price(members, Mixture(owned / (2 * numel), 2, 1))
    assert price_plan(profile, inventory, described) == pytest.approx(expected, rel=1e-12)
    tied = json.dumps([[members, "tied", 1, numel, 0]])
    assert price_plan(profile, inventory, tied) > expected
