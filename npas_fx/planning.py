"""From an inventory and budgets to plans: profile, propose, refine, solve, fill."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeAlias, TypeVar

from npas_fx.errors import NPASError
from npas_fx.fill import fill
from npas_fx.generators import DEFAULT_GENERATORS, GENERATORS, Generator
from npas_fx.infeasible import say_infeasible
from npas_fx.ir import BankPlan, Budget, Candidate, Certificate, Inventory, Plan, Profile
from npas_fx.profiles import PROFILES
from npas_fx.propose import Pricer, propose
from npas_fx.refine import Refined, add_near, refine
from npas_fx.rules import Rules
from npas_fx.solvers import SOLVERS, PlanningProblem, Selection, Solver, select_each
from npas_fx.solvers.floor import find_obstacle, smallest_budgets
from npas_fx.solvers.pricing import Pricing, price_sites

_T = TypeVar("_T")
Profiler: TypeAlias = Callable[[Inventory], Profile]

# What refining may take: rounds, and sites of all candidates in all the rounds of one budget. A
# round takes 0.05 s for 50 sites, 1 s for 2,000.
_MOST_ROUNDS = 8
_MOST_ENTRIES = 1_500_000
# Rules of which an error says what they cost.
_MOST_RULES = 12


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
        generators: names or objects; by default ``DEFAULT_GENERATORS``.
        solver: name of a solver, or the solver.
    """
    return make_frontier(rules, [asked], profile=profile, generators=generators, solver=solver)[0]


def make_frontier(
    rules: Rules,
    asked: Sequence[object],
    *,
    profile: str | Profiler = "structure",
    generators: Sequence[str | Generator] | None = None,
    solver: str | Solver = "cp_sat",
) -> list[Plan]:
    """Choose the banks for each of many budgets, from the same candidates.

    Args:
        rules: as for ``make_plan``, like what follows.
        asked: the budgets as the user wrote them.
        profile: likewise.
        generators: likewise.
        solver: likewise.

    Returns:
        Plans in the order of the budgets. Of two in one resource, the one with more has no higher
        an objective.
    """
    names = [site.name for site in rules.inventory.sites]
    rules = _sort_sites(rules)
    inventory = rules.inventory
    budgets = [Budget.parse(each, model_parameters=inventory.num_parameters) for each in asked]
    known = resolve_generators(generators)
    evidence = _named(profile, PROFILES, "profile")(inventory)
    select = _named(solver, SOLVERS, "solver")
    alike: dict[tuple[str, bool], list[int]] = defaultdict(list)
    for k, budget in enumerate(budgets):
        alike[budget.resource, budget.amount > _size(inventory, budget.resource)].append(k)
    plans: dict[int, Plan] = {}
    for (resource, above), group in alike.items():
        pricer = Pricer(
            rules=rules, profile=evidence, generators=tuple(known.values()), above=above
        )
        task = _Task(pricer=pricer, resource=resource, generators=known)
        made = task.solve([budgets[k] for k in group], [asked[k] for k in group], select)
        plans |= dict(zip(group, made, strict=True))
    return [_order_banks(plans[k], names) for k in range(len(budgets))]


def resolve_generators(generators: Sequence[str | Generator] | None) -> dict[str, Generator]:
    """Name -> generator, from names and objects; ``dedicated`` is always among them."""
    given = DEFAULT_GENERATORS if generators is None else generators
    resolved = [_named(generator, GENERATORS, "generator") for generator in given]
    return {"dedicated": GENERATORS["dedicated"], **{each.name: each for each in resolved}}


def nameable_generators(generators: Sequence[str | Generator] | None) -> dict[str, Generator]:
    """Name -> generator, of all that a plan or pin may name: those given and all registered."""
    return {**GENERATORS, **resolve_generators(generators)}


def _named(value: str | _T, known: Mapping[str, _T], what: str) -> _T:
    if not isinstance(value, str):
        return value
    if value not in known:
        raise NPASError(f"{what}={value!r} is not known; there are {', '.join(map(repr, known))}")
    return known[value]


def _sort_sites(rules: Rules) -> Rules:
    """Number the sites by what they are, so that neither names nor order decide on a plan."""
    sites = rules.inventory.sites
    spot = {
        name: (number, block, place)
        for number, repeats in enumerate(rules.inventory.repeats)
        for block, names in enumerate(repeats.sites)
        for place, name in enumerate(names)
    }

    def content(k: int) -> tuple[Any, ...]:
        site = sites[k]
        kind = (site.kind, site.role, site.shape, site.uses, str(site.dtype), str(site.device))
        return (site.depth, *kind, spot.get(site.name, ()), k)

    order = sorted(range(len(sites)), key=content)
    new = {k: number for number, k in enumerate(order)}

    def renumber(members: Iterable[int]) -> tuple[int, ...]:
        return tuple(sorted(new[k] for k in members))

    return replace(
        rules,
        inventory=replace(rules.inventory, sites=tuple(sites[k] for k in order)),
        private=frozenset(renumber(rules.private)),
        groups=tuple(map(renumber, rules.groups)),
        apart=tuple(map(renumber, rules.apart)),
        pinned=tuple(replace(pin, sites=renumber(pin.sites)) for pin in rules.pinned),
    )


def _order_banks(plan: Plan, names: Sequence[str]) -> Plan:
    """Put sites and banks into the order in which the model lists the weights."""
    place = {name: k for k, name in enumerate(names)}
    banks = [
        replace(bank, sites=tuple(sorted(bank.sites, key=place.__getitem__))) for bank in plan.banks
    ]
    return replace(plan, banks=tuple(sorted(banks, key=lambda bank: place[bank.sites[0]])))


def _size(inventory: Inventory, resource: str) -> int:
    """What the plain model takes of a resource."""
    is_bytes = resource == "bytes"
    sites = sum(site.num_bytes if is_bytes else site.numel for site in inventory.sites)
    return sites + _stays(inventory, resource)


def _stays(inventory: Inventory, resource: str) -> int:
    return inventory.num_kept_bytes if resource == "bytes" else inventory.num_kept


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """Budgets of one resource, all below the model's size or all above it."""

    pricer: Pricer
    resource: str
    generators: Mapping[str, Generator]

    def solve(
        self, budgets: Sequence[Budget], asked: Sequence[object], select: Solver
    ) -> list[Plan]:
        """Make a plan for each budget."""
        rules = self.pricer.rules
        left = [budget.amount - _stays(rules.inventory, self.resource) for budget in budgets]
        refined, selections = self._select([max(amount, 0) for amount in left], select)
        plans = []
        for k, selection in enumerate(selections):
            if left[k] < 0 or selection.obstacle is not None:
                raise self._say_infeasible(refined.candidates, budgets[k], asked[k])
            chosen = [refined.candidates[c] for c in selection.chosen]
            banks = fill(
                chosen,
                left[k] - sum(getattr(candidate, self.resource) for candidate in chosen),
                budgets[k].resource,
                rules=rules,
                profile=self.pricer.profile,
                generators=self.generators,
            )
            plans.append(_write_plan(budgets[k], rules, banks, self._certify(selection, refined)))
        return plans

    def _select(self, amounts: Sequence[int], select: Solver) -> tuple[Refined, list[Selection]]:
        """Refine the candidates for all amounts together, and choose for each."""
        pricer = self.pricer
        candidates = propose(pricer)
        entries = sum(len(candidate.sites) for candidate in candidates)
        rounds = min(_MOST_ROUNDS, _MOST_ENTRIES // max(entries, 1))

        def price(given: Sequence[Candidate]) -> list[Pricing | None]:
            return price_sites(self._problem(given), amounts)

        refined = refine(candidates, pricer, price, rounds=rounds)
        selections = select_each(self._problem(refined.candidates), amounts, select)
        # What is left between the relaxation and the plans, further candidates may fill.
        more = add_near(refined, pricer, selections) if refined.pricings else None
        if more is None:
            return refined, selections
        known = [selection.chosen for selection in selections]
        return more, select_each(self._problem(more.candidates), amounts, select, known)

    def _problem(self, candidates: Sequence[Candidate]) -> PlanningProblem:
        """Ask for a plan from these candidates, the first of which are pinned, at any budget."""
        rules = self.pricer.rules
        cost = tuple(getattr(candidate, self.resource) for candidate in candidates)
        return PlanningProblem(
            num_sites=len(rules.inventory.sites),
            members=tuple(candidate.sites for candidate in candidates),
            price=tuple(candidate.price for candidate in candidates),
            cost={self.resource: cost},
            budget={self.resource: sum(cost)},
            private=rules.private,
            same_bank=rules.groups,
            different_bank=rules.apart,
            max_banks=rules.max_banks,
            pin=tuple(range(len(rules.pinned))),
        )

    def _say_infeasible(
        self, candidates: Sequence[Candidate], budget: Budget, asked: object
    ) -> NPASError:
        """Write the error for a budget that cannot be met, with what each rule takes of it."""
        rules, resource = self.pricer.rules, self.resource
        stays = _stays(rules.inventory, resource)
        problem = self._problem(candidates)
        obstacle = find_obstacle(replace(problem, budget={resource: max(0, budget.amount - stays)}))
        savings: dict[str, Mapping[str, int]] = {}
        blocking: list[str] = []
        for rule, easier in islice(_without_each_rule(rules), _MOST_RULES):
            # Candidates are made by the rules, so without one of them there are others.
            task = replace(self, pricer=replace(self.pricer, rules=easier))
            least = smallest_budgets(task._problem(propose(task.pricer))).get(resource)
            if least is None:
                continue
            if resource not in obstacle.smallest:
                blocking.append(rule)
            elif least < obstacle.smallest[resource]:
                savings[rule] = {resource: obstacle.smallest[resource] - least}
        blocking += [rule for rule in obstacle.blocking if rule not in blocking]
        obstacle = replace(obstacle, savings=savings, blocking=tuple(blocking))
        return say_infeasible(rules, budget, asked, obstacle, stays)

    def _certify(self, selection: Selection, refined: Refined) -> Certificate:
        assert selection.objective is not None
        assert selection.bound is not None
        assert selection.gap is not None
        assert selection.status != "infeasible"
        return Certificate(
            objective=selection.objective,
            bound=selection.bound,
            gap=selection.gap,
            status=selection.status,
            reproducible=selection.is_reproducible,
            seconds=selection.seconds,
            candidates=selection.num_candidates,
            rounds=refined.rounds,
            shadow_price=selection.shadow_price.get(self.resource),
            scope=(
                "single sites, classes of one shape, role or place, runs in depth and clustering "
                f"trees, times {', '.join(self.generators)}, priced from {self.pricer.profile.name}"
            ),
        )


def _without_each_rule(rules: Rules) -> Iterator[tuple[str, Rules]]:
    """What a solver calls a rule -> the rules without it."""
    if rules.private:
        yield "private", replace(rules, private=frozenset())
    if rules.max_banks is not None:
        yield "max_banks", replace(rules, max_banks=None)
    for rule, groups in (("same_bank", "groups"), ("different_bank", "apart"), ("pin", "pinned")):
        given = getattr(rules, groups)
        for k in range(len(given)):
            yield f"{rule}[{k}]", replace(rules, **{groups: given[:k] + given[k + 1 :]})


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
