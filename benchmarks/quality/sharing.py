"""Networks that share by plans: ours, groups made by hand, and drawn plans."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

import npas_fx
from npas_fx.generators.wavg import WeightedAverage
from npas_fx.ir import Plan, Site
from quality.contestant import Assignment, Contestant, count_parameters, make_network
from quality.plans import (
    Drawn,
    Groups,
    count_generation_flops,
    cut_groups,
    describe_plan,
    group_sites,
    plan_groups,
    shuffle_groups,
)

_ENDS = ("stem", "head", "embedding")


def make_ours(given: Assignment) -> Contestant:
    """The default transform, or with one of the options ``generators``, ``generator``, ``gain``."""
    if "generator" in given.options:
        return _apply(given, _plan_with(given, given.options["generator"]))
    generators = given.options.get("generators")
    if given.options.get("gain") == "trained":
        generators = ["tied", TrainedGain()]
    shared = npas_fx.transform(given.model, given.budget, seed=given.seed, generators=generators)
    return _of_emitted(given.model, shared)


def _plan_with(given: Assignment, generator: str) -> Plan:
    """Plan with one generator, helped by ``wavg`` where it cannot use the budget by itself."""
    try:
        plan = npas_fx.plan(given.model, given.budget, generators=[generator])
    except npas_fx.InfeasibleBudgetError:
        plan = None
    if plan is None or plan.parameters < 0.99 * given.budget:
        plan = npas_fx.plan(given.model, given.budget, generators=[generator, "wavg"])
    return plan


def make_tied_by_role(given: Assignment) -> Contestant:
    """All weights of one role and shape are one, in a narrower network where that is too many."""
    return _tie(given, [10**9])


def make_tied_runs(given: Assignment) -> Contestant:
    """Runs of weights of one role and shape are one: the longest that use nine tenths."""
    return _tie(given, [2, 3, 4, 6, 8, 12, 16, 24, 10**9])


def make_one_bank(given: Assignment) -> Contestant:
    """All weights from one bank."""
    return _share(given, group_sites(given.model, lambda site: None))


def make_random_groups(given: Assignment) -> Contestant:
    """Groups of equal size, drawn; as many as the root of the number of weights."""
    everything = group_sites(given.model, lambda site: None)
    number = round(math.sqrt(len(everything[0])))
    return _share(given, shuffle_groups(everything, number, given.seed))


def make_groups(given: Assignment) -> Contestant:
    """Groups by what the option ``by`` says.

    ``role``, ``shape`` or ``kind``; ``place``: the same place in the blocks that are repeated;
    ``runs``: 4 consecutive ones of a role. Stem, head and embeddings stay dedicated.
    """
    by = given.options["by"]
    inventory = npas_fx.inspect(given.model)
    places = {
        name: (number, place)
        for number, repeats in enumerate(inventory.repeats)
        for block in repeats.sites
        for place, name in enumerate(block)
    }
    keys: dict[str, Callable[[Site], object]] = {
        "role": lambda site: (site.role, site.shape),
        "runs": lambda site: (site.role, site.shape),
        "shape": lambda site: site.shape,
        "kind": lambda site: site.kind,
        "place": lambda site: places.get(site.name, site.name),
    }
    ends = {site.name for site in inventory.sites if site.role in _ENDS}
    groups = [
        [name for name in group if name not in ends] for group in group_sites(given.model, keys[by])
    ]
    groups = [group for group in groups if group]
    return _share(given, cut_groups(groups, 4) if by == "runs" else groups)


def make_random_plan(given: Assignment) -> Contestant:
    """The plan that is best for random prices; the option ``draw`` is their seed."""
    draw = given.options["draw"]
    plan = npas_fx.plan(given.model, given.budget, profile=lambda inventory: Drawn(inventory, draw))
    return _apply(given, plan)


class TrainedGain(WeightedAverage):
    """``wavg`` with a trainable gain for each site."""

    name = "wavg_gain"

    def parameters(
        self, shapes: Sequence[tuple[int, ...]], size: Any
    ) -> Mapping[str, tuple[int, ...]]:
        """With ``gain (S,)``."""
        return {**super().parameters(shapes, size), "gain": (len(shapes),)}

    def buffers(
        self, shapes: Sequence[tuple[int, ...]], size: Any
    ) -> Mapping[str, tuple[int, ...]]:
        """Without it."""
        constants = dict(super().buffers(shapes, size))
        del constants["gain"]
        return constants


def _share(given: Assignment, groups: Groups) -> Contestant:
    return _apply(given, plan_groups(given.model, given.budget, groups))


def _apply(given: Assignment, plan: Plan) -> Contestant:
    return _of_emitted(given.model, npas_fx.apply(given.model, plan, seed=given.seed))


def _of_emitted(model: nn.Module, shared: nn.Module) -> Contestant:
    inventory, plan = npas_fx.inspect(model), npas_fx.plan_of(shared)
    groups = {group["name"]: group["params"] for group in npas_fx.param_groups(shared, 1.0, 0.0)}
    return Contestant(
        module=shared,
        coefficients=tuple(groups.get("coefficients", ())),
        generation_flops=count_generation_flops(plan, inventory),
        plan=describe_plan(plan, inventory),
    )


def _tie(given: Assignment, lengths: Sequence[int]) -> Contestant:
    """Tie in the longest runs that use nine tenths of the budget, or the shortest there are."""
    found = None
    for length in reversed(lengths):
        found = _tie_in_runs(given, length) or found
        if found is not None and count_parameters(found.module) >= 0.9 * given.budget:
            break
    if found is None:
        raise ValueError(f"tied networks of all widths have more than {given.budget} parameters")
    return found


def _tie_in_runs(given: Assignment, length: int) -> Contestant | None:
    """Tie in runs of one length, in the widest network that fits."""
    task = given.task
    for width in reversed(task.widths):
        model = given.model if width == task.width else make_network(given, width, task.depth)
        groups = group_sites(model, lambda site: (site.role, site.shape))
        runs = [run for run in cut_groups(groups, length) if len(run) > 1]
        needed = count_parameters(model)
        for run in runs:  # one weight is left of each, and a gain for each of its sites
            needed += len(run) - (len(run) - 1) * model.get_parameter(run[0]).numel()
        if needed <= given.budget:
            plan = plan_groups(model, needed, runs, ["tied"])
            return _of_emitted(model, npas_fx.apply(model, plan, seed=given.seed))
    return None
