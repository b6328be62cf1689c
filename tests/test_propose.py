"""Candidates: families of sites, times generators, times sizes."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

import npas_fx
from models import GPT, MODELS
from npas_fx.generators import GENERATORS
from npas_fx.generators.generator import num_parameters
from npas_fx.ir import Candidate
from npas_fx.passes.capture import capture
from npas_fx.propose import propose
from npas_fx.rules import Rules, apply_rules
from pricers import pricer_of
from quality.models import Decoder
from strategies import networks


def candidates_of(rules: Rules, *, above: bool = False) -> tuple[Candidate, ...]:
    return propose(pricer_of(rules, above=above))


def by_sites(candidates: tuple[Candidate, ...]) -> dict[tuple[int, ...], list[Candidate]]:
    found = defaultdict(list)
    for candidate in candidates:
        found[candidate.sites].append(candidate)
    return found


@given(spec=networks(), above=st.booleans())
def test_candidates_are_what_they_say(spec, above):
    rules = apply_rules(capture(spec.build()).inventory)
    sites = rules.inventory.sites
    found = by_sites(candidates_of(rules, above=above))
    for members, rivals in found.items():
        assert list(members) == sorted(set(members))
        assert len({(sites[k].dtype, sites[k].device) for k in members}) == 1
        shapes = [sites[k].shape for k in members]
        for candidate in rivals:
            generator = GENERATORS[candidate.generator]
            assert candidate.parameters == num_parameters(generator, shapes, candidate.size)
            assert candidate.bytes == candidate.parameters * sites[members[0]].dtype.itemsize
            assert (candidate.price == 0) == (candidate.generator == "dedicated")
            assert above or candidate.price >= 0
            if candidate.generator == "tied":
                assert len(set(shapes)) == 1
            if candidate.generator == "dedicated":
                assert candidate.parameters == sites[members[0]].numel
        prices = [c.price for c in sorted(rivals, key=lambda c: c.parameters)]
        assert all(a > b for a, b in pairwise(prices))  # none is beaten
    for k in range(len(sites)):  # so any budget of the model's size or more can be met
        assert "dedicated" in {candidate.generator for candidate in found[k,]}


@given(spec=networks(), seed=st.integers(0, 99))
def test_private_sites_are_dedicated_and_groups_are_whole(spec, seed):
    inventory = capture(spec.build()).inventory
    names = [site.name for site in inventory.sites if site.dtype == inventory.sites[0].dtype]
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    private, group = [names[k] for k in order[:1]], [names[k] for k in order[1:4]]
    rules = apply_rules(inventory, keep_private=private or None, same_bank=[group])
    found = by_sites(candidates_of(rules, above=seed % 2 == 0))
    index = {site.name: k for k, site in enumerate(inventory.sites)}
    members = {index[name] for name in group}
    for sites, rivals in found.items():
        if len(members) > 1:
            assert not members.intersection(sites) or members.issubset(sites)
        if index[private[0]] in sites:
            assert sites == (index[private[0]],)
            assert [candidate.generator for candidate in rivals] == ["dedicated"]
    assert {k for sites in found for k in sites} == set(range(len(inventory.sites)))


def test_families_of_a_language_model():
    inventory = capture(GPT(depth=4)).inventory
    found = by_sites(candidates_of(apply_rules(inventory)))
    sites = inventory.sites
    everything = set(range(len(sites)))
    assert tuple(sorted(everything)) in found
    for key in (lambda s: s.shape, lambda s: s.role, lambda s: (s.role, s.shape)):
        for value in {key(site) for site in sites}:
            assert tuple(k for k, site in enumerate(sites) if key(site) == value) in found
    up = [k for k, site in enumerate(sites) if site.name.endswith("c_fc.weight")]
    assert len(up) == 4
    for start in range(3):  # runs of neighbours in depth
        assert tuple(up[start : start + 2]) in found
    generators = {c.generator for c in found[tuple(up)]}
    assert {"tied", "wavg"} <= generators


def test_the_same_place_in_all_blocks_is_a_family():
    inventory = npas_fx.inspect(Decoder(11, width=8, depth=5, num_heads=2, context=8))
    found = by_sites(candidates_of(apply_rules(inventory)))
    (repeats,) = inventory.repeats
    for place in zip(*repeats.sites, strict=True):
        members = [k for k, site in enumerate(inventory.sites) if site.name in place]
        assert tuple(members) in found
        assert tuple(members[1:3]) in found


def test_larger_banks_are_proposed_only_above_the_models_size():
    rules = apply_rules(capture(MODELS["mlp"].make()).inventory)
    sites = rules.inventory.sites

    def owned(candidate: Candidate) -> float:
        numel = sum(sites[k].numel for k in candidate.sites)
        return candidate.size.num_templates * candidate.size.template_size / numel

    assert max(map(owned, candidates_of(rules))) <= 1
    above = candidates_of(rules, above=True)
    assert max(map(owned, above)) > 1
    assert all((c.price < 0) == (owned(c) > 1) for c in above)


def test_an_inventory_without_sites_has_no_candidates():
    rules = apply_rules(capture(torch.nn.LayerNorm(4)).inventory)
    assert candidates_of(rules) == ()
