"""Globs that stand for many names, to print them in a few lines."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence


def find_globs(names: Sequence[str], name_of: Mapping[str, str]) -> list[str]:
    """Find globs that match these names and no others.

    ``blocks.0.fc.weight`` and ``blocks.1.fc.weight`` become ``blocks.*.fc.weight``. A star stands
    for a number, but since a glob is taken only if nothing else fits it, it may be used as a rule.

    Args:
        names: some names.
        name_of: all names and aliases -> the name each goes by.
    """
    wanted = set(names)
    is_exact: dict[str, bool] = {}  # glob -> whether it matches two of these names, and no others

    def stands_for_some(glob: str) -> bool:
        if glob not in is_exact:
            fits = re.compile(fnmatch.translate(glob)).match
            matched = {name for alias, name in name_of.items() if fits(alias)}
            is_exact[glob] = len(matched) > 1 and matched <= wanted
        return is_exact[glob]

    return list(
        dict.fromkeys(next(filter(stands_for_some, _generalise(name)), name) for name in names)
    )


def _generalise(name: str) -> Iterator[str]:
    """Put stars for numbers: for all of the module's, or for those of its parents."""
    if re.search(r"[*?[]", name):
        return  # as a glob it would mean something else
    module, dot, parameter = name.rpartition(".")
    parents, inner, own = module.rpartition(".")
    yield re.sub(r"\d+", "*", module) + dot + parameter
    yield re.sub(r"\d+", "*", parents) + inner + own + dot + parameter
