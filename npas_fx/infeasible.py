"""Say in the user's words why no plan fits, and what to do: from what the solver found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from npas_fx.errors import InfeasibleBudgetError, RuleError
from npas_fx.ir import Budget
from npas_fx.rules import Rules
from npas_fx.solvers.selection import Obstacle

# An int as small as this was probably meant as a share.
_SMALL_COUNT = 100
_MOST = 4  # reasons, weights or rules in a message


def say_infeasible(
    rules: Rules, budget: Budget, asked: object, obstacle: Obstacle, stays: int
) -> InfeasibleBudgetError | RuleError:
    """Write the error for a budget that no plan meets.

    Args:
        rules: of the user; those of the problem are the same, in the same order.
        budget: what was asked for.
        asked: the same as the user wrote it.
        obstacle: what is in the way; its rules are those of the problem.
        stays: what all weights that stay take of the budgeted resource.

    Returns:
        An ``InfeasibleBudgetError``; where no budget would do, a ``RuleError``, since it is the
        rules then that cannot hold together.
    """
    resource = budget.resource
    if resource not in obstacle.smallest:
        return _say_blocked(rules, obstacle.blocking)
    smallest = obstacle.smallest[resource] + stays
    parts = _say_parts(rules, "num_bytes" if resource == "bytes" else "numel")
    because = f": {'; '.join(parts)}" if parts else ""
    saved = {rule: less[resource] for rule, less in obstacle.savings.items() if resource in less}
    hint = ""
    if type(asked) is int and asked <= _SMALL_COUNT:
        hint = f"; budget={asked} means {asked} parameters, did you mean {asked}.0?"
    return InfeasibleBudgetError(
        f"budget={asked!r} ({budget}) cannot be met: the cheapest plan needs {smallest} "
        f"{resource}{because}.{_say_savings(rules, saved, resource)} "
        f"Use a budget of at least {smallest} {resource}{hint}",
        smallest=smallest,
    )


def _say_blocked(rules: Rules, blocking: Sequence[str]) -> RuleError:
    sites = [rule for rule in blocking if rule.startswith("site ")]
    named = [_say_rule(rules, rule) for rule in blocking if rule not in sites]
    parts = [f"in the way: {_shorten(named)}"] if named else []
    if sites:
        bare = rules.quote(int(site.removeprefix("site ")) for site in sites)
        parts.append(f"they leave no bank for {bare}")
    because = f" ({'; '.join(parts)})" if parts else ""
    what = "it" if len(named) == 1 else "one of these, or more where one is not enough"
    return RuleError(
        f"no plan keeps all of the rules, whatever the budget{because}. Drop or loosen {what}"
    )


def _say_parts(rules: Rules, unit: str) -> list[str]:
    """What takes much of the budget and cannot be shared."""
    inventory = rules.inventory
    weights = [kept for kept in inventory.kept if kept.is_trainable]
    weights.sort(key=lambda kept: -getattr(kept, unit))
    parts = []
    if weights:
        total = sum(getattr(kept, unit) for kept in weights)
        sums: Counter[str] = Counter()
        for kept in weights:
            sums[kept.reason] += getattr(kept, unit)
        reasons = ", ".join(f"{amount} {reason}" for reason, amount in sums.most_common(_MOST))
        largest = ", ".join(f"{kept.name!r} {getattr(kept, unit)}" for kept in weights[:_MOST])
        parts.append(f"{total} of them stay plain ({reasons}; the largest are {largest})")
    private = sorted(
        (inventory.sites[k] for k in rules.private), key=lambda site: -getattr(site, unit)
    )
    if private:
        total = sum(getattr(site, unit) for site in private)
        parts.append(
            f"{total} are in weights that keep_private names, the largest {private[0].name!r}"
        )
    if not inventory.sites:
        parts.append("no weight can be shared")
    return parts


def _say_savings(rules: Rules, saved: dict[str, int], resource: str) -> str:
    """What the plan could take less without each rule, the most first."""
    largest = sorted(saved.items(), key=lambda item: -item[1])[:_MOST]
    said = [f"{less} {resource} less without {_say_rule(rules, rule)}" for rule, less in largest]
    return f" It could be {', or '.join(said)}." if said else ""


def _say_rule(rules: Rules, rule: str) -> str:
    """Write what a solver calls ``private``, ``max_banks``, ``same_bank[0]``, ``pin[1]``."""
    name, _, number = rule.rstrip("]").partition("[")
    if name == "private":
        return "keep_private"
    if name == "max_banks":
        return f"max_banks={rules.max_banks}"
    members = {
        "same_bank": rules.groups,
        "different_bank": rules.apart,
        "pin": [pin.sites for pin in rules.pinned],
    }[name]
    return f"{name} of {rules.quote(members[int(number)])}"


def _shorten(said: Sequence[str]) -> str:
    more = len(said) - _MOST
    return "; ".join(said[:_MOST]) + (f"; and {more} more" if more > 0 else "")
