"""Put every architecture of the zoo through all checks, and write the support matrix.

Each has a process of its own, with limits on time and memory; a crash is a failed row. Rows that
are there are not run again::

    python tests/zoo/run_zoo.py --rows zoo.jsonl --write docs/support.md
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "support")]

Row = dict[str, Any]


def main() -> None:
    """Run what has no row yet, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, required=True, help="JSON lines, one for each model")
    parser.add_argument("--only", nargs="+", help="names such as timm/resnet10t, or libraries")
    parser.add_argument("--write", type=Path, help="the page with the support matrix")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=900, help="of each model")
    parser.add_argument("--gigabytes", type=int, default=12, help="of each model")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run_one(args.one, args.gigabytes)))
        return
    from zoo_all import list_names

    known = read_rows(args.rows)
    wanted = [name for name in list_names() if _is_wanted(name, args.only)]
    missing = [name for name in wanted if name not in known]
    with ThreadPoolExecutor(args.workers) as pool, args.rows.open("a+") as file:
        file.seek(0)
        if not (file.read() or "\n").endswith("\n"):
            print(file=file)  # a line that was cut short
        jobs = pool.map(lambda name: run_apart(name, args.seconds, args.gigabytes), missing)
        for number, row in enumerate(jobs, start=1):
            print(json.dumps(row), file=file, flush=True)
            print(
                f"{number}/{len(missing)} {row['name']}: {row['error'] or 'ok'}"[:160], flush=True
            )
    if args.write:
        args.write.write_text(write_page(read_rows(args.rows), len(list_names())), encoding="utf-8")


def _is_wanted(name: str, only: list[str] | None) -> bool:
    return not only or name in only or name.partition("/")[0] in only


def read_rows(path: Path) -> dict[str, Row]:
    """Name of each model that has a row -> the row."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return {row["name"]: row for row in rows}


def run_apart(name: str, seconds: int, gigabytes: int) -> Row:
    """Run one model in a process of its own."""
    command = [sys.executable, __file__, "--rows", os.devnull, "--one", name]
    command += ["--gigabytes", str(gigabytes)]
    start = time.perf_counter()
    row: Row
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        row = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        row = {"name": name, "error": f"took more than {seconds} s"}
    except (IndexError, ValueError):
        said = done.stderr.strip().splitlines()[-1:] or [f"ended with {done.returncode}"]
        row = {"name": name, "error": said[0][:200]}
    return {
        **row,
        "seconds": round(time.perf_counter() - start),
        "commit": current_commit(),
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
    }


def run_one(name: str, gigabytes: int) -> Row:
    """Run one model here."""
    import torch

    from zoo_all import find
    from zoo_check import check

    torch.set_num_threads(1)
    limit = resource.RLIMIT_DATA
    resource.setrlimit(limit, (gigabytes << 30, resource.getrlimit(limit)[1]))
    try:
        return {"name": name, "error": "", **check(find(name))}
    except Exception as err:
        traceback.print_exc()
        said = str(err).strip().splitlines() or [""]
        return {"name": name, "error": f"{type(err).__name__}: {said[0]}"[:200]}


def current_commit() -> str:
    """The commit of this checkout, shortened."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE, check=True)
    return done.stdout.strip()


def write_page(rows: Mapping[str, Row], total: int) -> str:
    """Write the support matrix of those of ``total`` architectures that have a row."""
    import timm
    import torch
    import torchvision
    import transformers

    commits = sorted({(row["date"], row["commit"]) for row in rows.values()})
    versions = ", ".join(
        f"{module.__name__} {module.__version__}"
        for module in (torch, timm, torchvision, transformers)
    )
    lines = [
        "# Support matrix",
        "",
        "`python tests/zoo/run_zoo.py --rows zoo.jsonl --write docs/support.md`",
        "",
        f"- Python {platform.python_version()}, {versions}",
        f"- {len(rows)} of {total} architectures have been run, at commits "
        + ", ".join(f"{commit} ({date})" for date, commit in commits),
        "",
        "Each architecture, with random weights, is transformed at 30 % and at 150 % of its size "
        "(or at the smallest budget it has), and compared with its own code that is given the "
        "generated weights: outputs and buffers bit for bit, gradients to a thousandth of the "
        "largest, in train and in eval mode, at another batch size than it was captured at. Then a "
        "step of training, saved and loaded, and materialized into its own class. *Generated*: the "
        "share of its parameters that banks can hold. *Opaque*: the share in modules that are "
        "called as they are, in train and in eval mode; their weights are generated all the same.",
        "",
        "| library | architectures | all checks hold | no opaque calls (train, eval) "
        "| mean opaque share (train, eval) | capture, median s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    groups: dict[str, list[Row]] = {}
    for name, row in rows.items():
        groups.setdefault(name.partition("/")[0], []).append(row)
    for library, members in groups.items():
        good = [row for row in members if not row["error"]]
        free = [sum(not row[f"opaque_{mode}"] for row in good) for mode in ("train", "eval")]
        share = [mean(row[f"opaque_{mode}"] for row in good) for mode in ("train", "eval")]
        times = sorted(row["capture_seconds"] for row in good if "capture_seconds" in row)
        lines.append(
            f"| {library} | {len(members)} | {len(good)} | {free[0]}, {free[1]} "
            f"| {share[0]:.3f}, {share[1]:.3f} | {times[len(times) // 2]:.1f} |"
        )
    for library, members in groups.items():
        lines += ["", f"## {library}", ""]
        columns = ("architecture", "parameters", "generated", "opaque, train", "opaque, eval")
        lines.append(f"| {' | '.join((*columns, 'graphs', 'commit'))} | |")
        lines.append("| --- " * 8 + "|")
        lines += [_write_row(row) for row in sorted(members, key=lambda row: row["name"])]
    return "\n".join(lines) + "\n"


def _write_row(row: Row) -> str:
    name = row["name"].partition("/")[2]
    if row["error"]:
        why = row["error"].replace("|", "/")
        return f"| {name} | | | | | | {row['commit']} | fails: {why} |"
    shares = " | ".join(f"{row[key]:.2f}" for key in ("generated", "opaque_train", "opaque_eval"))
    return f"| {name} | {row['parameters']:,} | {shares} | {row['graphs']} | {row['commit']} | |"


if __name__ == "__main__":
    main()
