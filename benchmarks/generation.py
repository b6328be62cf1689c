"""Time what banks do, against one product of the same operands, a copy, and the reference.

    python benchmarks/generation.py --write docs/benchmarks/generation.md
    python benchmarks/generation.py --models wrn_16_4 --whole wrn_16_4 --repeats 5

Calls that are compared take turns. A ratio is the median of those of their CPU times, pair by pair,
with the 95 % interval of that median.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from generation_cases.banks import (
    LARGE_BYTES,
    MOST_TEMPLATES,
    REFERENCE_TEMPLATES,
    Case,
    Figure,
    cases_at_half,
    largest_classes,
    make_model,
    measure,
    mixed_cases,
)
from generation_cases.reference import WAYS, Speed, measure_all, shapes_of
from generation_cases.turns import keep_freed_memory
from machine import describe_cpu
from npas_fx.generators.generator import Shapes

MODELS = ("wrn_28_10", "resnet50", "vit_base_patch16_224", "densenet121")
BANK_COLUMNS = ["model", "weights", "bank", "owned MB", "written MB", "ms"]
BANK_COLUMNS += ["/ product", "/ clones"]
MAX_BY_PRODUCT, MAX_BY_CLONE, MIN_SPEEDUP = 1.2, 2.0, 10.0


def main() -> None:
    """Print the page, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", default=MODELS, help="wrn_DEPTH_WIDTH or names of timm's models"
    )
    parser.add_argument("--classes", type=int, default=2, help="largest shapes of each model")
    parser.add_argument("--whole", default="wrn_28_10", help="model whose weights are all mixed")
    parser.add_argument("--repeats", type=int, default=15, help="turns for each figure")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, help="file to write the page to, as Markdown")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("there must be at least one repetition")
    if args.write is not None and not args.write.parent.is_dir():
        parser.error(f"there is no folder {args.write.parent}")  # now, not minutes later
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    classes = [
        (name, shapes)
        for name in args.models
        for shapes in largest_classes(make_model(name), args.classes)
    ]
    smallest = measure(next(mixed_cases("", ((8, 8),) * 7)), args.repeats)
    mixed = _measure_each(mixed_cases, classes, args.repeats)
    at_half = _measure_each(cases_at_half, classes, args.repeats)
    whole = measure_all(shapes_of(make_model(args.whole)), args.repeats)
    command = shlex.join(["python", "benchmarks/generation.py", *sys.argv[1:]])
    page = write_page(smallest, mixed, at_half, whole, command=command, args=args)
    print(page)
    if args.write is not None:
        args.write.write_text(f"{page}\n", encoding="utf-8")


def _measure_each(
    cases_of: Callable[[str, Shapes], Iterator[Case]],
    classes: Sequence[tuple[str, Shapes]],
    repeats: int,
) -> list[Figure]:
    figures = []
    for name, shapes in classes:
        for case in cases_of(name, shapes):
            figures.append(measure(case, repeats))
            print(*_row(figures[-1]), sep=", ", file=sys.stderr, flush=True)
    return figures


def write_page(
    smallest: Figure,
    mixed: Sequence[Figure],
    at_half: Sequence[Figure],
    whole: Mapping[str, Mapping[str, Speed]],
    *,
    command: str,
    args: argparse.Namespace,
) -> str:
    """Write what was measured as Markdown."""
    threads = f"{args.threads} thread{'s' if args.threads > 1 else ''}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return "\n".join(
        [
            "# What generating weights takes",
            "",
            f"`{command}`",
            "",
            f"{describe_cpu()}, {threads}; {versions}; float32, CPU time, {args.repeats} turns for "
            "each figure. Calls that are compared take turns; ratios are medians over the turns, "
            "in brackets the 95 % interval of the median. Times on a shared machine are noisy, "
            "ratios less so. A bank is called as in training, and what it returns is freed before "
            "the next call. The C library is told to keep what is freed, as it does by itself "
            "within a training step.",
            "",
            "*Product*: one `torch.mm` of the bank's operands into a result that is there already. "
            "*Clones*: of all weights that the bank generates.",
            "",
            "## Banks that mix templates",
            "",
            "For the shapes that most elements of a model have: `tied`; `wavg` of whole weights "
            "closest to half of all elements, and of tiles closest to a tenth; and whole weights, "
            f"as many as there are but {REFERENCE_TEMPLATES} or {MOST_TEMPLATES} at most, where "
            f"they are {_megabytes(LARGE_BYTES)} MB or more. What does not depend on the size took "
            f"{1000 * smallest.seconds:.2f} ms: so much took `tied` of 7 x 8x8.",
            "",
            "Weights of more than 32 MiB are mixed in pieces of at most that: in a training step, "
            "glibc has the pages of larger blocks made anew each time, which takes longer than "
            "reading the templates for each piece again.",
            "",
            *_verdicts(mixed),
            "",
            *_table([*BANK_COLUMNS, "target"], map(_verdict_row, mixed)),
            "",
            f"## All weights of {args.whole}",
            "",
            "`wavg`, for each shape a bank of as many templates as weights but "
            f"{REFERENCE_TEMPLATES} at most. *{WAYS[1]}*: the same templates and coefficients, but "
            "in one flat bank of which each site takes a slice, multiplies it by its coefficients "
            "and adds up. Backward makes a tensor of the size of the bank for each slice. "
            f"*{WAYS[2]}*: such a bank too, where each site reads up to {REFERENCE_TEMPLATES} "
            "templates from where the reference's code has it read.",
            "",
            f"- Target, {MIN_SPEEDUP:g} times as fast as {WAYS[1]}, with backward: "
            f"{'met' if whole['both'][WAYS[1]].speedup.middle >= MIN_SPEEDUP else 'missed'}.",
            "",
            *_table(
                ["", "forward, ms", "/ banks", "with backward, ms", "/ banks"],
                (
                    [way, *_speed(whole["forward"][way]), *_speed(whole["both"][way])]
                    for way in WAYS
                ),
            ),
            "",
            "## Every generator at half of all elements",
            "",
            "The size closest to it of those that a generator proposes; no row where it proposes "
            "none. *Product* is, but for `tied` and `wavg`, that of as many templates of a whole "
            "weight as the bank has parameters: as many bytes are read and written.",
            "",
            *_table(BANK_COLUMNS, map(_row, at_half)),
        ]
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _verdicts(figures: Sequence[Figure]) -> list[str]:
    """Say how many banks meet each target."""
    large = [_is_met(figure) for figure in figures if figure.case.is_large]
    other = [_is_met(figure) for figure in figures if not figure.case.is_large]
    return [
        f"- Target for banks of {_megabytes(LARGE_BYTES)} MB and more with at least as many "
        f"weights as templates, {MAX_BY_CLONE:g} times the clones: met by {sum(large)} of "
        f"{len(large)}.",
        f"- Target for all others, {MAX_BY_PRODUCT:g} times the product: met by {sum(other)} of "
        f"{len(other)}.",
    ]


def _is_met(figure: Figure) -> bool:
    if figure.case.is_large:
        return figure.by_clone.middle <= MAX_BY_CLONE
    return figure.by_product.middle <= MAX_BY_PRODUCT


def _verdict_row(figure: Figure) -> list[str]:
    return [*_row(figure), "met" if _is_met(figure) else "missed"]


def _row(figure: Figure) -> list[str]:
    case = figure.case
    size = case.size
    return [
        case.model,
        f"{len(case.shapes)} x {'x'.join(map(str, case.shapes[0]))}",
        f"{case.generator}, {size.num_templates} x {size.template_size:,}",
        _megabytes(case.bytes_owned),
        _megabytes(case.bytes_written),
        f"{1000 * figure.seconds:.2f}",
        f"{figure.by_product}",
        f"{figure.by_clone}",
    ]


def _speed(speed: Speed) -> list[str]:
    return [f"{1000 * speed.seconds:.1f}", f"{speed.speedup}"]


def _megabytes(number: int) -> str:
    return f"{number / 1e6:.1f}"


if __name__ == "__main__":
    main()
