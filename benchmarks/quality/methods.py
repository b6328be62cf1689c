"""All methods by name: each makes a network of at most the budget's parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import npas_fx
from npas_fx.generators.wavg import WeightedAverage
from npas_fx.ir import Plan, Site
from quality.generated import Generated, LowRank, Overparameterized, Rescaled
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
from quality.prices import PRICES
from quality.ssn import FlatBanks, SearchBank, cluster, split_budget
from quality.tasks import Task
from quality.training import Rates, fit


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """A network to train.

    Attributes:
        module: the network.
        coefficients: parameters of it that mix others.
        generation_flops: to make all weights once.
        plan: see ``describe_plan``; empty where there is none.
    """

    module: nn.Module
    coefficients: tuple[nn.Parameter, ...] = ()
    generation_flops: int = 0
    plan: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What a method is given.

    Attributes:
        task: it makes networks of other widths and depths.
        model: the plain network.
        budget: trainable parameters, a number.
        seed: of all that is drawn.
        steps: that the network will be trained for.
        lr: learning rate that it will be trained with.
        options: of the run.
    """

    task: Task
    model: nn.Module
    budget: int
    seed: int
    steps: int
    lr: float
    options: Mapping[str, Any]


_ENDS = ("stem", "head", "embedding")

Method = Callable[[Assignment], Contestant]


def make_ours(given: Assignment) -> Contestant:
    """The default transform, or with the options ``price``, ``generators`` or ``gain`` another."""
    price = given.options.get("price")
    options: dict[str, Any] = {}
    if price is not None:
        options["profile"] = PRICES[price]
    if "generators" in given.options:
        options["generators"] = given.options["generators"]
    if given.options.get("gain") == "trained":
        options["generators"] = ["tied", TrainedGain()]
    shared = npas_fx.transform(given.model, given.budget, seed=given.seed, **options)
    return _of_emitted(given.model, shared)


def make_plain(given: Assignment) -> Contestant:
    """The plain network, whatever the budget."""
    return Contestant(module=given.model)


def make_narrower(given: Assignment) -> Contestant:
    """The widest network of the same depth."""
    task = given.task
    width = _widest(given, task.depth)
    if width is None:
        raise ValueError(f"no network of depth {task.depth} has {given.budget} parameters or fewer")
    return Contestant(module=_make(given, width, task.depth))


def make_shallower(given: Assignment) -> Contestant:
    """The shallowest network that uses nine tenths of the budget, or the fullest; none wider."""
    fitting = []
    for depth in given.task.depths:
        width = _widest(given, depth)
        if width is not None:
            fitting.append(_make(given, width, depth))
            if count_parameters(fitting[-1]) >= 0.9 * given.budget:
                break
    if not fitting:
        raise ValueError(f"no network has {given.budget} parameters or fewer")
    return Contestant(module=max(fitting, key=count_parameters))


def make_tied_by_role(given: Assignment) -> Contestant:
    """All weights of one role and shape are one, in a narrower network where that is too many."""
    return _tie(given, [10**9])


def make_tied_runs(given: Assignment) -> Contestant:
    """Runs of weights of one role and shape are one: the longest that use nine tenths."""
    return _tie(given, [2, 3, 4, 6, 8, 12, 16, 24, 10**9])


def make_low_rank(given: Assignment) -> Contestant:
    """Each weight a product of two factors; ranks are one share of the full ranks, or one more."""
    sites = _matrices(given.model)
    kept = _count_others(given.model, {site.name: site.shape for site in sites})
    sides = {site.name: (site.shape[0], site.numel // site.shape[0]) for site in sites}

    def choose(share: float) -> dict[str, int]:
        ranks = {name: max(1, int(share * min(pair))) for name, pair in sides.items()}
        return {n: rank for n, rank in ranks.items() if rank * sum(sides[n]) < math.prod(sides[n])}

    def count(ranks: Mapping[str, int]) -> int:
        return kept + sum(
            ranks[name] * sum(pair) if name in ranks else math.prod(pair)
            for name, pair in sides.items()
        )

    shares = [step / 1000 for step in range(1, 1001) if count(choose(step / 1000)) <= given.budget]
    if not shares:
        raise ValueError(f"ranks of 1 have more than {given.budget} parameters")
    ranks = choose(max(shares))
    for name in sorted(ranks, key=lambda name: -math.prod(sides[name])):
        more = {**ranks, name: ranks[name] + 1}
        if count(more) <= given.budget:
            ranks = more
    weights = LowRank({name: given.model.get_parameter(name) for name in ranks}, ranks)
    flops = sum(2 * rank * math.prod(sides[name]) for name, rank in ranks.items())
    return Contestant(module=Generated(given.model, weights, tuple(ranks)), generation_flops=flops)


def make_one_bank(given: Assignment) -> Contestant:
    """All weights from one bank."""
    return _share(given, group_sites(given.model, lambda site: None))


def make_random_groups(given: Assignment) -> Contestant:
    """Groups of equal size, drawn; as many as the root of the number of weights."""
    everything = group_sites(given.model, lambda site: None)
    number = given.options.get("groups", round(math.sqrt(len(everything[0]))))
    return _share(given, shuffle_groups(everything, number, given.seed))


def make_groups(given: Assignment) -> Contestant:
    """Groups by what the option ``by`` says.

    ``role``, ``shape`` or ``kind``; ``place``: the same place in the blocks that are repeated;
    ``runs``: 4 consecutive ones of a role. Stem, head and embeddings stay dedicated.
    """
    by = given.options["by"]
    places = {
        name: (number, place)
        for number, repeats in enumerate(npas_fx.inspect(given.model).repeats)
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
    ends = {site.name for site in npas_fx.inspect(given.model).sites if site.role in _ENDS}
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


def make_overparameterized(given: Assignment) -> Contestant:
    """Each weight a sum of templates of its own, largest weights first."""
    sites = sorted(_matrices(given.model), key=lambda site: -site.numel)
    left = given.budget - count_parameters(given.model)
    counts = {site.name: 1 for site in sites}
    while True:
        before = left
        for site in sites:
            # The second template brings coefficients for both.
            cost = site.numel + (2 if counts[site.name] == 1 else 1)
            if cost <= left and counts[site.name] <= min(counts.values()):
                counts[site.name] += 1
                left -= cost
        if left == before:
            break
    counts = {name: count for name, count in counts.items() if count > 1}
    if not counts:
        raise ValueError(f"{given.budget} parameters are not more than the plain network has")
    random = torch.Generator().manual_seed(given.seed)
    parameters = {name: given.model.get_parameter(name) for name in counts}
    weights = Overparameterized(parameters, counts, random)
    flops = sum(2 * counts[name] * parameters[name].numel() for name in counts)
    return Contestant(
        module=Generated(given.model, weights, tuple(counts)),
        coefficients=tuple(weights.coefficients),
        generation_flops=flops,
    )


def make_ssn(given: Assignment) -> Contestant:
    """The published method: search, k-means, flat banks (Plummer et al., NPAS, ICLR 2022).

    The search takes 15 % more steps, which do not count. Each weight is multiplied by a constant
    with which it starts with the standard deviation that it has in the plain network: published
    starts suit networks with batch norm only.
    """
    shapes = {site.name: site.shape for site in _matrices(given.model)}
    groups = _search_groups(given, shapes)
    alone = {group[0] for group in groups if len(group) == 1}
    sizes = split_budget(shapes, groups, given.budget - _count_others(given.model, shapes))
    random = torch.Generator().manual_seed(given.seed)
    banks = FlatBanks(shapes, groups, sizes, random)
    names = tuple(name for name in shapes if name not in alone)
    weights = Rescaled(banks, {name: given.model.get_parameter(name) for name in names})
    return Contestant(
        module=Generated(given.model, weights, names),
        coefficients=tuple(banks.coefficients()),
        generation_flops=banks.generation_flops,
    )


def _search_groups(
    given: Assignment, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[tuple[str, ...], ...]:
    """Train a network whose weights mix the quarters of one bank, and cluster how they do."""
    random = torch.Generator().manual_seed(given.seed)
    search = SearchBank(shapes, sum(map(math.prod, shapes.values())), random)
    weights = Rescaled(search, {name: given.model.get_parameter(name) for name in shapes})
    fit(
        Generated(given.model, weights, tuple(shapes)).to(given.task.recipe.device),
        given.task,
        steps=max(1, round(0.15 * given.steps)),
        seed=given.seed,
        rates=Rates(lr=given.lr, weight_decay=given.task.recipe.weight_decay),
        coefficients=search.coefficients(),
    )
    number = min(given.options.get("groups", 4), len(shapes))
    return cluster(search.raw_coefficients(), list(shapes), number, given.seed)


METHODS: Mapping[str, Method] = {
    "ours": make_ours,
    "plain": make_plain,
    "narrower": make_narrower,
    "shallower": make_shallower,
    "tied_by_role": make_tied_by_role,
    "tied_runs": make_tied_runs,
    "low_rank": make_low_rank,
    "one_bank": make_one_bank,
    "random_groups": make_random_groups,
    "ssn": make_ssn,
    "overparameterized": make_overparameterized,
    "groups": make_groups,
    "random_plan": make_random_plan,
}


def count_parameters(module: nn.Module) -> int:
    """Count trainable parameters, each once."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


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
        model = given.model if width == task.width else _make(given, width, task.depth)
        groups = group_sites(model, lambda site: (site.role, site.shape))
        runs = [run for run in cut_groups(groups, length) if len(run) > 1]
        try:
            plan_groups(model, 1, runs, ["tied"])
        except npas_fx.InfeasibleBudgetError as err:
            needed = err.smallest
        if needed <= given.budget:
            plan = plan_groups(model, needed, runs, ["tied"])
            return _of_emitted(model, npas_fx.apply(model, plan, seed=given.seed))
    return None


def _matrices(model: nn.Module) -> list[Site]:
    """Weights that a layer multiplies with, and no embedding."""
    return [
        site
        for site in npas_fx.inspect(model).sites
        if len(site.shape) > 1 and site.kind in ("linear", "conv")
    ]


def _count_others(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Count trainable parameters but those of the given names."""
    return count_parameters(model) - sum(map(math.prod, shapes.values()))


def _make(given: Assignment, width: int, depth: int) -> nn.Module:
    torch.manual_seed(given.seed)
    return given.task.make(width, depth)


def _widest(given: Assignment, depth: int) -> int | None:
    fitting = (
        width
        for width in reversed(given.task.widths)
        if count_parameters(_make(given, width, depth)) <= given.budget
    )
    return next(fitting, None)
