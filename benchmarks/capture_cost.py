"""Measure what capture costs for each node of a graph, and next to torch.fx and a call.

    python benchmarks/capture_cost.py --write docs/benchmarks/capture_cost.md

Each repetition captures a model of the zoo with an example, calls it plainly in both modes, and
traces it with ``torch.fx.symbolic_trace`` where that works, one after the other on one thread.
Multiples are medians of the ratios in each repetition.
"""

from __future__ import annotations

import argparse
import copy
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "zoo"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
import torchvision_ops as _before_timm  # isort: skip  # noqa: F401

import torch
from torch import fx, nn

from machine import describe_cpu
from npas_fx.passes.capture import Capture, capture
from zoo_all import find

MODELS = (
    *("torchvision/resnet50", "torchvision/densenet121", "torchvision/googlenet"),
    *("timm/vit_tiny_patch16_224", "timm/swin_tiny_patch4_window7_224", "timm/convnextv2_atto"),
    *("transformers/bert", "transformers/gpt2", "transformers/llama", "transformers/t5"),
)
MOST_MS = 1.2  # for each node, probe and mode
BATCH_SIZE = 2
PROBES = 2  # the example, and one with another number of rows
MODES = 2


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, help="names such as timm/resnet10t")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", type=Path, help="file to write the table to, as Markdown")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "| model | nodes in both modes | ms for each node, probe and mode | within the target "
        "| capture / calls | capture / torch.fx |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    print("\n".join(lines))
    for name in args.models:
        lines.append(_measure(name, args.repeats))
        print(lines[-1], flush=True)
    if args.write is not None:
        args.write.write_text("\n".join([_head(args.repeats), *lines]) + "\n", encoding="utf-8")


def _measure(name: str, repeats: int) -> str:
    case = find(name)
    torch.manual_seed(0)
    model = case.make()
    args, kwargs = case.draw(BATCH_SIZE)
    captured = capture(model, args, kwargs)  # warm
    per_node, to_calls, to_fx = [], [], []
    for _ in range(repeats):
        seconds, captured = _timed(capture, model, args, kwargs)
        called, _ = _timed(_call_in_both_modes, model, args, kwargs)
        traced = _time_fx(model)
        per_node.append(1e3 * seconds / (_num_nodes(captured) * PROBES))
        to_calls.append(seconds / called)
        if traced is not None:
            to_fx.append(seconds / traced)
    ms = median(per_node)
    return (
        f"| {name} | {_num_nodes(captured):,} | {ms:.2f} | {'yes' if ms <= MOST_MS else 'no'} "
        f"| x {median(to_calls):.1f} | {f'x {median(to_fx):.1f}' if to_fx else 'not traced'} |"
    )


def _num_nodes(captured: Capture) -> int:
    """Of the graphs of both modes; one graph for both counts twice, since both were traced."""
    graphs = [mode.graph for mode in captured.modes]
    return sum(len(graph.nodes) for graph in graphs) * (MODES // len(graphs))


def _call_in_both_modes(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for is_training in (True, False):
            copied.train(is_training)(*copy.deepcopy(args), **copy.deepcopy(kwargs))


def _time_fx(model: nn.Module) -> float | None:
    try:
        return _timed(fx.symbolic_trace, copy.deepcopy(model))[0]
    except Exception:  # of any kind: it is not made for all models
        return None


def _timed(run: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run(*args)
    return time.perf_counter() - start, result


def _head(repeats: int) -> str:
    return f"""# What capture costs

`python benchmarks/capture_cost.py --write docs/benchmarks/capture_cost.md`

{describe_cpu()}, one thread; Python {platform.python_version()}, torch {torch.__version__}; medians
of {repeats} repetitions. Capture traces both modes, and lets {PROBES} probes answer what code asks.
The target is {MOST_MS} ms for each node, probe and mode. *Calls* are one plain call in each mode on
the example, with copying the model; *torch.fx* is one `symbolic_trace` in train mode, which asks
nothing. Timings on a shared machine are noisy, the multiples less so than milliseconds.
"""


if __name__ == "__main__":
    main()
