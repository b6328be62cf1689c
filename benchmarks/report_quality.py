r"""Write what a CSV file of training runs says: quality against parameters, or another study.

    python benchmarks/report_quality.py results.csv --write docs/benchmarks/quality.md \
        --plot docs/benchmarks/quality
    python benchmarks/report_quality.py results.csv --study coefficients
    python benchmarks/report_quality.py results.csv --study prices --data-dir DATA

The study "results" gives tables of methods by budgets, with a picture for each task and setting
where --plot names a folder (needs matplotlib); the study "prices" says what prices are worth, for
which it needs the plain networks; any other study gives its configurations, best first, or with
--data-dir what prices are worth for its plans. Runs may be missing: the page counts them.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import npas_fx
from npas_fx.ir import Inventory
from quality.grid import make_grids
from quality.price_page import write_prices
from quality.records import Row, read_rows
from quality.tables import write_results, write_study
from quality.tasks import CACHE_DIR, read_task

RESULTS = "results"
PRICES = "prices"


def main() -> None:
    """Print the page, or write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="CSV file that the training wrote")
    parser.add_argument("--study", default=RESULTS)
    parser.add_argument(
        "--data-dir", type=Path, help="as for the training; to say what prices are worth"
    )
    parser.add_argument("--ours", default="ours", help="method to compare each other one with")
    parser.add_argument("--write", type=Path, help="file to write the page to, as Markdown")
    parser.add_argument("--plot", type=Path, help="folder to write the pictures to, as SVG")
    args = parser.parse_args()
    if args.plot is not None and args.study != RESULTS:
        parser.error(f"--plot draws the study {RESULTS!r} only")
    every_row = read_rows(args.results)
    rows = [row for row in every_row if row.run.study == args.study]
    if not rows:
        studies = sorted({row.run.study for row in every_row})
        parser.error(f"{args.results} has no run of study {args.study!r}; its studies: {studies}")
    if args.study == RESULTS:
        plots = _draw(args, rows) if args.plot is not None else {}
        page = write_results(rows, command=_command(args), ours=args.ours, plots=plots)
    elif args.study == PRICES or args.data_dir is not None:
        if args.data_dir is None:
            parser.error("the study of prices needs --data-dir, to make the plain networks")
        rows = [row for row in rows if row.result.plan]
        inventories = _inspect_plain(rows, args.data_dir)
        page = write_prices(rows, inventories, command=_command(args))
    else:
        page = write_study(rows, study=args.study, command=_command(args))
    if args.write is None:
        print(page, end="")
    else:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(page, encoding="utf-8")


def _inspect_plain(rows: Sequence[Row], data_dir: Path) -> dict[tuple[str, str], Inventory]:
    """Task and setting -> inventory of the plain network."""
    inventories = {}
    for name, setting in sorted({(row.run.task, row.run.setting) for row in rows}):
        task = read_task(name, setting, data_dir, CACHE_DIR)
        inventories[name, setting] = npas_fx.inspect(task.make(task.width, task.depth))
    return inventories


def _command(args: argparse.Namespace) -> str:
    words = ["python", "benchmarks/report_quality.py", _shown(args.results)]
    if args.study != RESULTS:
        words += ["--study", args.study]
    if args.data_dir is not None:
        words += ["--data-dir", "DATA"]
    if args.ours != "ours":
        words += ["--ours", args.ours]
    for option in ("write", "plot"):
        if getattr(args, option) is not None:
            words += [f"--{option}", _shown(getattr(args, option))]
    return shlex.join(words)


def _shown(path: Path) -> str:
    """From the current folder; of what lies elsewhere the name, which is all that others have."""
    path = Path(os.path.abspath(path))
    inside = path.is_relative_to(Path.cwd())
    return path.relative_to(Path.cwd()).as_posix() if inside else path.name


def _draw(args: argparse.Namespace, rows: Sequence[Row]) -> dict[tuple[str, str], str]:
    """Task and setting -> the picture's address, seen from the page."""
    from quality.plots import draw  # here, so that tables need no matplotlib

    page_folder = args.write.parent if args.write is not None else Path()
    addresses = {}
    for grid in make_grids(rows, args.ours):
        name = re.sub(r"[^a-z0-9]+", "-", f"{grid.task}-{grid.setting}".lower())
        path = args.plot / f"{name}.svg"
        draw(grid, path)
        addresses[grid.task, grid.setting] = Path(os.path.relpath(path, page_folder)).as_posix()
    return addresses


if __name__ == "__main__":
    main()
