"""Patterns of the user: names of parameters, globs, and regular expressions."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable
from typing import TypeAlias

from npas_fx.errors import RuleError

Pattern: TypeAlias = "str | re.Pattern[str]"
Patterns: TypeAlias = "Pattern | Iterable[Pattern] | None"


def find(names: dict[str, str], rule: str, patterns: Patterns) -> set[str]:
    """Find the parameters that any of the patterns matches.

    Args:
        names: every name and alias of a parameter -> the name it goes by.
        rule: that the patterns are of, for messages.
        patterns: one or many.

    Raises:
        RuleError: a pattern matches nothing.
        TypeError: there is something that is no pattern.
    """
    if patterns is None:
        return set()
    if isinstance(patterns, (str, re.Pattern)):
        patterns = [patterns]
    if not isinstance(patterns, Iterable):
        raise TypeError(f"{rule}={patterns!r} is no name, glob, re.Pattern or list of these")
    found: set[str] = set()
    for pattern in patterns:
        found |= match(names, rule, pattern)
    return found


def match(names: dict[str, str], rule: str, pattern: object) -> set[str]:
    """Find the parameters that one pattern matches; see ``find``."""
    if isinstance(pattern, re.Pattern):
        matches = [alias for alias in names if pattern.search(alias)]
        shown = f"re.compile({pattern.pattern!r})"
    elif isinstance(pattern, str):
        # An exact name first: names of parameters may hold the characters of a glob.
        exact = [pattern] if pattern in names else []
        matches = exact or [alias for alias in names if fnmatch.fnmatchcase(alias, pattern)]
        shown = repr(pattern)
    else:
        raise TypeError(f"{rule} holds {pattern!r}, which is no name, glob or re.Pattern")
    if not matches:
        text = pattern if isinstance(pattern, str) else pattern.pattern
        raise RuleError(f"{rule}: {shown} matches no parameter of the model; {near(text, names)}")
    return {names[alias] for alias in matches}


def near(name: str, names: Iterable[str]) -> str:
    """Say which names are like one that there is not."""
    names = list(names)
    closest = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:3]
    return f"near names: {', '.join(map(repr, closest)) or 'none, the model has no parameters'}"
