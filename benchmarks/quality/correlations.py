"""Whether predicted prices rank plans as training does, and which roles miss parameters most."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from npas_fx.ir import Inventory
from quality.plans import read_banks
from quality.prices import PRICES, price_plan
from quality.records import Row

NUM_RESAMPLES = 2000
Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class BootstrapEstimate:
    """A figure with the 95 % interval of a bootstrap over plans, within each budget."""

    value: float
    low: float
    high: float

    @property
    def includes_zero(self) -> bool:
        """Whether nothing can be said of its sign."""
        return self.low <= 0 <= self.high


def correlate_prices(rows: Sequence[Row], inventory: Inventory) -> dict[str, BootstrapEstimate]:
    """Rank correlation of predicted price and validation loss, for each price, best first.

    Args:
        rows: runs of plans, several for each budget.
        inventory: of the plain network that they are plans for.

    Returns:
        Name of a price -> the mean over budgets of Spearman's correlation within a budget.
    """
    found = {}
    for name, profiler in PRICES.items():
        profile = profiler(inventory)
        prices = [price_plan(profile, inventory, row.result.plan) for row in rows]
        # Equal prices are sums in another order: rounded, they are a tie.
        ranked = np.round(prices, 12)
        columns = np.column_stack([ranked, [row.result.valid_loss for row in rows]])
        found[name] = _bootstrap(_group(rows, columns), _mean_correlation)[0]
    return dict(sorted(found.items(), key=lambda item: -item[1].value))


def regress_roles(rows: Sequence[Row], inventory: Inventory) -> dict[str, BootstrapEstimate]:
    """What it costs to take parameters from a role, all else equal.

    A linear regression of the validation loss, within each budget, on the shares of the model's
    parameters that the weights of each role lack.

    Returns:
        Role -> rise of the loss, in nats, for one percent of the model's parameters that this role
        lacks more than the average of all roles does; highest first.
    """
    roles = sorted({site.role for site in inventory.sites})
    total = sum(site.numel for site in inventory.sites)
    lacking = np.zeros((len(rows), len(roles)))
    for index, row in enumerate(rows):
        for sites, _, size in read_banks(row.result.plan):
            owned = size.num_templates * size.template_size + size.num_partial
            missing = 1 - owned / sum(inventory.sites[k].numel for k in sites)
            for k in sites:
                site = inventory.sites[k]
                lacking[index, roles.index(site.role)] += 100 * missing * site.numel / total
    loss = [row.result.valid_loss for row in rows]
    groups = _group(rows, np.column_stack([lacking, loss]))
    varying = [k for k in range(len(roles)) if any(np.ptp(group[:, k]) > 0.5 for group in groups)]
    estimates = _bootstrap([group[:, [*varying, -1]] for group in groups], _slopes)
    named = {roles[k]: estimate for k, estimate in zip(varying, estimates, strict=True)}
    return dict(sorted(named.items(), key=lambda item: -item[1].value))


def _group(rows: Sequence[Row], columns: Values) -> list[Values]:
    budgets: dict[float, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        budgets[row.run.budget].append(index)
    return [columns[indices] for indices in budgets.values() if len(indices) > 2]


def _mean_correlation(groups: Sequence[Values]) -> list[float]:
    return [float(np.mean([_spearman(group[:, 0], group[:, -1]) for group in groups]))]


def _spearman(a: Values, b: Values) -> float:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0  # a price that is the same for all ranks nothing
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def _slopes(groups: Sequence[Values]) -> list[float]:
    centred = np.concatenate([group - group.mean(0) for group in groups])
    slopes, *_ = np.linalg.lstsq(centred[:, :-1], centred[:, -1], rcond=None)
    return [float(slope) for slope in slopes - slopes.mean()]


def _bootstrap(
    groups: Sequence[Values], estimate: Callable[[Sequence[Values]], list[float]]
) -> list[BootstrapEstimate]:
    random = np.random.default_rng(0)
    resampled = [
        estimate([group[random.integers(len(group), size=len(group))] for group in groups])
        for _ in range(NUM_RESAMPLES)
    ]
    low, high = np.quantile(np.array(resampled), [0.025, 0.975], axis=0)
    return [
        BootstrapEstimate(value=value, low=float(low[k]), high=float(high[k]))
        for k, value in enumerate(estimate(groups))
    ]
