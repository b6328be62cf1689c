"""The user's rules: which weights may be shared, which not, and which share one bank."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TypeAlias

import networkx as nx

from npas_fx.errors import RuleError
from npas_fx.ir import Inventory, Kept, Site

Pattern: TypeAlias = "str | re.Pattern[str]"
Patterns: TypeAlias = "Pattern | Iterable[Pattern] | None"

EXCLUDED, NOT_INCLUDED = _BY_RULE = ("excluded", "not included")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the user's rules leave of an inventory.

    Attributes:
        inventory: without the sites that are excluded or not included; these are kept.
        private: indices of the sites that stay dedicated.
        groups: indices of the sites that end in one bank; the groups have no site in common.
    """

    inventory: Inventory
    private: frozenset[int]
    groups: tuple[tuple[int, ...], ...]


def apply_rules(
    inventory: Inventory,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    keep_private: Patterns = None,
    same_bank: Sequence[Sequence[Pattern]] | None = None,
) -> Rules:
    """Apply the user's rules to an inventory.

    A pattern is an exact name, a glob (``*``, ``?``, ``[…]``) over the whole name, or a compiled
    regular expression that is searched for in the name; it may name a tied weight by any name.

    Raises:
        RuleError: a pattern matches nothing, or the rules cannot hold together.
        TypeError: a rule is no pattern and no sequence of patterns.
    """
    names = inventory.names()
    kept = {item.name: item for item in inventory.kept}
    excluded = _find(names, "exclude", exclude)
    included = set(names.values()) if include is None else _find(names, "include", include)
    private_names = _find(names, "keep_private", keep_private)
    sites = []
    for site in inventory.sites:
        if site.name in excluded:
            kept[site.name] = _keep(site, EXCLUDED)
        elif site.name not in included:
            kept[site.name] = _keep(site, NOT_INCLUDED)
        else:
            sites.append(site)
    if include is not None and not sites:
        raise RuleError(
            f"include={include!r} leaves no weight to share: "
            + "; ".join(f"{name!r} stays ({kept[name].reason})" for name in sorted(included)[:5])
        )
    index = {site.name: k for k, site in enumerate(sites)}
    order = [item.name for item in inventory]
    private = frozenset(index[name] for name in private_names if name in index)
    groups = _join([_group(names, group, index, kept) for group in same_bank or ()])
    for group in groups:
        _check_group([sites[k] for k in group], {sites[k].name for k in group if k in private})
    return Rules(
        inventory=replace(
            inventory, sites=tuple(sites), kept=tuple(kept[name] for name in order if name in kept)
        ),
        private=private,
        groups=groups,
    )


def _keep(site: Site, reason: str) -> Kept:
    return Kept(
        name=site.name,
        aliases=site.aliases,
        reason=reason,
        shape=site.shape,
        dtype=site.dtype,
        is_trainable=True,
    )


def _find(names: dict[str, str], rule: str, patterns: Patterns) -> set[str]:
    """Names of the parameters that any of the patterns matches."""
    if patterns is None:
        return set()
    if isinstance(patterns, (str, re.Pattern)):
        patterns = [patterns]
    if not isinstance(patterns, Iterable):
        raise TypeError(f"{rule}={patterns!r} is no name, glob, re.Pattern or list of these")
    found: set[str] = set()
    for pattern in patterns:
        found |= _match(names, rule, pattern)
    return found


def _match(names: dict[str, str], rule: str, pattern: object) -> set[str]:
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
        near = difflib.get_close_matches(text, names, n=3, cutoff=0.3) or list(names)[:3]
        raise RuleError(
            f"{rule}: {shown} matches no parameter of the model; near names: "
            f"{', '.join(map(repr, near)) or 'none, the model has no parameters'}"
        )
    return {names[alias] for alias in matches}


def _group(
    names: dict[str, str], group: object, index: dict[str, int], kept: dict[str, Kept]
) -> set[int]:
    if isinstance(group, (str, re.Pattern)) or not isinstance(group, Iterable):
        raise TypeError(
            f"same_bank holds {group!r}; it is a list of groups, like [['a.weight', 'b.weight']]"
        )
    members: set[int] = set()
    for pattern in group:
        found = _match(names, "same_bank", pattern)
        matched = {index[name] for name in found if name in index}
        # A pattern may match biases on the way, which stay in any case; another rule contradicts.
        ruled_out = {name for name in found & kept.keys() if kept[name].reason in _BY_RULE}
        if ruled_out or not matched:
            name = min(ruled_out or found)
            raise RuleError(
                f"same_bank: {name!r} cannot be in a bank, since it stays as it is "
                f"({kept[name].reason}); take it out of the group"
            )
        members |= matched
    return members


def _join(groups: Sequence[set[int]]) -> tuple[tuple[int, ...], ...]:
    """Groups that have a site in common are one group."""
    together: nx.Graph[int] = nx.Graph()
    for group in groups:
        together.add_nodes_from(group)
        together.add_edges_from(combinations(sorted(group), 2))
    joined = (tuple(sorted(group)) for group in nx.connected_components(together))
    return tuple(sorted(group for group in joined if len(group) > 1))


def _check_group(sites: Sequence[Site], private: set[str]) -> None:
    names = ", ".join(repr(site.name) for site in sites)
    if private:
        raise RuleError(
            f"same_bank wants {names} in one bank, but keep_private keeps {sorted(private)[0]!r} "
            "on its own; drop it from one of the two"
        )
    for what in ("dtype", "device"):
        if len({getattr(site, what) for site in sites}) > 1:
            found = ", ".join(f"{site.name!r} {getattr(site, what)}" for site in sites)
            raise RuleError(f"same_bank: a bank has one {what}, but these differ: {found}")
