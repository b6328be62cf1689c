"""The user's rules: which weights may be shared, which not, which together, and by which banks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from numbers import Integral
from typing import TypeAlias

import networkx as nx

from npas_fx.build import check_bank
from npas_fx.errors import RuleError
from npas_fx.generators import GENERATORS, Generator
from npas_fx.ir import BankPlan, Inventory, Kept, Site, Size
from npas_fx.patterns import Pattern, Patterns, find, match, near

Groups: TypeAlias = "Sequence[Sequence[Pattern]] | None"

EXCLUDED, NOT_INCLUDED = _BY_RULE = ("excluded", "not included")
_MOST_NAMES = 6  # of weights in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """A bank that the plan has, exactly so.

    Attributes:
        sites: indices of its sites, increasing.
        generator: name of its generator.
        size: its size, with the partial template.
    """

    sites: tuple[int, ...]
    generator: str
    size: Size


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the user's rules leave of an inventory; they do not contradict each other.

    Attributes:
        inventory: without the sites that are excluded or not included; these are kept.
        private: indices of the sites that stay dedicated.
        groups: indices of the sites that end in one bank; the groups have no site in common.
        apart: groups of indices, in the user's order; no bank has two sites of a group.
        max_banks: the most banks of two or more sites; None for any number.
        pinned: banks that the plan has, in the user's order; they have no site in common.
    """

    inventory: Inventory
    private: frozenset[int]
    groups: tuple[tuple[int, ...], ...]
    apart: tuple[tuple[int, ...], ...]
    max_banks: int | None
    pinned: tuple[Pin, ...]

    def quote(self, members: Iterable[int]) -> str:
        """Write the names of sites for a message; of many, the first ones."""
        names = [repr(self.inventory.sites[k].name) for k in members]
        more = len(names) - _MOST_NAMES
        return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def apply_rules(
    inventory: Inventory,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    keep_private: Patterns = None,
    same_bank: Groups = None,
    different_bank: Groups = None,
    max_banks: int | None = None,
    pin: Sequence[BankPlan] | None = None,
    generators: Mapping[str, Generator] = GENERATORS,
) -> Rules:
    """Apply the user's rules to an inventory; see ``npas_fx.transform`` for what each means.

    A pattern is an exact name, a glob (``*``, ``?``, ``[…]``) over the whole name, or a compiled
    regular expression that is searched for in the name; it may name a tied weight by any name.

    Args:
        inventory: of the model.
        include: patterns.
        exclude: patterns.
        keep_private: patterns.
        same_bank: groups of patterns.
        different_bank: groups of patterns.
        max_banks: a number, 0 or more.
        pin: banks of a plan, perhaps edited.
        generators: name -> generator, of those that a pinned bank may have.

    Raises:
        RuleError: a pattern matches nothing, a pinned bank does not fit the model, or the rules
            cannot hold together.
        TypeError: a rule is not of its form.
    """
    names = inventory.names()
    kept = {item.name: item for item in inventory.kept}
    excluded = find(names, "exclude", exclude)
    included = set(names.values()) if include is None else find(names, "include", include)
    private_names = find(names, "keep_private", keep_private)
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
    weights = _Weights(names=names, kept=kept, index=index, sites=sites)
    apart = _find_groups("different_bank", different_bank, weights)
    rules = Rules(
        inventory=replace(
            inventory, sites=tuple(sites), kept=tuple(kept[name] for name in order if name in kept)
        ),
        private=frozenset(index[name] for name in private_names if name in index),
        groups=_join(_find_groups("same_bank", same_bank, weights)),
        apart=tuple(tuple(sorted(group)) for group in apart),
        max_banks=_read_max_banks(max_banks),
        pinned=_read_pins(pin, weights, generators),
    )
    _check_groups(rules)
    _check_apart(rules)
    _check_pins(rules)
    _check_max_banks(rules)
    return rules


def _keep(site: Site, reason: str) -> Kept:
    return Kept(
        name=site.name,
        aliases=site.aliases,
        reason=reason,
        shape=site.shape,
        dtype=site.dtype,
        is_trainable=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weights:
    """What names in a rule stand for: any name -> the first one, and that -> kept or its index."""

    names: dict[str, str]
    kept: dict[str, Kept]
    index: dict[str, int]
    sites: Sequence[Site]

    def say_stays(self, name: str) -> str:
        return f"{name!r} cannot be in a bank, since it stays as it is ({self.kept[name].reason})"


def _find_groups(rule: str, groups: Groups, weights: _Weights) -> list[set[int]]:
    form = "a list of groups, like [['a.weight', 'b.weight']]"
    if groups is not None and not isinstance(groups, Iterable):
        raise TypeError(f"{rule}={groups!r} is not {form}")
    found = []
    for group in groups or ():
        if isinstance(group, (str, re.Pattern)) or not isinstance(group, Iterable):
            raise TypeError(f"{rule} holds {group!r}; it is {form}")
        patterns = list(group)
        members = {k for pattern in patterns for k in _find_members(rule, pattern, weights)}
        # A group of one asks same_bank for nothing, but has nothing that different_bank can part.
        if rule == "different_bank" and len(members) < 2:
            raise RuleError(
                f"different_bank: {patterns!r} are {len(members)} weight, and a group has two or "
                "more (all names of a tied weight are one weight); add one, or drop the group"
            )
        found.append(members)
    return found


def _find_members(rule: str, pattern: object, weights: _Weights) -> set[int]:
    found = match(weights.names, rule, pattern)
    members = {weights.index[name] for name in found if name in weights.index}
    # A pattern may match biases on the way, which stay in any case; another rule contradicts.
    ruled_out = {
        name for name in found & weights.kept.keys() if weights.kept[name].reason in _BY_RULE
    }
    if ruled_out or not members:
        name = min(ruled_out or found)
        raise RuleError(f"{rule}: {weights.say_stays(name)}; take it out of the group")
    return members


def _join(groups: Sequence[set[int]]) -> tuple[tuple[int, ...], ...]:
    """Groups that have a site in common are one group."""
    together: nx.Graph[int] = nx.Graph()
    for group in groups:
        together.add_nodes_from(group)
        together.add_edges_from(combinations(sorted(group), 2))
    joined = (tuple(sorted(group)) for group in nx.connected_components(together))
    return tuple(sorted(group for group in joined if len(group) > 1))


def _read_max_banks(max_banks: object) -> int | None:
    if max_banks is None:
        return None
    if isinstance(max_banks, bool) or not isinstance(max_banks, Integral):
        raise TypeError(f"max_banks={max_banks!r} is no number of banks; give an int, or None")
    if max_banks < 0:
        raise RuleError(f"max_banks={max_banks}; give 0 or more, or None for any number of banks")
    return int(max_banks)


def _read_pins(
    pins: object, weights: _Weights, generators: Mapping[str, Generator]
) -> tuple[Pin, ...]:
    form = "a list of banks of a plan, like [plan.banks[0]]"
    if pins is not None and not isinstance(pins, Iterable):
        raise TypeError(f"pin={pins!r} is not {form}")
    read = []
    for number, bank in enumerate(pins or ()):
        if not isinstance(bank, BankPlan):
            raise TypeError(f"pin holds {bank!r}; it is {form}")
        read.append(_read_pin(f"pin[{number}]", bank, weights, generators))
    return tuple(read)


def _read_pin(
    where: str, bank: BankPlan, weights: _Weights, generators: Mapping[str, Generator]
) -> Pin:
    if not bank.sites:
        raise RuleError(f"{where} has no sites; leave it out")
    for alias in bank.sites:
        if alias not in weights.names:
            raise RuleError(
                f"{where}: the model has no weight {alias!r}; {near(alias, weights.names)}"
            )
        name = weights.names[alias]
        if name in weights.kept:
            raise RuleError(f"{where}: {weights.say_stays(name)}; take it out of the bank")
    members = tuple(sorted({weights.index[weights.names[alias]] for alias in bank.sites}))
    if len(members) < len(bank.sites):
        raise RuleError(
            f"{where} has a weight twice in {list(bank.sites)}; name it once (all names of a tied "
            "weight are one weight)"
        )
    sites = [weights.sites[k] for k in members]
    check_bank(where, bank, sites, generators, error=RuleError)
    return Pin(sites=members, generator=bank.generator, size=bank.size)


def _check_groups(rules: Rules) -> None:
    for group in rules.groups:
        private = [k for k in group if k in rules.private]
        if private:
            raise RuleError(
                f"same_bank wants {rules.quote(group)} in one bank, but keep_private keeps "
                f"{rules.quote(private[:1])} on its own; drop it from one of the two"
            )
        sites = [rules.inventory.sites[k] for k in group]
        for what in ("dtype", "device"):
            if len({getattr(site, what) for site in sites}) > 1:
                found = ", ".join(f"{site.name!r} {getattr(site, what)}" for site in sites)
                raise RuleError(f"same_bank: a bank has one {what}, but these differ: {found}")


def _check_apart(rules: Rules) -> None:
    in_one = [("same_bank wants", group) for group in rules.groups]
    in_one += [(f"pin[{number}] has", pin.sites) for number, pin in enumerate(rules.pinned)]
    for who, members in in_one:
        for group in rules.apart:
            both = sorted(set(members).intersection(group))
            if len(both) > 1:
                raise RuleError(
                    f"{who} {rules.quote(members)} in one bank, but different_bank keeps "
                    f"{rules.quote(both)} apart; drop one of these from one of the two"
                )


def _check_pins(rules: Rules) -> None:
    pin_of: dict[int, int] = {}
    for number, pin in enumerate(rules.pinned):
        for k in pin.sites:
            if pin_of.setdefault(k, number) != number:
                raise RuleError(
                    f"pin[{pin_of[k]}] and pin[{number}] both have {rules.quote([k])}, and a "
                    "weight is in one bank; leave out one of the two"
                )
            if k in rules.private and pin.generator != "dedicated":
                raise RuleError(
                    f"pin[{number}] generates {rules.quote([k])}, but keep_private keeps it on its "
                    "own; drop it from keep_private, or leave out this bank"
                )
    for group in rules.groups:
        for number in sorted({pin_of[k] for k in group if k in pin_of}):
            missing = [k for k in group if pin_of.get(k) != number]
            if missing:
                raise RuleError(
                    f"same_bank wants {rules.quote(group)} in one bank, but pin[{number}] is "
                    f"without {rules.quote(missing)}; drop these from the group, or pin a bank of "
                    "all"
                )


def _check_max_banks(rules: Rules) -> None:
    """Refuse a number that pins and groups exceed at first sight; else it is the solver's."""
    if rules.max_banks is None:
        return
    wanted = [
        f"pin[{number}] ({rules.quote(pin.sites)})"
        for number, pin in enumerate(rules.pinned)
        if len(pin.sites) > 1
    ]
    pinned = {k for pin in rules.pinned for k in pin.sites}
    # Groups may end in one bank, if it can have all of them.
    sites = rules.inventory.sites
    alike = {
        (sites[group[0]].dtype, sites[group[0]].device): f"same_bank ({rules.quote(group)})"
        for group in rules.groups
        if group[0] not in pinned
    }
    wanted += alike.values()
    if len(wanted) > rules.max_banks:
        raise RuleError(
            f"max_banks={rules.max_banks}, but {len(wanted)} with two or more weights are wanted: "
            f"{'; '.join(wanted)}. Use max_banks={len(wanted)} or more, or drop some of these"
        )
