"""Budgets: what users write, as an exact amount."""

from __future__ import annotations

import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npas_fx import Budget, BudgetError, InfeasibleBudgetError
from npas_fx.errors import BudgetTypeError

SIZES = st.integers(1, 10**12)


@given(st.integers(1, 10**15), SIZES)
def test_an_int_is_itself_however_it_is_written(amount, size):
    written = (str(amount), f"{amount:_}", f" {amount} ", f"+{amount}")
    for value in (amount, *written, Budget(parameters=amount)):
        assert Budget.parse(value, model_parameters=size) == Budget(parameters=amount)
    assert Budget.parse(np.int64(amount), model_parameters=size) == Budget(parameters=amount)


@given(st.integers(1, 100_000), SIZES)
def test_a_share_is_exact_and_rounded_down(thousandths, size):
    expected = Fraction(thousandths, 1000) * size // 1
    values = (thousandths / 1000, f"{thousandths / 10}%", np.float64(thousandths / 1000))
    for value in values:
        if expected < 1:
            with pytest.raises(BudgetError, match="less than one parameter"):
                Budget.parse(value, model_parameters=size)
        else:
            assert Budget.parse(value, model_parameters=size).parameters == expected


@pytest.mark.parametrize(
    ("unit", "resource", "factor"),
    [
        ("k", "parameters", 10**3),
        ("K", "parameters", 10**3),
        ("M", "parameters", 10**6),
        ("B", "parameters", 10**9),
        ("T", "parameters", 10**12),
        ("KB", "bytes", 10**3),
        ("MB", "bytes", 10**6),
        ("mb", "bytes", 10**6),
        ("GB", "bytes", 10**9),
        ("TB", "bytes", 10**12),
        ("KiB", "bytes", 2**10),
        ("MiB", "bytes", 2**20),
        ("GiB", "bytes", 2**30),
        ("TiB", "bytes", 2**40),
    ],
)
@given(tenths=st.integers(10, 10**6))
def test_units(unit, resource, factor, tenths):
    budget = Budget.parse(f"{tenths / 10}{unit}", model_parameters=5)
    assert budget.resource == resource
    assert budget.amount == tenths * factor // 10
    assert Budget.parse(f"{tenths / 10} {unit}", model_parameters=5) == budget
    assert str(budget) == f"{budget.amount:,} {resource}"


@given(st.text(max_size=8))
def test_any_text_is_a_budget_or_a_budget_error_that_shows_it(text):
    try:
        assert Budget.parse(text, model_parameters=1000).amount >= 1
    except BudgetError as err:
        assert repr(text) in str(err)  # noqa: PT017


@given(
    st.one_of(st.none(), st.booleans(), st.binary(), st.complex_numbers(), st.lists(st.floats()))
)
def test_other_types_are_type_errors(value):
    with pytest.raises(BudgetTypeError) as caught:
        Budget.parse(value, model_parameters=1000)
    assert isinstance(caught.value, TypeError)


@given(st.floats())
def test_any_float_is_a_share_or_a_budget_error(value):
    try:
        amount = Budget.parse(value, model_parameters=1000).parameters
    except BudgetError:
        assert not value * 1000 >= 1 or value == float("inf")
    else:
        assert amount == Fraction(repr(value)) * 1000 // 1


@pytest.mark.parametrize(
    "fields", [{}, {"parameters": 1, "bytes": 1}, {"parameters": 0}, {"bytes": -1}]
)
def test_a_budget_is_one_positive_amount(fields):
    with pytest.raises(BudgetError):
        Budget(**fields)


@pytest.mark.parametrize("amount", [True, 1.5, "3"])
def test_a_budget_is_an_int(amount):
    with pytest.raises(TypeError):
        Budget(parameters=amount)


def test_an_infeasible_budget_error_can_be_pickled():
    error = pickle.loads(pickle.dumps(InfeasibleBudgetError("why", smallest=5)))
    assert str(error) == "why"
    assert error.smallest == 5
