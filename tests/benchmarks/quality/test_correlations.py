from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import npas_fx
from npas_fx.ir import Inventory
from quality import correlations
from quality.correlations import BootstrapEstimate, correlate_prices, regress_roles
from quality.prices import PRICES, price_plan
from quality.records import Result, Row, Run
from small_tasks import TASKS, make_model

torch.set_num_threads(1)

INVENTORY: Inventory = npas_fx.inspect(make_model(TASKS["characters"]))
NUMEL = [site.numel for site in INVENTORY.sites]
ROLES = sorted({site.role for site in INVENTORY.sites})
# Of these, plans can lack more than half a percent of the model's parameters.
LARGE = ("parallel_projection", "residual_reader", "residual_writer")
SLOPES = {"parallel_projection": 0.01, "residual_reader": 0.04, "residual_writer": 0.02}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correlations, "NUM_RESAMPLES", 200)
    some = ("as shipped", "missing parameters", "reuse", "logarithm of reuse")
    monkeypatch.setattr(correlations, "PRICES", {name: PRICES[name] for name in some})


@dataclass(frozen=True)
class Made:
    """A plan by hand: each role has one bank that owns a share of its weights."""

    share_of: dict[str, float]

    @property
    def described(self) -> str:
        banks = []
        for role in ROLES:
            sites = [k for k, site in enumerate(INVENTORY.sites) if site.role == role]
            total = sum(NUMEL[k] for k in sites)
            owned = round(self.share_of[role] * total)
            # Half of it in two templates, the other half in a partial one.
            banks.append([sites, "wavg", 2, owned // 4, owned - 2 * (owned // 4)])
        return json.dumps(banks)

    def lacking(self, role: str) -> float:
        """In percent of the weights of the model."""
        of_role = sum(site.numel for site in INVENTORY.sites if site.role == role)
        owned = round(self.share_of[role] * of_role)
        return 100 * (of_role - owned) / sum(NUMEL)


def draw_plans(number: int, seed: int = 0, around: float = 0.4) -> list[Made]:
    random = np.random.default_rng(seed)
    low, high = 0.5 * around, 1.5 * around
    return [Made({role: float(random.uniform(low, high)) for role in ROLES}) for _ in range(number)]


def make_row(described: str, loss: float, budget: float = 0.25) -> Row:
    return Row(
        run=Run(
            study="prices",
            task="characters",
            setting="small",
            method="random_plan",
            budget=budget,
            seed=0,
            steps=1,
            lr=0.1,
            weight_decay=0.0,
        ),
        result=Result(
            parameters=1,
            valid_loss=loss,
            valid_accuracy=0.5,
            test_loss=None,
            test_accuracy=None,
            generation_flops=0,
            step_time=1.0,
            plan=described,
            machine="",
            seconds=1.0,
        ),
    )


def price_by_hand(plan: Made) -> float:
    """The price "missing parameters", in percent."""
    return sum(plan.lacking(role) for role in ROLES)


def make_rows(
    plans: Sequence[Made], loss_of: Callable[[Made], float], budget: float = 0.25
) -> list[Row]:
    return [make_row(plan.described, loss_of(plan), budget) for plan in plans]


def test_a_loss_that_rises_with_a_price_is_ranked_by_it() -> None:
    rows = make_rows(draw_plans(12), lambda plan: np.exp(price_by_hand(plan) / 10))
    found = correlate_prices(rows, INVENTORY)["missing parameters"]
    assert found.value == pytest.approx(1)
    assert found.low == pytest.approx(1)
    assert found.high == pytest.approx(1)
    assert not found.includes_zero


def test_a_loss_that_falls_with_a_price_is_ranked_the_other_way_round() -> None:
    rows = make_rows(draw_plans(12), lambda plan: -(price_by_hand(plan) ** 3))
    found = correlate_prices(rows, INVENTORY)["missing parameters"]
    assert found.value == pytest.approx(-1)
    assert not found.includes_zero


def test_noise_is_not_told_from_no_correlation() -> None:
    random = np.random.default_rng(5)
    plans = draw_plans(30)
    rows = make_rows(plans, lambda plan: random.normal())
    for estimate in correlate_prices(rows, INVENTORY).values():
        assert estimate.low < estimate.value < estimate.high
        assert estimate.includes_zero


def test_intervals_narrow_with_the_number_of_plans() -> None:
    random = np.random.default_rng(1)
    widths = []
    for number in (8, 80):
        rows = make_rows(draw_plans(number), lambda plan: price_by_hand(plan) + random.normal() * 5)
        found = correlate_prices(rows, INVENTORY)["missing parameters"]
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 2


def test_budgets_are_compared_only_within_themselves() -> None:
    # Across budgets both loss and price fall; within each the loss rises as the price falls.
    rows = [
        row
        for budget, around in ((0.1, 0.1), (0.25, 0.3), (0.5, 0.6))
        for row in make_rows(
            draw_plans(10, around=around),
            lambda plan, budget=budget: -price_by_hand(plan) - 1000 * budget,
            budget,
        )
    ]
    assert correlate_prices(rows, INVENTORY)["missing parameters"].value == pytest.approx(-1)


def test_a_difference_between_budgets_alone_is_no_correlation() -> None:
    random = np.random.default_rng(7)
    rows = [
        row
        for budget, around in ((0.1, 0.1), (0.25, 0.3), (0.5, 0.6))
        for row in make_rows(
            draw_plans(20, seed=int(100 * budget), around=around),
            lambda plan, budget=budget: random.normal() - 1000 * budget,
            budget,
        )
    ]
    assert correlate_prices(rows, INVENTORY)["missing parameters"].includes_zero


def test_the_mean_over_budgets_counts_each_budget_once() -> None:
    rows = [
        *make_rows(draw_plans(20), price_by_hand, 0.25),
        *make_rows(draw_plans(5), lambda plan: -price_by_hand(plan), 0.5),
    ]
    found = correlate_prices(rows, INVENTORY)["missing parameters"]
    assert found.value == pytest.approx(0)


def test_budgets_with_two_plans_say_nothing() -> None:
    rows = [
        *make_rows(draw_plans(10), price_by_hand, 0.25),
        *make_rows(draw_plans(2), lambda plan: -price_by_hand(plan), 0.5),
    ]
    assert correlate_prices(rows, INVENTORY)["missing parameters"].value == pytest.approx(1)


def test_a_price_that_is_the_same_for_all_ranks_nothing() -> None:
    (plan,) = draw_plans(1)
    rows = [make_row(plan.described, float(loss)) for loss in range(8)]
    for estimate in correlate_prices(rows, INVENTORY).values():
        assert (estimate.value, estimate.low, estimate.high) == (0, 0, 0)
        assert estimate.includes_zero


def test_plans_of_one_price_are_a_tie_whatever_the_order_of_their_sums() -> None:
    # Each bank owns 1 of 16 parts of what it generates; only the rounding of the sums differs.
    assert all(numel % 16 == 0 for numel in NUMEL)
    random = np.random.default_rng(0)
    rows = []
    for loss in range(20):
        cut = np.array_split(random.permutation(len(NUMEL)), 2 + loss % 5)
        banks = [
            [sorted(map(int, part)), "wavg", 1, sum(NUMEL[k] for k in part) // 16, 0]
            for part in cut
        ]
        rows.append(make_row(json.dumps(banks), float(loss)))
    profile = PRICES["logarithm of reuse"](INVENTORY)
    priced = {price_plan(profile, INVENTORY, row.result.plan) for row in rows}
    assert max(priced) - min(priced) < 1e-12
    assert len(priced) > 1
    found = correlate_prices(rows, INVENTORY)
    assert found["missing parameters"].value == 0
    assert found["logarithm of reuse"].value == 0


def test_prices_are_listed_best_first() -> None:
    rows = make_rows(draw_plans(12), lambda plan: plan.lacking("residual_writer"))
    found = correlate_prices(rows, INVENTORY)
    values = [estimate.value for estimate in found.values()]
    assert values == sorted(values, reverse=True)
    assert found.keys() == correlations.PRICES.keys()


def make_sloped_rows(noise: float = 0.0, budgets: Sequence[float] = (0.25,)) -> list[Row]:
    random = np.random.default_rng(3)

    def loss_of(plan: Made) -> float:
        sloped = sum(SLOPES[role] * plan.lacking(role) for role in LARGE)
        return float(sloped + noise * random.normal())

    return [
        row
        for budget in budgets
        for row in make_rows(
            draw_plans(15, seed=round(100 * budget), around=budget),
            lambda plan, budget=budget: loss_of(plan) - 100 * budget,
            budget,
        )
    ]


def expected_slopes(others: Sequence[str]) -> dict[str, float]:
    slopes = {**SLOPES, **dict.fromkeys(others, 0.0)}
    mean = sum(slopes.values()) / len(slopes)
    return {role: slope - mean for role, slope in slopes.items()}


@pytest.mark.parametrize("budgets", [(0.25,), (0.1, 0.25, 0.5)])
def test_planted_slopes_of_roles_are_found(budgets: tuple[float, ...]) -> None:
    found = regress_roles(make_sloped_rows(budgets=budgets), INVENTORY)
    expected = expected_slopes([role for role in found if role not in SLOPES])
    assert {role: each.value for role, each in found.items()} == pytest.approx(expected, abs=1e-9)
    values = [estimate.value for estimate in found.values()]
    assert values == sorted(values, reverse=True)
    assert next(iter(found)) == "residual_reader"
    assert set(LARGE) <= set(found)


def test_intervals_of_slopes_hold_the_planted_ones() -> None:
    found = regress_roles(make_sloped_rows(0.02, (0.1, 0.25, 0.5)), INVENTORY)
    expected = expected_slopes([role for role in found if role not in SLOPES])
    assert all(each.low < each.value < each.high for each in found.values())
    inside = [found[role].low < slope < found[role].high for role, slope in expected.items()]
    assert sum(inside) >= len(inside) - 1


def test_noise_gives_no_role_a_slope() -> None:
    random = np.random.default_rng(2)
    rows = make_rows(draw_plans(30), lambda plan: random.normal())
    found = regress_roles(rows, INVENTORY)
    assert sum(each.includes_zero for each in found.values()) >= len(found) - 1


def test_roles_that_lack_the_same_in_all_plans_are_left_out() -> None:
    plans = [Made({**plan.share_of, "residual_writer": 0.3}) for plan in draw_plans(12)]
    found = regress_roles(make_rows(plans, price_by_hand), INVENTORY)
    assert "residual_writer" not in found
    assert {"parallel_projection", "residual_reader"} <= set(found)


def test_roles_that_differ_only_between_budgets_are_left_out() -> None:
    rows = [
        row
        for budget in (0.1, 0.5)
        for row in make_rows(
            [
                Made({**plan.share_of, "residual_writer": budget})
                for plan in draw_plans(12, around=budget)
            ],
            price_by_hand,
            budget,
        )
    ]
    assert "residual_writer" not in regress_roles(rows, INVENTORY)


def test_dedicated_weights_lack_nothing() -> None:
    dedicated = json.dumps([[[k], "dedicated", 1, numel, 0] for k, numel in enumerate(NUMEL)])
    # The planted line without anything lacking.
    rows = [*make_sloped_rows(), make_row(dedicated, -100 * 0.25)]
    found = regress_roles(rows, INVENTORY)
    expected = expected_slopes([role for role in found if role not in SLOPES])
    assert {role: each.value for role, each in found.items()} == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0.1, 0.3, False), (-0.1, 0.3, True), (-0.3, -0.1, False)]
)
def test_an_interval_includes_zero_or_not(low: float, high: float, expected: bool) -> None:
    assert BootstrapEstimate(value=(low + high) / 2, low=low, high=high).includes_zero is expected
