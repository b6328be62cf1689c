"""Prices from structure."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import npas_fx
from models import GPT, MODELS
from npas_fx.ir import Inventory, Mixture
from npas_fx.passes.capture import capture
from npas_fx.passes.roles import Part
from npas_fx.profiles import structure
from npas_fx.profiles.structure import StructureProfile, profile_structure
from quality.models import Decoder
from strategies import networks


def profile_of(model: torch.nn.Module) -> StructureProfile:
    return profile_structure(capture(model).inventory)


@given(spec=networks())
def test_distances_are_symmetric_and_zero_to_oneself(spec):
    profile = profile_of(spec.build())
    assert np.array_equal(profile.distance, profile.distance.T)
    assert (np.diag(profile.distance) == 0).all()
    assert (profile.distance >= 0).all()
    if len(profile.importance):
        assert profile.importance.sum() == pytest.approx(1)


@given(
    spec=networks(),
    numbers=st.sets(st.integers(0, 20), min_size=1),
    shares=st.tuples(st.floats(1e-6, 12), st.floats(1e-6, 12)),
    cut=st.tuples(st.integers(1, 20), st.floats(1, 100)),
)
def test_prices_fall_with_the_share_and_only_dedicated_weights_are_free(spec, numbers, shares, cut):
    profile = profile_of(spec.build())
    assume(len(profile.importance))
    sites = sorted({number % len(profile.importance) for number in numbers})
    low, high = sorted(shares)
    prices = {share: profile.price(sites, Mixture(share, *cut)) for share in shares}
    assert prices[low] >= prices[high]
    for share, price in prices.items():
        assert price > 0 if share < 1 else price < 2**-31 if share == 1 else price < 0
    if low < 0.9 * high and low < 1:
        assert prices[low] > prices[high]


@given(spec=networks())
def test_prices_are_coarse_numbers_that_add_up_exactly(spec):
    profile = profile_of(spec.build())
    for k in range(len(profile.importance)):
        for share in (0.1, 0.37, 1.0, 2.5):
            assert (profile.price([k], Mixture(share, 4, 1.5)) * 2**32).is_integer()


@given(spec=networks(), number=st.integers(0, 20), share=st.floats(1e-4, 0.99))
def test_what_is_shared_loses_reuse_and_rank(spec, number, share):
    model = spec.build()
    sites = capture(model).inventory.sites
    assume(sites)
    number %= len(sites)
    full = min(max(sites[number].shape[0], 1), math.prod(sites[number].shape[1:]))
    assumed = structure.Assumptions()
    lost = assumed.reuse * -math.log(share) + assumed.rank * (share**-0.5 - 1) / full**0.5
    profile = profile_of(model)
    expected = profile.importance[number] * lost
    assert profile.price([number], Mixture(share, 2, 1)) == pytest.approx(
        expected, rel=1e-6, abs=2**-31
    )


@given(spec=networks(), number=st.integers(0, 20), rank=st.integers(1, 8))
def test_a_rank_that_the_generator_limits_costs_as_much_as_it_takes(spec, number, rank):
    model = spec.build()
    sites = capture(model).inventory.sites
    assume(sites)
    number %= len(sites)
    profile, assumed = profile_of(model), structure.Assumptions()
    full = min(max(sites[number].shape[0], 1), math.prod(sites[number].shape[1:]))
    free = profile.price([number], Mixture(1.0, 2, 1))
    allowed = min(rank, full)
    lost = assumed.rank * (allowed**-0.5 - full**-0.5) + assumed.flat * (1 - allowed / full)
    lost *= profile.importance[number]
    limited = profile.price([number], Mixture(1.0, 2, 1, rank))
    assert limited - free == pytest.approx(lost, rel=1e-6, abs=2**-30)
    # Of both limits, that by the number of parameters and this one, the lower rank counts.
    few = Mixture(0.01, 2, 1)
    assert profile.price([number], few._replace(rank=full)) == profile.price([number], few)


def test_a_bank_as_large_as_each_of_its_weights_takes_no_rank():
    inventory = capture(GPT(depth=4)).inventory
    up = [k for k, s in enumerate(inventory.sites) if s.name.endswith("c_fc.weight")]
    free = profile_structure(inventory, structure.Assumptions(rank=0.0))
    priced = profile_structure(inventory)
    assert priced.price(up, Mixture(0.25, 4, 4)) == free.price(up, Mixture(0.25, 4, 4))
    assert priced.price(up, Mixture(0.24, 4, 4)) > free.price(up, Mixture(0.24, 4, 4))


@pytest.mark.parametrize("name", ["mlp", "residual_cnn", "gpt"])
def test_a_weight_matters_by_its_size_and_the_factor_of_its_role(name):
    sites = capture(MODELS[name].make()).inventory.sites
    profile = profile_of(MODELS[name].make())
    matters = [site.numel**0.5 * structure.ROLE_FACTORS[site.role] for site in sites]
    assert profile.importance == pytest.approx(np.array(matters) / sum(matters))


@pytest.mark.parametrize("role", ["head", "residual_writer", "residual_reader"])
def test_the_factor_of_a_role_decides_what_it_is_given_but_exempts_nothing(role, monkeypatch):
    model = MODELS["residual_cnn"].make()
    sites = npas_fx.inspect(model).sites
    numel = {site.name: site.numel for site in sites}
    of_role = {site.name for site in sites if site.role == role}
    given = {}
    for factor in (1e-3, 1e3):
        monkeypatch.setitem(structure.ROLE_FACTORS, role, factor)
        given[factor] = sum(
            bank.parameters * numel[name] / sum(numel[site] for site in bank.sites)
            for bank in npas_fx.plan(model, 0.4).banks
            for name in of_role.intersection(bank.sites)
        )
        with pytest.raises(npas_fx.InfeasibleBudgetError) as caught:
            npas_fx.plan(model, 1)
        assert npas_fx.plan(model, caught.value.smallest).parameters == caught.value.smallest
    assert given[1e-3] < given[1e3]


def test_every_role_has_a_factor():
    documented = re.findall(r"``(\w+)``", Part.__doc__.partition("role:")[2].partition("depth:")[0])
    assert set(documented) == structure.ROLE_FACTORS.keys()


def test_unlike_weights_cost_more_together():
    inventory = capture(GPT(depth=4)).inventory
    profile = profile_structure(inventory)
    up = [k for k, s in enumerate(inventory.sites) if s.name.endswith("c_fc.weight")]
    down = [
        k
        for k, s in enumerate(inventory.sites)
        if s.name.endswith("c_proj.weight") and "attn" not in s.name
    ]
    assert len(up) == len(down) == 4

    def price(*banks, templates=4):
        return sum(profile.price(bank, Mixture(0.5, templates, 1)) for bank in banks)

    assert price(up[:2], down[:2]) < price([up[0], down[0]], [up[1], down[1]])
    assert price(up[:2]) < price([up[0], up[3]])
    # The fewer coefficients each has of its own, the more.
    added = [price(pair, templates=1) - price(pair) for pair in (up[:2], [up[0], down[0]])]
    assert 0 < added[0] < added[1]
    # Parts of a weight are unlike, too.
    assert profile.price(up, Mixture(0.5, 2, 1)) < profile.price(up, Mixture(0.5, 2, 2))


@pytest.mark.parametrize("budget", [1.02, 1.1, 1.4])
@pytest.mark.parametrize(
    "make",
    [
        MODELS["mlp"].make,
        MODELS["residual_cnn"].make,
        lambda: Decoder(65, width=64, depth=4, num_heads=4, context=8),
    ],
)
def test_above_the_models_size_nothing_is_shared_to_make_room(make, budget):
    model = make()
    numel = {site.name: site.numel for site in npas_fx.inspect(model).sites}
    for bank in npas_fx.plan(model, budget).banks:
        assert bank.parameters >= sum(numel[name] for name in bank.sites)


def test_the_place_in_a_block_tells_weights_of_one_role_apart():
    inventory = npas_fx.inspect(Decoder(11, width=8, depth=3, num_heads=2, context=8))
    number = {site.name: k for k, site in enumerate(inventory.sites)}
    query, key, later = (
        number[f"blocks.{block}.{name}.weight"]
        for block, name in ((0, "query"), (0, "key"), (1, "query"))
    )
    assert inventory.sites[query].role == inventory.sites[key].role
    profile = profile_structure(inventory)
    apart = profile.distance - abs(profile.depth[:, None] - profile.depth)
    assert apart[query, key] == pytest.approx(structure.UNLIKE["place"])
    assert apart[query, later] == pytest.approx(0)
    assert 0 < profile.distance[query, later] < profile.distance[key, later]


def test_names_do_not_matter():
    inventory = capture(GPT(depth=2)).inventory
    new = {site.name: f"x{k}" for k, site in enumerate(inventory.sites)}
    renamed = Inventory(
        sites=tuple(replace(site, name=new[site.name]) for site in inventory.sites),
        kept=(),
        repeats=tuple(
            replace(each, sites=tuple(tuple(new[name] for name in b) for b in each.sites))
            for each in inventory.repeats
        ),
    )
    here, there = profile_structure(inventory), profile_structure(renamed)
    assert np.array_equal(here.distance, there.distance)
    assert here.price([0, 1, 2], Mixture(0.3, 2, 1)) == there.price([0, 1, 2], Mixture(0.3, 2, 1))
    assert np.array_equal(here.importance, there.importance)


def test_an_inventory_without_sites():
    profile = profile_structure(Inventory(sites=(), kept=()))
    assert profile.distance.shape == (0, 0)
