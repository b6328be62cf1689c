"""Networks as one would make them by hand, and the published method: no plan of ours in them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from quality.contestant import (
    Assignment,
    Contestant,
    count_others,
    count_parameters,
    find_matrices,
    make_network,
)
from quality.generated import Generated, LowRank, Overparameterized, Rescaled
from quality.ssn import FlatBanks, SearchBank, cluster, split_budget
from quality.training import Training, fit

SSN_GROUPS = 4


def make_plain(given: Assignment) -> Contestant:
    """The plain network, whatever the budget."""
    return Contestant(module=given.model)


def make_narrower(given: Assignment) -> Contestant:
    """The widest network of the same depth."""
    task = given.task
    width = _widest(given, task.depth)
    if width is None:
        raise ValueError(f"no network of depth {task.depth} has {given.budget} parameters or fewer")
    return Contestant(module=make_network(given, width, task.depth))


def make_shallower(given: Assignment) -> Contestant:
    """The shallowest network that uses nine tenths of the budget, or the fullest; none wider."""
    fitting = []
    for depth in given.task.depths:
        width = _widest(given, depth)
        if width is not None:
            fitting.append(make_network(given, width, depth))
            if count_parameters(fitting[-1]) >= 0.9 * given.budget:
                break
    if not fitting:
        raise ValueError(f"no network has {given.budget} parameters or fewer")
    return Contestant(module=max(fitting, key=count_parameters))


def make_low_rank(given: Assignment) -> Contestant:
    """Each weight a product of two factors; ranks are one share of the full ranks, or one more."""
    sites = find_matrices(given.model)
    kept = count_others(given.model, {site.name: site.shape for site in sites})
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


def make_overparameterized(given: Assignment) -> Contestant:
    """Each weight a sum of templates of its own, largest weights first."""
    sites = sorted(find_matrices(given.model), key=lambda site: -site.numel)
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
    shapes = {site.name: site.shape for site in find_matrices(given.model)}
    groups = _search_groups(given, shapes)
    alone = {group[0] for group in groups if len(group) == 1}
    sizes = split_budget(shapes, groups, given.budget - count_others(given.model, shapes))
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
        Training(
            module=Generated(given.model, weights, tuple(shapes)).to(given.task.recipe.device),
            task=given.task,
            steps=max(1, round(0.15 * given.steps)),
            seed=given.seed,
            rates=given.rates,
            coefficients=search.coefficients(),
        )
    )
    number = min(SSN_GROUPS, len(shapes))
    return cluster(search.raw_coefficients(), list(shapes), number, given.seed)


def _widest(given: Assignment, depth: int) -> int | None:
    fitting = (
        width
        for width in reversed(given.task.widths)
        if count_parameters(make_network(given, width, depth)) <= given.budget
    )
    return next(fitting, None)
