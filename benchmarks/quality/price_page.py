"""The page on what prices are worth: rank correlations, and what roles miss most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from npas_fx.ir import Inventory
from quality.correlations import NUM_RESAMPLES, BootstrapEstimate, correlate_prices, regress_roles
from quality.records import Row
from quality.tables import describe_machines, percent

EXPLANATION = (
    "Each run trains one plan. The first table gives Spearman's "
    "rank correlation of predicted price and validation loss, within a budget, averaged over the "
    "budgets: +1 where the price ranks plans as training does, 0 where it says nothing. The second "
    "gives what one percent of the model's parameters costs, in nats, where this role has to miss "
    "it, compared with the average role; from a linear regression within each budget. Intervals: "
    f"95 %, of {NUM_RESAMPLES:,} bootstrap samples of the plans; where one includes zero, the last "
    "column says so."
)


def write_prices(
    rows: Sequence[Row], inventories: Mapping[tuple[str, str], Inventory], *, command: str
) -> str:
    """The page of a study of random plans.

    Args:
        rows: of the study.
        inventories: task and setting -> that of the plain network.
        command: that makes the page.
    """
    parts = ["# What the price is worth", f"`{command}`", describe_machines(rows), EXPLANATION]
    for (task, setting), inventory in inventories.items():
        chosen = [row for row in rows if (row.run.task, row.run.setting) == (task, setting)]
        counts = Counter(row.run.budget for row in chosen)
        plans = ", ".join(
            f"{counts[budget]} plans at {percent(budget)}" for budget in sorted(counts)
        )
        steps = " or ".join(str(each) for each in sorted({row.run.steps for row in chosen}))
        parts += [f"## {task}, {setting}", f"{plans}; {steps} steps each."]
        parts.append(_write("price", correlate_prices(chosen, inventory), digits=2))
        parts.append(_write("role", regress_roles(chosen, inventory), digits=4))
    return "\n\n".join(parts) + "\n"


def _write(what: str, estimates: Mapping[str, BootstrapEstimate], digits: int) -> str:
    lines = [f"| {what} | estimate | interval | says |", "|---|---|---|---|"]
    for name, each in estimates.items():
        interval = f"{each.low:+.{digits}f} to {each.high:+.{digits}f}"
        says = (
            "nothing: zero is included"
            if each.includes_zero
            else "positive"
            if each.value > 0
            else "negative"
        )
        lines.append(f"| {name} | {each.value:+.{digits}f} | {interval} | {says} |")
    return "\n".join(lines)
