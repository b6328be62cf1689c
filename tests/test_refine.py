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


@settings(max_examples=10)
@given(spec=networks(), share=st.sampled_from([0.3, 0.6]), most=st.sampled_from([None, 1, 3]))
def test_no_candidate_of_the_list_is_worth_more_than_the_relaxation_pays(spec, share, most):
    rules = apply_rules(capture(spec.build()).inventory)
    sites = rules.inventory.sites
    pricer = pricer_of(rules)
    amount = int(share * sum(site.numel for site in sites))
    refined = refine(
        propose(pricer),
        pricer,
        lambda given: price_sites(problem_of(given, len(sites), most), [amount]),
        rounds=3,
    )
    (pricing,) = refined.pricings
    if pricing is None:
        return
    priced = refined.candidates
    if refined.rounds == 3:  # the last round added some after the last pricing
        (pricing,) = price_sites(problem_of(priced, len(sites), most), [amount])
    incidence = Incidence.of([candidate.sites for candidate in priced])
    worth = incidence.total(np.array(pricing.site_value)).astype(np.float64)
    reduced = _reduced_costs(priced, worth, pricing)
    tolerance = 1e-6 * max(abs(pricing.price), 1e-3)
    assert reduced.min() >= -tolerance
    assert reduced[list(pricing.taken)] == pytest.approx(0.0, abs=tolerance)
    named = {(c.sites, c.generator, c.size) for c in priced}
    assert len(named) == len(priced)  # each once


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


def test_weights_that_rules_keep_apart_are_not_merged():
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4)))
    rules = apply_rules(capture(model).inventory, different_bank=[["0.weight", "3.weight"]])
    changed = _changed([(0, 1), (2, 3)], pricer_of(rules))
    assert (0, 1, 2) in changed
    assert not any({0, 3} <= set(members) for members in changed)
