"""Which training flags to set so that a constant shows whose flag it follows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import chain, count


def mode_patterns(number_of: Mapping[str, int]) -> list[dict[str, bool]]:
    """Patterns of training flags: for each bit of the modules' numbers one, and its complement.

    A constant that follows the flag of one module has that module's number. One that depends on
    two flags, with numbers that differ, follows the number of neither: where a bit differs, one of
    the two patterns sets just the first flag and the other just the second.

    Args:
        number_of: module path -> its number.
    """
    bits = range(max(number_of.values(), default=0).bit_length())
    return [
        {path: bool(number >> bit & 1) is is_plain for path, number in number_of.items()}
        for bit in bits
        for is_plain in (True, False)
    ]


def number_each(asked: Iterable[str]) -> dict[str, int]:
    """Give each module a number of its own."""
    return {path: number for number, path in enumerate(sorted(asked))}


def number_rivals(asked: Iterable[str], groups: Iterable[Iterable[str]]) -> dict[str, int]:
    """Give two modules the same number only where no constant can be taken for the other's.

    As few numbers as a greedy choice needs, at least two: their count depends on how deep modules
    that read their flags are nested, not on how many there are.

    Args:
        asked: paths of the modules whose flag was read.
        groups: some of these paths at a time, whose numbers must differ; those of nested modules
            differ in any case.
    """
    paths = sorted(asked)
    rivals: dict[str, set[str]] = defaultdict(set)
    for group in (*groups, *({a, b} for a in paths for b in paths if is_inside(a, b))):
        for path in group:
            rivals[path].update(group)
    number_of: dict[str, int] = {}
    for k, path in enumerate(paths, start=1):
        taken = {number_of[rival] for rival in rivals[path] if rival in number_of}
        # Neighbours differ where nothing speaks against it.
        wished = chain((k % 2, 1 - k % 2), count(2))
        number_of[path] = next(number for number in wished if number not in taken)
    return number_of


def is_inside(path: str, parent: str) -> bool:
    """Whether a module path is ``parent`` or lies below it; everything lies below the root."""
    return not parent or path == parent or path.startswith(f"{parent}.")
