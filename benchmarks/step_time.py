"""Time a training step of a WRN-16-4, plain against transformed, and measure peak memory.

    python benchmarks/step_time.py                      # the table in docs/benchmarks/step_time.md
    python benchmarks/step_time.py --budgets 0.25 --batches 4 --pairs 5

A step is forward, cross entropy, backward and SGD with momentum, on random 32x32 pictures. Plain
and transformed steps alternate; the figure is the median of the pairwise ratios of their times,
with the 95 % interval of that median. Peak memory is that of a process that does nothing but such
steps.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from scipy.stats import binom
from torch import nn
from torch.nn import functional

import npas_fx
from machine import describe_cpu
from npas_fx.examples.wide_resnet import WideResNet

BUDGETS = (0.1, 0.25, 0.5, 1.0, 1.5)
BATCHES = (4, 32)


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--pairs", type=int, default=25, help="interleaved pairs for each figure")
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", type=Path, help="file to write the table to, as Markdown")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of is not None:
        _print_peak_memory(args)
        return
    lines = [
        "| budget | batch | banks | step time / plain | 95 % interval | peak memory / plain |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for batch in args.batches:
        plain_memory = _measure_memory(args, "plain", batch)
        for budget in args.budgets:
            ratio, low, high, banks = _compare(args, budget, batch)
            memory = _measure_memory(args, str(budget), batch) / plain_memory
            lines.append(
                f"| {budget:.0%} | {batch} | {banks} | {ratio:.3f} | {low:.3f} to {high:.3f} "
                f"| {memory:.2f} |"
            )
            print(lines[-1], flush=True)
    if args.write is not None:
        args.write.write_text(_page(args, lines), encoding="utf-8")


def _page(args: argparse.Namespace, lines: list[str]) -> str:
    command = "python benchmarks/step_time.py --write docs/benchmarks/step_time.md"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return (
        f"# Training step of a WRN-{args.depth}-{args.width}, transformed against plain\n\n"
        f"`{command}`\n\n"
        f"{_machine(args.device)}; {versions}; {args.pairs} interleaved pairs for each figure. "
        "Timings on a shared machine are noisy: read the ratio with its interval.\n\n"
        + "\n".join(lines)
        + "\n"
    )


def _machine(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    return f"{describe_cpu()}, {torch.get_num_threads()} threads"


def _build(args: argparse.Namespace, budget: float | None) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = WideResNet(args.depth, args.width)
    if budget is not None:
        model = npas_fx.transform(model, float(budget))
    return model.to(args.device).train()


def _stepper(args: argparse.Namespace, model: nn.Module, batch: int) -> Callable[[], float]:
    """A function that does one training step and returns its seconds."""
    random = torch.Generator().manual_seed(1)
    pictures = torch.randn(batch, 3, 32, 32, generator=random).to(args.device)
    labels = torch.randint(10, (batch,), generator=random).to(args.device)
    # A learning rate that keeps random labels from blowing up; it does not change the work.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> float:
        _synchronize(args.device)
        start = time.perf_counter()
        optimizer.zero_grad()
        functional.cross_entropy(model(pictures), labels).backward()
        optimizer.step()
        _synchronize(args.device)
        return time.perf_counter() - start

    return step


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def _compare(
    args: argparse.Namespace, budget: float, batch: int
) -> tuple[float, float, float, int]:
    """Median ratio of interleaved steps, its 95 % interval, and the number of shared banks."""
    plain, shared = _build(args, None), _build(args, budget)
    steps = _stepper(args, plain, batch), _stepper(args, shared, batch)
    for step in steps * 3:
        step()
    ratios = []
    for pair in range(args.pairs):
        # Alternate which one goes first: the second finds warmer caches.
        first, second = steps if pair % 2 else steps[::-1]
        times = first(), second()
        slow, fast = times if pair % 2 else times[::-1]
        ratios.append(fast / slow)
    ratios.sort()
    # Order statistics between which the median lies with 95 % probability.
    rank = max(int(binom.ppf(0.025, len(ratios), 0.5)) - 1, 0)
    banks = sum(not bank.is_dedicated for bank in npas_fx.plan_of(shared).banks)
    return ratios[len(ratios) // 2], ratios[rank], ratios[-1 - rank], banks


def _measure_memory(args: argparse.Namespace, budget: str, batch: int) -> float:
    """Peak memory of a process of its own, in bytes."""
    command = [sys.executable, __file__, "--memory-of", budget, "--batches", str(batch)]
    for option in ("depth", "width", "device"):
        command += [f"--{option}", str(getattr(args, option))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _print_peak_memory(args: argparse.Namespace) -> None:
    npas_fx.plan(WideResNet(10, 1), 0.5)  # so that the plain process has loaded the solver too
    model = _build(args, None if args.memory_of == "plain" else float(args.memory_of))
    step = _stepper(args, model, args.batches[0])
    for _ in range(3):
        step()
    if args.device == "cpu":
        # Not getrusage: its peak begins with that of the process that started this one.
        status = Path("/proc/self/status").read_text()
        print(1024 * int(status.partition("VmHWM:")[2].split()[0]))
    else:
        print(torch.cuda.max_memory_allocated(args.device))


if __name__ == "__main__":
    main()
