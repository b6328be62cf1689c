"""Made-up networks of repeated blocks, and all the banks that a plan of one may choose from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.cluster.hierarchy import linkage

from npas_fx.solvers import PlanningProblem

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]
_Sites = tuple[int, ...]

RESOURCE = "parameters"
# Candidates that an instance has at least; of other numbers of sites, as many for each as 600 have.
LEAST_CANDIDATES = {600: 14_000, 2_000: 48_000, 10_000: 150_000}

# How much a weight of each role matters.
ROLES = {"reader": 1.0, "writer": 1.25, "projection": 1.0, "shortcut": 1.0}
ENDS = 4.0  # the first and the last weight
WIDTHS = range(256, 1025, 64)
# Elements of a weight, as a multiple of the width's square.
SHAPES = (0.25, 1.0, 1.0, 2.0, 4.0)
BLOCK_LENGTHS = range(4, 9)
IRREGULAR = 0.25  # this share of the weights has a size of its own

# Sizes of a bank, as shares of its weights.
SMALLEST, LARGEST = 0.02, 0.8
# Runs of whole blocks, and of the weights in one place of the blocks.
BLOCK_RUNS = (1, 2, 4, 8)
PLACE_RUNS = (4, 8, 16, 32)
# Distances are kept for so many sites at once, which takes 200 MB; a larger network has a tree for
# each of its parts.
TREE_SITES = 5_000

# The price of a bank that owns this share of the parameters of its weights, P in number::
#
#     sum_i e_i (REUSE ln(1 / share) + RANK max(0, sqrt(numel_i / P) - 1)
#                + (1 - share) (DEPTH d_i + MIXED u_i))
#
# with the importance e_i of each weight, how far it is from the bank's middle in depth, d_i, and
# what share of the bank is of another role, u_i. It is convex in the share. A bank of many weights
# has room for their ranks, a bank of few has them near and alike: so sharing pays, and not all.
REUSE, RANK, DEPTH, MIXED = 0.01, 0.03, 0.04, 0.06
RESOLUTION = 2.0**-32


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """The weights of a network, from input to output.

    Attributes:
        role: ``(S,)``, a number for each role.
        stage: ``(S,)``; blocks are the same within a stage.
        block: ``(S,)``, which one it is in, those of all stages counted through.
        place: ``(S,)``, in the block.
        depth: ``(S,)``, 0 at the input, 1 at the output.
        numel: ``(S,)``, elements.
        importance: ``(S,)``, in all summing to 1.
    """

    role: _Ints
    stage: _Ints
    block: _Ints
    place: _Ints
    depth: _Floats
    numel: _Ints
    importance: _Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """A planning problem but for its budget.

    Attributes:
        network: Whose weights are the sites.
        families: Family -> the site sets that it proposes; two families may propose the same one.
        num_sizes: Of the banks for each site set.
        members: Candidate -> its sites.
        price: Candidate -> its price.
        cost: Candidate -> its parameters.
    """

    network: Network
    families: dict[str, frozenset[_Sites]]
    num_sizes: int
    members: tuple[_Sites, ...]
    price: tuple[float, ...]
    cost: tuple[int, ...]

    @property
    def num_sites(self) -> int:
        """Number of sites."""
        return len(self.network.numel)

    def amount(self, budget: float) -> int:
        """How many parameters this share of the network's is."""
        return int(budget * int(self.network.numel.sum()))

    def problem(self, budget: float) -> PlanningProblem:
        """Ask for a plan within this share of the network's parameters."""
        return PlanningProblem(
            num_sites=self.num_sites,
            members=self.members,
            price=self.price,
            cost={RESOURCE: self.cost},
            budget={RESOURCE: self.amount(budget)},
        )


def make_instance(num_sites: int, seed: int) -> Instance:
    """Draw a network and list the candidates: families of site sets, times sizes."""
    random = np.random.default_rng([num_sites, seed])
    network = draw_network(num_sites, random)
    families = {name: frozenset(sets) for name, sets in _families(network, random)}
    site_sets = sorted(frozenset[_Sites]().union(*families.values()))
    least = LEAST_CANDIDATES.get(num_sites, num_sites * LEAST_CANDIDATES[600] // 600)
    num_sizes = max(1, -(-(least - num_sites) // len(site_sets)))
    members, price, cost = _price(network, site_sets, num_sizes)
    return Instance(
        network=network,
        families=families,
        num_sizes=num_sizes,
        members=members,
        price=price,
        cost=cost,
    )


def draw_network(num_sites: int, random: np.random.Generator) -> Network:
    """Draw stages of blocks, each stage with a width and a block of its own.

    Args:
        num_sites: 3 or more.
        random: Advances.
    """
    inner = num_sites - 2
    num_stages = min(max(2, round(num_sites**0.5 / 6)), inner)
    stage = np.arange(inner) * num_stages // inner
    role, block, place, numel = (np.zeros(inner, np.int64) for _ in range(4))
    for number in range(num_stages):
        width, length = random.choice(WIDTHS), random.choice(BLOCK_LENGTHS)
        (sites,) = np.nonzero(stage == number)
        block[sites] = 1 + block.max() + np.arange(len(sites)) // length
        place[sites] = np.arange(len(sites)) % length
        role[sites] = random.integers(len(ROLES), size=length)[place[sites]]
        numel[sites] = (width**2 * random.choice(SHAPES, size=length))[place[sites]]
    is_irregular = random.random(inner) < IRREGULAR
    numel[is_irregular] = numel[is_irregular] * random.uniform(0.6, 1.4, is_irregular.sum())
    ends = random.integers(10_000, 1_000_000, size=2)
    numel = np.concatenate([ends[:1], numel, ends[1:]])
    importance = np.array([ENDS, *np.array(list(ROLES.values()))[role], ENDS]) * np.sqrt(numel)
    return Network(
        role=np.concatenate([[len(ROLES)], role, [len(ROLES) + 1]]),
        stage=np.concatenate([[0], stage, [num_stages - 1]]),
        block=np.concatenate([[0], block, [block.max() + 1]]),
        place=np.concatenate([[-1], place, [-2]]),
        depth=np.linspace(0, 1, num_sites),
        numel=numel,
        importance=importance / importance.sum(),
    )


def _families(
    network: Network, random: np.random.Generator
) -> Iterator[tuple[str, Iterable[_Sites]]]:
    singles = [(i,) for i in range(len(network.numel))]
    features = np.stack([4 * network.depth, 0.7 * network.role, 0.3 * np.log(network.numel)], 1)
    features += 0.05 * random.standard_normal(features.shape)
    blocks = _classes(network.block)
    same_place = _classes(network.stage, network.place)
    yield "singles", singles
    yield "average-linkage tree", _tree(features, "average")
    yield "complete-linkage tree", _tree(features, "complete")
    yield "runs of neighbouring blocks", _runs(blocks, BLOCK_RUNS)
    for_each_place = ([(i,) for i in sites] for sites in same_place)
    yield (
        "runs in one place of the blocks",
        chain.from_iterable(_runs(sites, PLACE_RUNS) for sites in for_each_place),
    )
    yield "one place of the blocks", same_place
    yield "same shape", _classes(network.role, network.numel)
    yield "same role", _classes(network.role)


def _classes(*keys: _Ints) -> list[_Sites]:
    """Sites that are the same in all of this."""
    classes: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for site, key in enumerate(np.stack(keys, 1).tolist()):
        classes[tuple(key)].append(site)
    return [tuple(sites) for sites in classes.values()]


def _runs(parts: Sequence[_Sites], lengths: Iterable[int]) -> Iterator[_Sites]:
    """Runs of each length, at every half length."""
    for length in lengths:
        for start in range(0, len(parts) - length + 1, max(1, length // 2)):
            yield tuple(chain.from_iterable(parts[start : start + length]))


def _tree(features: _Floats, method: Literal["average", "complete"]) -> Iterator[_Sites]:
    """Nodes of clustering trees over the sites, one tree for each part of a large network."""
    num_parts = -(-len(features) // TREE_SITES)
    for part in np.array_split(np.arange(len(features)), num_parts):
        nodes: list[_Sites] = [(i,) for i in part.tolist()]
        for left, right, *_ in linkage(features[part], method).tolist():
            nodes.append(tuple(sorted(nodes[int(left)] + nodes[int(right)])))
            yield nodes[-1]


def _price(
    network: Network, site_sets: Sequence[_Sites], num_sizes: int
) -> tuple[tuple[_Sites, ...], tuple[float, ...], tuple[int, ...]]:
    """Members, price and cost of each candidate; a site alone may also stay as it is, for 0."""
    lengths = np.array([len(sites) for sites in site_sets])
    flat = np.fromiter(chain.from_iterable(site_sets), np.int64, int(lengths.sum()))
    starts = np.cumsum(lengths) - lengths
    numel = np.add.reduceat(network.numel[flat], starts)
    importance = network.importance[flat]
    total = np.add.reduceat(importance, starts)
    middle = np.add.reduceat(importance * network.depth[flat], starts) / total
    far = np.add.reduceat(
        importance * np.abs(network.depth[flat] - np.repeat(middle, lengths)), starts
    )
    like = sum(
        np.add.reduceat(importance * (network.role[flat] == role), starts) ** 2
        for role in range(len(ROLES) + 2)
    )
    unlike = total - like / total
    share = np.geomspace(SMALLEST, LARGEST, num_sizes)
    # (F, N), a row for each site set and a column for each size.
    owned = np.outer(numel, share)
    price = np.outer(total, REUSE * -np.log(share))
    price += np.outer(DEPTH * far + MIXED * unlike, 1 - share)
    root = np.sqrt(network.numel[flat])
    for size in range(num_sizes):
        lost = np.maximum(root / np.repeat(np.sqrt(owned[:, size]), lengths) - 1, 0)
        price[:, size] += RANK * np.add.reduceat(importance * lost, starts)
    templates = np.ceil(np.outer(lengths, share)).astype(np.int64)
    cost = owned.astype(np.int64) + templates * lengths[:, None]
    steps = np.maximum(np.rint(price / RESOLUTION), 1)  # never as good as staying as it is
    is_single = lengths == 1
    members = [sites for sites in site_sets for _ in range(num_sizes)]
    members += [sites for sites in site_sets if len(sites) == 1]
    order = sorted(range(len(members)), key=members.__getitem__)
    prices = [*(steps * RESOLUTION).ravel().tolist(), *[0.0] * int(is_single.sum())]
    costs = [*cost.ravel().tolist(), *numel[is_single].tolist()]
    return (
        tuple(members[k] for k in order),
        tuple(prices[k] for k in order),
        tuple(costs[k] for k in order),
    )
