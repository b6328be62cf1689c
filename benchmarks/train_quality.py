"""Train networks that share parameters, and what one would do by hand, on real data.

    python benchmarks/train_quality.py --data-dir DATA --csv benchmarks/quality/results.csv
    python benchmarks/train_quality.py --data-dir DATA --csv FILE --lists trials --tasks characters

One row of the CSV file for each run; started again, it goes on where it was stopped. `DATA` holds
`tinyshakespeare.txt` and `cifar10-jpeg.tar.xz`. Tables and plots: `report_quality.py`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from threading import Thread

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from quality.data import FILE_OF, DataError, find_file
from quality.execute import execute
from quality.lists import LISTS
from quality.methods import METHODS
from quality.records import Row, Run, append_row, mend, read_rows, unfinished
from quality.tasks import CACHE_DIR

TASKS = tuple(FILE_OF)


def main() -> None:
    """Train what is not trained yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="holds the data")
    parser.add_argument("--csv", type=Path, required=True, help="holds the rows; may not exist yet")
    parser.add_argument("--lists", nargs="+", choices=LISTS, default=["results"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="only these")
    parser.add_argument("--budgets", nargs="+", type=float, help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these")
    parser.add_argument("--most", type=int, help="stop after so many runs")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run, on a CPU")
    parser.add_argument("--device", help="other than the recipe's, such as cuda")
    parser.add_argument(
        "--together", type=int, default=1, help="runs at a time of each worker, for a GPU"
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=CACHE_DIR,
        help="for decoded pictures",
    )
    args = parser.parse_args()
    if not args.csv.parent.is_dir():
        parser.error(f"there is no folder {args.csv.parent}")
    try:
        for task in args.tasks:
            find_file(args.data_dir, FILE_OF[task])
    except DataError as err:
        parser.error(str(err))  # now, not once for each run
    mend(args.csv)
    wanted = [run for name in args.lists for task in args.tasks for run in LISTS[name](task)]
    runs = [run for run in unfinished(wanted, read_rows(args.csv)) if _is_asked(run, args)]
    failed = _train(runs[: args.most], args)
    for run, reason in failed:
        print(f"failed: {run}\n{reason}", file=sys.stderr)
    sys.exit(1 if failed else 0)


def _is_asked(run: Run, args: argparse.Namespace) -> bool:
    return all(
        asked is None or value in asked
        for value, asked in (
            (run.method, args.methods),
            (run.budget, args.budgets),
            (run.seed, args.seeds),
        )
    )


def _train(runs: Sequence[Run], args: argparse.Namespace) -> list[tuple[Run, str]]:
    """Train several at a time, write each as it ends, and return what failed."""
    failed = []
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeRemainingColumn(elapsed_when_finished=True), console=console
    ) as bar:
        progress = bar.add_task("runs", total=len(runs))
        for run, outcome in _execute_all(runs, args):
            if isinstance(outcome, Row):
                append_row(args.csv, outcome)
                result = outcome.result
                said = f"loss {result.valid_loss:.4f}, {result.seconds:.0f} s"
            else:
                failed.append((run, outcome))
                said = f"FAILED: {outcome.splitlines()[-1]}"
            name = f"{run.study} {run.task} {run.method} {run.options} {run.budget:.0%}"
            said = f"{name}, lr {run.lr:g}, seed {run.seed}: {said}"
            console.print(said, markup=False, highlight=False, soft_wrap=True)
            bar.advance(progress)
    return failed


def _execute_all(runs: Sequence[Run], args: argparse.Namespace) -> Iterator[tuple[Run, Row | str]]:
    context = multiprocessing.get_context("spawn")  # a GPU cannot be used after a fork
    with ProcessPoolExecutor(
        args.workers, context, initializer=_start_worker, initargs=(args.threads,)
    ) as pool:
        futures = {
            pool.submit(_try, part, args.data_dir, args.cache_dir, args.device): part
            for part in (
                runs[first : first + args.together] for first in range(0, len(runs), args.together)
            )
        }
        try:
            for future in as_completed(futures):
                yield from zip(futures.pop(future), future.result(), strict=True)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start_worker(num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Workers of a parent that was killed would train on, beside those of the next start."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _try(
    runs: Sequence[Run], data_dir: Path, cache_dir: Path, device: str | None
) -> list[Row | str]:
    return [
        row if isinstance(row, Row) else "".join(traceback.format_exception(row))
        for row in execute(runs, data_dir, cache_dir, device)
    ]


if __name__ == "__main__":
    main()
