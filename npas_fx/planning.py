"""From an inventory and a budget to a plan: profile, propose, solve, fill, and say what failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, TypeVar

from npas_fx.errors import BudgetError, InfeasibleBudgetError, NPASError
from npas_fx.fill import fill
from npas_fx.generators import GENERATORS, Generator
from npas_fx.ir import BankPlan, Budget, Candidate, Certificate, Inventory, Plan, Profile
from npas_fx.profiles import PROFILES
from npas_fx.propose import propose
from npas_fx.rules import Rules
from npas_fx.solvers import SOLVERS, PlanningProblem, Selection, Solver

_T = TypeVar("_T")
Profiler: TypeAlias = Callable[[Inventory], Profile]

# An int as small as this was probably meant as a share.
_SMALL_COUNT = 100


def make_plan(
    rules: Rules,
    asked: object,
    *,
    profile: str | Profiler = "structure",
    generators: Sequence[str | Generator] | None = None,
    solver: str | Solver = "cp_sat",
) -> Plan:
    """Choose the banks of an inventory under a budget; see ``npas_fx.plan``.

    Args:
        rules: the inventory and the user's rules.
        asked: the budget as the user wrote it.
        profile: name of a profile, or a function that makes one from the inventory.
        generators: names or objects; by default all of ``GENERATORS``.
        solver: name of a solver, or the solver.
    """
    inventory = rules.inventory
    model_parameters = inventory.num_parameters
    budget = Budget.parse(asked, model_parameters=model_parameters)
    known = resolve_generators(generators)
    evidence = _named(profile, PROFILES, "profile")(inventory)
    select = _named(solver, SOLVERS, "solver")
    stays = inventory.num_kept_bytes if budget.bytes else inventory.num_kept
    size = sum(item.num_bytes if budget.bytes else item.numel for item in inventory.sites) + stays
    left = budget.amount - stays
    candidates = propose(rules, evidence, known.values(), above=budget.amount > size)
    problem = PlanningProblem(
        num_sites=len(inventory.sites),
        members=tuple(candidate.sites for candidate in candidates),
        price=tuple(candidate.price for candidate in candidates),
        cost={budget.resource: tuple(getattr(c, budget.resource) for c in candidates)},
        budget={budget.resource: max(left, 0)},
    )
    selection = select(problem)
    smallest = selection.smallest[budget.resource] + stays
    if left < 0 or selection.status == "infeasible":
        raise _infeasible(rules, budget, asked, smallest)
    chosen = [candidates[c] for c in selection.chosen]
    left -= sum(getattr(candidate, budget.resource) for candidate in chosen)
    banks = fill(
        chosen,
        left,
        budget.resource,
        sites=inventory.sites,
        private=rules.private,
        profile=evidence,
        generators=known,
    )
    return _write_plan(budget, rules, banks, _certify(selection, evidence, known))


def resolve_generators(generators: Sequence[str | Generator] | None) -> dict[str, Generator]:
    """Name -> generator, from names and objects; ``dedicated`` is always among them."""
    given = list(GENERATORS.values()) if generators is None else generators
    resolved = [_named(generator, GENERATORS, "generator") for generator in given]
    return {"dedicated": GENERATORS["dedicated"], **{each.name: each for each in resolved}}


def _named(value: str | _T, known: Mapping[str, _T], what: str) -> _T:
    if not isinstance(value, str):
        return value
    if value not in known:
        raise NPASError(f"{what}={value!r} is not known; there are {', '.join(map(repr, known))}")
    return known[value]


def _write_plan(
    budget: Budget, rules: Rules, banks: Sequence[Candidate], certificate: Certificate
) -> Plan:
    inventory = rules.inventory
    planned = tuple(
        BankPlan(
            sites=tuple(inventory.sites[k].name for k in bank.sites),
            generator=bank.generator,
            size=bank.size,
            parameters=bank.parameters,
            bytes=bank.bytes,
        )
        for bank in banks
    )
    shared = [k for bank in banks if bank.generator != "dedicated" for k in bank.sites]
    return Plan(
        budget=budget,
        parameters=inventory.num_kept + sum(bank.parameters for bank in planned),
        bytes=inventory.num_kept_bytes + sum(bank.bytes for bank in planned),
        banks=planned,
        kept={kept.name: kept.reason for kept in inventory.kept},
        kept_parameters=inventory.num_kept,
        kept_bytes=inventory.num_kept_bytes,
        model_parameters=inventory.num_parameters,
        site_parameters=sum(site.numel for site in inventory.sites),
        fresh_parameters=sum(inventory.sites[k].numel for k in shared),
        certificate=certificate,
    )


def _certify(
    selection: Selection, profile: Profile, generators: Mapping[str, Generator]
) -> Certificate:
    assert selection.objective is not None
    assert selection.bound is not None
    assert selection.gap is not None
    assert selection.status != "infeasible"
    return Certificate(
        objective=selection.objective,
        bound=selection.bound,
        gap=selection.gap,
        status=selection.status,
        seconds=selection.seconds,
        candidates=selection.num_candidates,
        scope=(
            "single sites, classes of one shape, role or place, runs in depth and a clustering "
            f"tree, times {', '.join(generators)}, priced from {profile.name}"
        ),
    )


def _infeasible(rules: Rules, budget: Budget, asked: object, smallest: int) -> BudgetError:
    inventory, resource = rules.inventory, budget.resource
    unit = "num_bytes" if resource == "bytes" else "numel"
    weights = [kept for kept in inventory.kept if kept.is_trainable]
    weights.sort(key=lambda kept: -getattr(kept, unit))
    parts = []
    if weights:
        total = sum(getattr(kept, unit) for kept in weights)
        sums: Counter[str] = Counter()
        for kept in weights:
            sums[kept.reason] += getattr(kept, unit)
        reasons = ", ".join(f"{amount} {reason}" for reason, amount in sums.most_common(4))
        largest = ", ".join(f"{kept.name!r} {getattr(kept, unit)}" for kept in weights[:4])
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
    hint = ""
    if type(asked) is int and asked <= _SMALL_COUNT:
        hint = f"; budget={asked} means {asked} parameters, did you mean {asked}.0?"
    because = f": {'; '.join(parts)}" if parts else ""
    return InfeasibleBudgetError(
        f"budget={asked!r} ({budget}) cannot be met: the cheapest plan needs {smallest} "
        f"{resource}{because}. Use a budget of at least {smallest} {resource}{hint}",
        smallest=smallest,
    )
