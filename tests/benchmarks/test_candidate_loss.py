from __future__ import annotations

from candidate_loss import ask_for_everything, make_chain, measure, write_page
from npas_fx.passes.capture import capture
from npas_fx.planning import make_plan
from npas_fx.rules import apply_rules


def test_no_plan_is_better_than_the_best_of_everything() -> None:
    losses = [loss for seed in range(3) for loss in measure(make_chain(seed), [0.25, 0.5])]
    assert len(losses) == 6
    assert all(loss.loss >= -1e-3 for loss in losses)
    assert all(loss.candidates < loss.everything for loss in losses)


def test_everything_is_every_set() -> None:
    rules = apply_rules(capture(make_chain(0)).inventory)
    number = len(rules.inventory.sites)
    assert len(set(ask_for_everything(rules).members)) == 2**number - 1
    assert make_plan(rules, 0.5).certificate.candidates < len(ask_for_everything(rules).members)


def test_the_page_says_what_was_found() -> None:
    losses = list(measure(make_chain(1), [0.25, 0.5]))
    page = write_page(losses, "python x.py")
    assert "`python x.py`" in page
    assert "| 25% | 1 |" in page
    assert "| all | 2 |" in page
    worst = max(max(loss.loss, 0.0) for loss in losses)
    assert page.endswith(f"| {worst:.2%} |")
