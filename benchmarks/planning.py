"""Time planning: made-up networks of up to 10,000 weights by every solver, and real models.

    python benchmarks/planning.py --write docs/benchmarks/planning.md
    python benchmarks/planning.py --sizes 600 --solvers cp_sat greedy --models gpt2 --repeats 1

Each time is given in seconds and as a multiple of one fixed solve by HiGHS, repeated before and
after each measurement, so that what slows the machine down for a while hits both alike. Seconds
and multiples are medians over the repetitions, gaps are the largest of them.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from npas_fx.solvers import SOLVERS, Solver, highs
from planning_instances.measure import FixedSolve, Planned, Solved, plan_model, solve_instance
from planning_instances.page import DEFAULT, write_page
from planning_instances.seeded import make_instance

SIZES = (600, 2_000, 10_000)
BUDGETS = (0.05, 0.1, 0.25, 0.5, 0.9)
MODELS = ("resnet50", "vit_base_patch16_224", "densenet121", "gpt2", "llama_70b")
FIXED_SITES, FIXED_BUDGET = 600, 0.25
WARM_SITES = 30
# HiGHS is there to check the others, and takes minutes where they take seconds.
HIGHS_SITES, HIGHS_SECONDS = 600, 60.0
HIGHS_REMARK = f"highs solves networks of up to {HIGHS_SITES} weights, within {HIGHS_SECONDS:g} s."


def main() -> None:
    """Print the page, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="numbers of weights")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    parser.add_argument(
        "--models", nargs="*", default=MODELS, help="gpt2, llama_70b or names of timm's models"
    )
    parser.add_argument("--repeats", type=int, default=3, help="repetitions for each figure")
    parser.add_argument("--seed", type=int, default=0, help="of the made-up networks")
    parser.add_argument("--write", type=Path, help="file to write the page to, as Markdown")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("there must be at least one repetition")
    if args.write is not None and not args.write.parent.is_dir():
        parser.error(f"there is no folder {args.write.parent}")  # now, not an hour later
    fixed = FixedSolve(
        make_instance(FIXED_SITES, args.seed).problem(FIXED_BUDGET),
        what=f"the linear relaxation of the network of {FIXED_SITES} weights at {FIXED_BUDGET:.0%}",
    )
    _warm_up(args.solvers)
    solved: list[Solved] = []
    planned: list[Planned] = []
    for num_sites in args.sizes:
        solved.append(
            solve_instance(
                num_sites,
                args.seed,
                args.budgets,
                _solvers(args.solvers, num_sites),
                repeats=args.repeats,
                with_frontier=DEFAULT in args.solvers,
                fixed=fixed,
            )
        )
        _write(args, solved, planned, fixed)
    for name in args.models:
        planned.append(plan_model(name, args.budgets, repeats=args.repeats, fixed=fixed))
        _write(args, solved, planned, fixed)
    print(_page(args, solved, planned, fixed))


def _warm_up(names: Sequence[str]) -> None:
    """Import what is imported when first used."""
    problem = make_instance(WARM_SITES, 0).problem(FIXED_BUDGET)
    for select in _solvers(names, WARM_SITES).values():
        select(problem)


def _solvers(names: Sequence[str], num_sites: int) -> dict[str, Solver]:
    """Those that a network of this size is solved by, within their limits."""
    limited = SOLVERS | {"highs": partial(highs.select, seconds=HIGHS_SECONDS)}
    return {name: limited[name] for name in names if name != "highs" or num_sites <= HIGHS_SITES}


def _write(
    args: argparse.Namespace,
    solved: Sequence[Solved],
    planned: Sequence[Planned],
    fixed: FixedSolve,
) -> None:
    """After each network and model: the next one may fail."""
    if args.write is not None:
        page = _page(args, solved, planned, fixed)
        args.write.write_text(f"{page}\n", encoding="utf-8")


def _page(
    args: argparse.Namespace,
    solved: Sequence[Solved],
    planned: Sequence[Planned],
    fixed: FixedSolve,
) -> str:
    return write_page(
        solved,
        planned,
        command=shlex.join(["python", "benchmarks/planning.py", *sys.argv[1:]]),
        repeats=args.repeats,
        remark=HIGHS_REMARK if "highs" in args.solvers else "",
        fixed=fixed,
    )


if __name__ == "__main__":
    main()
