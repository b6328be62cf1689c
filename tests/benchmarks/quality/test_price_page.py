from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

import npas_fx
from finished_runs import make_row
from quality import correlations
from quality.models import Decoder
from quality.plans import Drawn, describe_plan
from quality.price_page import write_prices
from quality.prices import PRICES, price_plan


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(correlations, "NUM_RESAMPLES", 100)


@cache
def draw_plans():
    model = Decoder(5, width=8, depth=2, num_heads=2, context=4)
    inventory = npas_fx.inspect(model)
    plans = [
        npas_fx.plan(model, 0.4, profile=lambda each, draw=draw: Drawn(each, draw))
        for draw in range(6)
    ]
    return inventory, [describe_plan(plan, inventory) for plan in plans]


def make_rows(sign: float):
    """Plans whose loss is the price that ships, times a sign."""
    inventory, plans = draw_plans()
    profile = PRICES["as shipped"](inventory)
    rows = []
    for draw, described in enumerate(plans):
        loss = sign * price_plan(profile, inventory, described)
        row = make_row("random_plan", 0.4, draw, loss, study="prices", task="characters")
        rows.append(replace(row, result=replace(row.result, plan=described)))
    return rows, {("characters", "small"): inventory}


def find_line(page: str, name: str) -> list[str]:
    line = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_page_says_which_prices_rank_plans_as_training_does():
    page = write_prices(*make_rows(1.0), command="the command")
    assert "`the command`" in page
    assert "6 plans at 40 %; 1200 steps each." in page
    assert find_line(page, "as shipped")[1:] == ["+1.00", "+1.00 to +1.00", "positive"]
    missing = find_line(page, "missing parameters")  # the same for all plans of one budget
    assert missing[3] == "nothing: zero is included"


def test_page_says_which_prices_rank_plans_the_other_way():
    page = write_prices(*make_rows(-1.0), command="the command")
    assert find_line(page, "as shipped")[3] == "negative"


def test_page_has_a_line_for_each_price_and_each_role_that_varies():
    rows, inventories = make_rows(1.0)
    page = write_prices(rows, inventories, command="the command")
    assert all(f"| {name} |" in page for name in PRICES)
    assert find_line(page, "residual_writer")[1][0] in "+-"
