"""Candidates that reduced costs ask for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from npas_fx.passes.capture import capture
from npas_fx.propose import propose
from npas_fx.refine import _changed, _reduced_costs, refine
from npas_fx.rules import apply_rules
from npas_fx.solvers.pricing import price_sites
from npas_fx.solvers.problem import Incidence, PlanningProblem
from pricers import pricer_of
from strategies import networks


def problem_of(candidates, num_sites, max_banks=None):
    return PlanningProblem(
        num_sites=num_sites,
        members=tuple(candidate.sites for candidate in candidates),
        price=tuple(candidate.price for candidate in candidates),
        cost={"parameters": tuple(candidate.parameters for candidate in candidates)},
        budget={"parameters": sum(candidate.parameters for candidate in candidates)},
        max_banks=max_banks,
    )


def check_prices(model, share, most):
    """Refine; of the final list nothing has a negative reduced cost, and what is taken has none."""
    rules = apply_rules(capture(model).inventory)
    num_sites = len(rules.inventory.sites)
    pricer = pricer_of(rules)
    amount = int(share * sum(site.numel for site in rules.inventory.sites))

    def price(given):
        return price_sites(problem_of(given, num_sites, most), [amount])

    refined = refine(propose(pricer), pricer, price, rounds=3)
    named = {(c.sites, c.generator, c.size) for c in refined.candidates}
    assert len(named) == len(refined.candidates)  # each once
    (pricing,) = price(refined.candidates)
    if pricing is not None:
        incidence = Incidence.of([candidate.sites for candidate in refined.candidates])
        worth = incidence.total(np.array(pricing.site_value)).astype(np.float64)
        reduced = _reduced_costs(refined.candidates, worth, pricing)
        tolerance = 1e-6 * max(abs(pricing.price), 1e-3)
        assert reduced.min() >= -tolerance
        assert reduced[list(pricing.taken)] == pytest.approx(0.0, abs=tolerance)
    return pricing


@settings(max_examples=10)
@given(spec=networks(), share=st.sampled_from([0.3, 0.6]))
def test_no_candidate_of_the_list_is_worth_more_than_it_costs(spec, share):
    check_prices(spec.build(), share, None)


def test_nor_where_there_may_be_few_banks():
    model = nn.Sequential(*(nn.Linear(n, n, bias=False) for n in (8, 8, 8, 6, 6, 6)))
    pricing = check_prices(model, 0.6, 1)
    assert pricing is not None
    assert pricing.shadow_price["max_banks"] > 0


def test_banks_are_merged_split_enlarged_and_made_smaller():
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(6)))
    pricer = pricer_of(apply_rules(capture(model).inventory))
    changed = _changed([(0, 1, 2), (3, 4, 5)], pricer)
    assert (0, 1, 2, 3, 4, 5) in changed  # both
    assert (0, 1, 2, 3) in changed  # and one that is near
    assert (0, 1) in changed  # without one
    assert (1, 2) in changed
    assert {(0,), (3,)} <= changed  # the first half by depth, and below the other
    assert {(1, 2), (4, 5)} <= changed
    assert () not in changed


def test_any_one_of_equals_may_leave_its_bank():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8)) for _ in range(5)))
    inventory = capture(model).inventory
    number = {site.name: k for k, site in enumerate(inventory.sites)}
    bank = tuple(number[f"{block}.0.weight"] for block in (1, 2, 3))
    changed = _changed([bank], pricer_of(apply_rules(inventory)))
    assert {bank[:2], bank[1:], (bank[0], bank[2])} <= changed


def test_weights_that_rules_keep_apart_are_not_merged():
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4)))
    rules = apply_rules(capture(model).inventory, different_bank=[["0.weight", "3.weight"]])
    changed = _changed([(0, 1), (2, 3)], pricer_of(rules))
    assert (0, 1, 2) in changed
    assert not any({0, 3} <= set(members) for members in changed)
