"""Plans as data."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npas_fx import Budget, Plan, PlanError
from npas_fx.ir import BankPlan, Certificate, Size

NAMES = st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=6)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans of any names, generators and numbers that add up."""
    names = draw(st.lists(NAMES, unique=True, max_size=8))
    cut = draw(st.integers(0, len(names)))
    counts = st.integers(0, 10**12)
    banks, left = [], names[:cut]
    while left:
        size = draw(st.integers(1, len(left)))
        sites, left = left[:size], left[size:]
        banks.append(
            BankPlan(
                sites=tuple(sites),
                generator=draw(st.sampled_from(("dedicated", "tied", "wavg", "mine"))),
                size=Size(
                    num_templates=draw(st.integers(1, 9)),
                    template_size=draw(st.integers(1, 10**9)),
                    num_partial=draw(st.integers(0, 10**6)),
                ),
                parameters=draw(counts),
                bytes=draw(counts),
            )
        )
    kept = {name: draw(NAMES) for name in names[cut:]}
    kept_parameters, kept_bytes = draw(counts), draw(counts)
    objective = draw(st.floats(-1e9, 1e9))
    certificate = Certificate(
        objective=objective,
        bound=objective - draw(st.floats(0, 1e9)),
        gap=draw(st.floats(0, 1)),
        status=draw(st.sampled_from(("optimal", "feasible"))),
        seconds=draw(st.none() | st.floats(0, 100)),
        candidates=draw(st.integers(0, 10**6)),
        scope=draw(st.text(max_size=9)),
    )
    amount = draw(st.integers(1, 10**15))
    return Plan(
        budget=draw(st.sampled_from((Budget(parameters=amount), Budget(bytes=amount)))),
        parameters=kept_parameters + sum(bank.parameters for bank in banks),
        bytes=kept_bytes + sum(bank.bytes for bank in banks),
        banks=tuple(banks),
        kept=kept,
        kept_parameters=kept_parameters,
        kept_bytes=kept_bytes,
        model_parameters=draw(counts),
        site_parameters=draw(counts),
        fresh_parameters=draw(counts),
        certificate=draw(st.sampled_from((certificate, None))),
    )


@given(plans())
def test_json_both_ways(plan):
    text = plan.to_json()
    back = Plan.from_json(text)
    assert back == plan
    assert back.to_json() == text
    if back.certificate is not None:
        assert back.certificate.seconds is None
        assert "seconds" not in text.partition('"certificate"')[2].partition("}")[0]


@given(plans())
def test_it_prints(plan):
    text = str(plan)
    assert f"{plan.parameters:,}" in text
    assert str(plan.budget) in text


def example() -> Plan:
    return Plan(
        budget=Budget(parameters=10),
        parameters=9,
        bytes=36,
        banks=(
            BankPlan(
                sites=("a", "b"),
                generator="tied",
                size=Size(num_templates=1, template_size=4),
                parameters=6,
                bytes=24,
            ),
        ),
        kept={"c": "bias"},
        kept_parameters=3,
        kept_bytes=12,
        model_parameters=11,
        site_parameters=8,
        fresh_parameters=8,
        certificate=None,
    )


@pytest.mark.parametrize(
    ("size", "printed"),
    [
        (Size(num_templates=1, template_size=4), "1 x 4 "),
        (Size(num_templates=2, template_size=3), "2 x 3 "),
        (Size(num_templates=3, template_size=4), "3 of up to 4 "),  # some are shorter
        (Size(num_templates=1, template_size=4, num_partial=1), "1 x 4 + 1 "),
        (Size(num_templates=3, template_size=2, num_partial=1), "3 of up to 2 + 1 "),
        (Size(num_templates=1, template_size=2, num_partial=1, rank=2), "1 x 2 + 1, rank 2 "),
    ],
)
def test_printed_templates_are_no_more_than_the_parameters(size: Size, printed: str) -> None:
    plan = example()
    assert f" {printed}" in str(replace(plan, banks=(replace(plan.banks[0], size=size),)))


def edited(**fields: object) -> str:
    return json.dumps({**json.loads(example().to_json()), **fields})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "file"),
        ("{", "file"),
        ("[]", "file"),
        (edited(parameters="9"), "parameters"),
        (edited(parameters=9.0), "parameters"),
        (edited(parameters=8), "add up to 9"),
        (edited(bytes=8), "add up to 36"),
        (edited(banks=None), "banks"),
        (edited(version=0), "version"),
        (edited(budget={"parameters": 10, "bytes": 1}), "not both"),
        (edited(budget={"parameters": -1}), "at least 1"),
        (edited(kept={"a": "bias", "c": "bias"}), "'a' stands in the plan more than once"),
        (edited(mistake=1), "mistake"),
    ],
)
def test_what_is_no_plan_is_refused_with_the_place(text, why):
    with pytest.raises(PlanError, match=why):
        Plan.from_json(text)


@pytest.mark.parametrize("field", json.loads(example().to_json()))
def test_no_field_may_be_missing(field):
    data = json.loads(example().to_json())
    del data[field]
    if field == "version":
        assert Plan.from_json(json.dumps(data)) == example()
        return
    with pytest.raises(PlanError, match=field):
        Plan.from_json(json.dumps(data))


def test_it_is_a_value():
    plan = example()
    with pytest.raises(FrozenInstanceError):
        plan.parameters = 1
    assert plan == replace(plan)
    assert plan != replace(plan, fresh_parameters=0)
