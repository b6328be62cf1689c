"""Fill: what a selection leaves is spent to the last parameter, and no price rises."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from models import MODELS
from npas_fx.fill import fill
from npas_fx.generators import GENERATORS
from npas_fx.generators.generator import num_parameters
from npas_fx.ir import Candidate
from npas_fx.passes.capture import capture
from npas_fx.profiles.structure import profile_structure
from npas_fx.propose import propose
from npas_fx.rules import Rules, apply_rules
from pricers import pricer_of
from strategies import networks


def spend(rules: Rules, chosen: list[Candidate], left: int, resource: str = "parameters"):
    return fill(
        chosen,
        left,
        resource,
        rules=rules,
        profile=profile_structure(rules.inventory),
        generators=GENERATORS,
    )


def some_cover(rules: Rules, numbers: list[int]) -> list[Candidate]:
    """Any selection, not only good ones."""
    candidates = propose(pricer_of(rules))
    left, chosen = set(range(len(rules.inventory.sites))), []
    while left:
        fitting = [c for c in candidates if min(left) in c.sites and left.issuperset(c.sites)]
        chosen.append(fitting[numbers[len(chosen) % len(numbers)] % len(fitting)])
        left -= set(chosen[-1].sites)
    return chosen


@given(
    spec=networks(),
    numbers=st.lists(st.integers(0, 999), min_size=1, max_size=5),
    left=st.one_of(st.integers(0, 30), st.integers(0, 5000)),
    resource=st.sampled_from(["parameters", "bytes"]),
)
def test_any_integer_is_spent_and_no_price_rises(spec, numbers, left, resource):
    rules = apply_rules(capture(spec.build()).inventory)
    sites = rules.inventory.sites
    assume(sites)
    chosen = some_cover(rules, numbers)
    filled = spend(rules, chosen, left, resource)
    before, after = ({c.sites: c for c in banks} for banks in (chosen, filled))
    assert [c.sites for c in filled] == sorted(before)
    spent = sum(getattr(c, resource) for c in filled) - sum(getattr(c, resource) for c in chosen)
    if resource == "parameters":
        assert spent == left
    else:
        assert left - max(site.dtype.itemsize for site in sites) < spent <= left
    for members, candidate in after.items():
        assert candidate.price <= before[members].price
        generator = GENERATORS[candidate.generator]
        shapes = [sites[k].shape for k in members]
        assert candidate.parameters == num_parameters(generator, shapes, candidate.size)
        assert candidate.bytes == candidate.parameters * sites[members[0]].dtype.itemsize
        largest = max(sites[k].numel for k in members)
        assert 1 <= candidate.size.template_size <= largest


@given(spec=networks(), numbers=st.lists(st.integers(0, 99), min_size=1, max_size=3))
def test_nothing_left_changes_nothing(spec, numbers):
    rules = apply_rules(capture(spec.build()).inventory)
    chosen = some_cover(rules, numbers)
    assert list(spend(rules, chosen, 0)) == sorted(chosen, key=lambda c: c.sites)


def dedicated(rules: Rules) -> list[Candidate]:
    candidates = propose(pricer_of(rules))
    return [c for c in candidates if c.generator == "dedicated"]


@pytest.mark.parametrize("left", [1, 2, 100, 10_000])
def test_where_all_are_dedicated_one_becomes_a_bank(left):
    rules = apply_rules(capture(MODELS["mlp"].make()).inventory)
    filled = spend(rules, dedicated(rules), left)
    assert sum(c.generator != "dedicated" for c in filled) == 1
    assert sum(c.parameters for c in filled) == left + sum(c.parameters for c in dedicated(rules))


def test_private_weights_are_not_touched():
    inventory = capture(MODELS["mlp"].make()).inventory
    rules = apply_rules(inventory, keep_private="*")
    chosen = dedicated(rules)
    assert list(spend(rules, chosen, 50)) == chosen
    rules = apply_rules(inventory, keep_private=["stem.weight", "hidden.*", "*.bias"])
    filled = spend(rules, dedicated(rules), 50)
    assert [c.generator != "dedicated" for c in filled] == [False, False, False, True]


def test_more_is_never_worth_less():
    rules = apply_rules(capture(MODELS["mlp"].make()).inventory)
    chosen = some_cover(rules, [7])
    prices = [sum(c.price for c in spend(rules, chosen, left)) for left in range(0, 1500, 100)]
    assert all(more <= less for less, more in pairwise(prices))
    assert prices[-1] < prices[0]
