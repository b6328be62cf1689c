"""Prices from structure."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import npas_fx
from models import GPT, MODELS
from npas_fx.ir import Inventory
from npas_fx.passes.capture import capture
from npas_fx.passes.roles import Part
from npas_fx.profiles import structure
from npas_fx.profiles.structure import StructureProfile, profile_structure
from strategies import networks


def profile_of(model: torch.nn.Module) -> StructureProfile:
    return profile_structure(capture(model).inventory)


@given(spec=networks())
def test_the_matrix_is_positive_semidefinite(spec):
    profile = profile_of(spec.build())
    assume(len(profile.importance))
    root = np.sqrt(profile.importance)
    gram = root[:, None] * profile.likeness * root
    assert np.allclose(gram, gram.T)
    assert np.linalg.eigvalsh(gram).min() >= -1e-12
    assert profile.importance.sum() == pytest.approx(1)
    assert np.trace(gram) == pytest.approx(1)


@given(spec=networks())
def test_distances_are_symmetric_and_zero_to_oneself(spec):
    distance = profile_of(spec.build()).distance
    assert np.array_equal(distance, distance.T)
    assert np.allclose(np.diag(distance), 0, atol=1e-7)
    assert (distance >= 0).all()


@given(
    spec=networks(),
    numbers=st.sets(st.integers(0, 20), min_size=1),
    shares=st.tuples(st.floats(1e-6, 12), st.floats(1e-6, 12)),
)
def test_prices_fall_with_the_share_and_only_dedicated_weights_are_free(spec, numbers, shares):
    profile = profile_of(spec.build())
    assume(len(profile.importance))
    sites = sorted({number % len(profile.importance) for number in numbers})
    low, high = sorted(shares)
    prices = {share: profile.price(sites, share) for share in shares}
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
            assert (profile.price([k], share) * 2**32).is_integer()


@pytest.mark.parametrize("name", ["mlp", "residual_cnn", "gpt"])
def test_a_weight_matters_by_its_size_and_the_factor_of_its_role(name):
    sites = capture(MODELS[name].make()).inventory.sites
    profile = profile_of(MODELS[name].make())
    matters = [site.numel * structure.ROLE_FACTORS[site.role] for site in sites]
    assert profile.importance == pytest.approx(np.array(matters) / sum(matters))
    order = sorted(range(len(sites)), key=matters.__getitem__)
    prices = [profile.price([k], 0.5) for k in order]
    assert prices == sorted(prices)


@pytest.mark.parametrize("role", ["head", "residual_writer", "residual_reader"])
def test_the_factor_of_a_role_decides_what_it_is_given_but_exempts_nothing(role, monkeypatch):
    model = MODELS["residual_cnn"].make()
    sizes = {site.name: site.numel for site in npas_fx.inspect(model).sites if site.role == role}
    kept = {}
    for factor in (1e-3, 1e3):
        monkeypatch.setitem(structure.ROLE_FACTORS, role, factor)
        banks = npas_fx.plan(model, 0.4).banks
        own = {name for bank in banks if bank.generator == "dedicated" for name in bank.sites}
        kept[factor] = sum(sizes[name] for name in own & sizes.keys())
        with pytest.raises(npas_fx.InfeasibleBudgetError) as caught:
            npas_fx.plan(model, 1)
        assert npas_fx.plan(model, caught.value.smallest).parameters == caught.value.smallest
    assert kept[1e-3] < kept[1e3]


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
    same = profile.price(up[:2], 0.5) + profile.price(down[:2], 0.5)
    mixed = profile.price([up[0], down[0]], 0.5) + profile.price([up[1], down[1]], 0.5)
    assert same < mixed
    near, far = profile.price(up[:2], 0.5), profile.price([up[0], up[3]], 0.5)
    assert near < far


def test_names_do_not_matter():
    inventory = capture(GPT(depth=2)).inventory
    renamed = Inventory(
        sites=tuple(replace(site, name=f"x{k}") for k, site in enumerate(inventory.sites)), kept=()
    )
    here, there = profile_structure(inventory), profile_structure(renamed)
    assert np.array_equal(here.likeness, there.likeness)
    assert np.array_equal(here.importance, there.importance)


def test_an_inventory_without_sites():
    profile = profile_structure(Inventory(sites=(), kept=()))
    assert profile.distance.shape == (0, 0)
