"""Measure what a plan loses because it is chosen from candidates, not from all groups and sizes.

    python benchmarks/candidate_loss.py --write docs/benchmarks/candidate_loss.md

Made-up chains of 5 to 9 linear layers of few widths are planned as ``npas_fx.plan`` does, and then
solved to the end with every set of weights as a bank, in every size that a generator proposes.
"""

from __future__ import annotations

import argparse
import random
import shlex
import sys
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

from torch import nn

from npas_fx.generators import DEFAULT_GENERATORS, GENERATORS
from npas_fx.passes.capture import capture
from npas_fx.planning import make_plan
from npas_fx.profiles.structure import profile_structure
from npas_fx.propose import Pricer
from npas_fx.rules import Rules, apply_rules
from npas_fx.solvers import PlanningProblem, cp_sat
from npas_fx.solvers.rounds import EXACT

BUDGETS = (0.05, 0.1, 0.25, 0.5, 0.9)
WIDTHS = (8, 12, 16, 24, 32, 48)


class Loss(NamedTuple):
    """How much higher the price of a plan is than the best there is, as a share of that."""

    budget: float
    loss: float
    candidates: int
    everything: int


def main() -> None:
    """Print the page, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, default=40, help="how many are made")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--write", type=Path, help="file to write the page to, as Markdown")
    args = parser.parse_args()
    losses = [
        loss for seed in range(args.networks) for loss in measure(make_chain(seed), args.budgets)
    ]
    page = write_page(losses, shlex.join(["python", "benchmarks/candidate_loss.py", *sys.argv[1:]]))
    print(page)
    if args.write is not None:
        args.write.write_text(f"{page}\n", encoding="utf-8")


def make_chain(seed: int) -> nn.Module:
    """Make 5 to 9 linear layers with up to three widths."""
    draw = random.Random(seed)
    widths = [draw.choice(WIDTHS) for _ in range(3)]
    chain = [draw.choice(widths) for _ in range(draw.randint(5, 9) + 1)]
    return nn.Sequential(*[nn.Linear(a, b, bias=False) for a, b in pairwise(chain)])


def measure(model: nn.Module, budgets: Sequence[float]) -> Iterator[Loss]:
    """Compare plans with the best of all, at each budget that can be met."""
    rules = apply_rules(capture(model).inventory)
    problem = ask_for_everything(rules)
    for budget in budgets:
        amount = int(budget * rules.inventory.num_parameters)
        (best,) = cp_sat.select_frontier(problem, [amount], limits=EXACT)
        if best.objective is None:
            continue
        certificate = make_plan(rules, amount).certificate
        assert certificate is not None
        loss = certificate.objective / best.objective - 1 if best.objective else 0.0
        yield Loss(budget, loss, certificate.candidates, len(problem.members))


def ask_for_everything(rules: Rules) -> PlanningProblem:
    """List every set of weights in every size, at any budget."""
    number = len(rules.inventory.sites)
    pricer = Pricer(
        rules=rules,
        profile=profile_structure(rules.inventory),
        generators=tuple(GENERATORS[name] for name in DEFAULT_GENERATORS),
        above=False,
    )
    candidates = [
        candidate
        for length in range(1, number + 1)
        for members in combinations(range(number), length)
        for candidate in pricer.candidates(members, spacing=1.0)
    ]
    cost = tuple(candidate.parameters for candidate in candidates)
    return PlanningProblem(
        num_sites=number,
        members=tuple(candidate.sites for candidate in candidates),
        price=tuple(candidate.price for candidate in candidates),
        cost={"parameters": cost},
        budget={"parameters": sum(cost)},
    )


def write_page(losses: Sequence[Loss], command: str) -> str:
    """Write what was measured as Markdown."""
    rows = [
        "| budget | plans | without loss | median | mean | worst |",
        "|---|---|---|---|---|---|",
    ]
    for budget in sorted({loss.budget for loss in losses}):
        rows.append(_row(f"{budget:.0%}", [loss for loss in losses if loss.budget == budget]))
    rows.append(_row("all", losses))
    return "\n".join(
        [
            "# What plans lose because they are chosen from candidates",
            "",
            f"`{command}`",
            "",
            "Chains of 5 to 9 linear layers of few widths, planned as `npas_fx.plan` does, and "
            "solved to the end with every set of weights as a bank, in every size that a generator "
            "proposes. Loss: how much higher the price of the plan is, before the last parameters "
            "are filled in. The prices are those of the profile `structure`. No time is measured.",
            "",
            f"A plan was chosen from {mean(loss.candidates for loss in losses):,.0f} candidates on "
            f"the mean, out of {mean(loss.everything for loss in losses):,.0f}.",
            "",
            *rows,
        ]
    )


def _row(name: str, losses: Sequence[Loss]) -> str:
    found = [max(loss.loss, 0.0) for loss in losses]
    without = sum(loss < 1e-9 for loss in found)
    return (
        f"| {name} | {len(found)} | {without} | {median(found):.2%} | {mean(found):.2%} | "
        f"{max(found):.2%} |"
    )


if __name__ == "__main__":
    main()
