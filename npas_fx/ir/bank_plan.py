"""The plan: which sites share which bank, as data that can be printed, written, edited and read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from io import StringIO
from typing import Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from npas_fx.errors import NPASError, PlanError
from npas_fx.ir.budget import Budget
from npas_fx.ir.size import Size

VERSION: Literal[1] = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BankPlan:
    """One bank of a plan.

    Attributes:
        sites: names of the weights that it generates; a dedicated weight is a bank of one site.
        generator: name of the generator.
        size: how many templates it has and how long they are.
        parameters: trainable parameters that it owns: templates, coefficients and gains.
        bytes: bytes of these.
    """

    sites: tuple[str, ...]
    generator: str
    size: Size
    parameters: int
    bytes: int

    @property
    def is_dedicated(self) -> bool:
        """Whether the one weight simply stays the parameter it was."""
        return self.generator == "dedicated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """How good the selection of banks is, for these prices and these candidates.

    It speaks of the selection before the last parameters of the budget are filled in, which never
    raises a price.

    Attributes:
        objective: summed price of the chosen banks; 0 when every weight is dedicated.
        bound: no selection from these candidates has a lower price.
        gap: ``(objective - bound) / max(|objective|, eps)``, and 0 when both are equal.
        status: ``optimal`` when the solver proved it, else ``feasible``.
        reproducible: whether the same input gives the same plan: no limit of wall time ended the
            search.
        seconds: wall time of the solver; None when read from a file, not part of equality.
        candidates: number of candidates that the optimum is over.
        rounds: how often candidates were added that could make the plan better.
        shadow_price: by how much one more of what is budgeted would lower the objective, at the
            linear relaxation; None where the solver does not know.
        scope: what the candidates and their prices are, for the user to read.
    """

    objective: float
    bound: float
    gap: float
    status: Literal["optimal", "feasible"]
    reproducible: bool = True
    seconds: float | None = field(default=None, compare=False)
    candidates: int
    rounds: int = 0
    shadow_price: float | None = None
    scope: str

    def __str__(self) -> str:
        rounds = f" made in {self.rounds + 1} rounds" if self.rounds else ""
        stopped = "" if self.reproducible else "; stopped by wall time, so not reproducible"
        return (
            f"{self.status}, gap {self.gap:.2%} (objective {self.objective:.6g}, bound "
            f"{self.bound:.6g}) over {self.candidates:,} candidates{rounds}: {self.scope}{stopped}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which sites share which bank under a budget.

    Attributes:
        budget: what the emitted module may own.
        parameters: trainable parameters that it does own, each counted once.
        bytes: bytes of these.
        banks: every site is in exactly one.
        kept: parameters that stay as they are -> the reason.
        kept_parameters: trainable ones among these.
        kept_bytes: bytes of the trainable ones.
        model_parameters: trainable parameters of the model that was planned.
        site_parameters: elements of all sites.
        fresh_parameters: elements of the sites that start fresh, since their bank is shared.
        certificate: how good the plan is, or None for a plan written by hand.
        version: of the file format.
    """

    budget: Budget
    parameters: int
    bytes: int
    banks: tuple[BankPlan, ...]
    kept: Mapping[str, str]
    kept_parameters: int
    kept_bytes: int
    model_parameters: int
    site_parameters: int
    fresh_parameters: int
    certificate: Certificate | None
    version: Literal[1] = VERSION

    __pydantic_config__ = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        for resource in ("parameters", "bytes"):
            total = getattr(self, f"kept_{resource}") + sum(
                getattr(b, resource) for b in self.banks
            )
            if total != getattr(self, resource):
                raise PlanError(
                    f"the plan says {resource}={getattr(self, resource)}, but its banks and what "
                    f"stays add up to {total}; write that number"
                )
        names = Counter(name for bank in self.banks for name in bank.sites)
        names.update(self.kept.keys())
        twice = [name for name, count in names.items() if count > 1]
        if twice:
            raise PlanError(
                f"{twice[0]!r} stands in the plan more than once; leave it in one place"
            )

    @property
    def gain_of_one_percent(self) -> float | None:
        """What 1 % more of the budget would lower the objective by; see ``Certificate``."""
        price = None if self.certificate is None else self.certificate.shadow_price
        return None if price is None else 0.01 * self.budget.amount * price

    def to_json(self) -> str:
        """Write the plan as JSON; the same plan always gives the same text."""
        data = asdict(self)
        if self.certificate is not None:
            del data["certificate"]["seconds"]  # differs from run to run
        return json.dumps(data, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan that ``to_json`` wrote, perhaps edited by hand since.

        Raises:
            PlanError: the text is no JSON, a field is missing, unknown or of the wrong type, or
                the numbers do not add up.
        """
        try:
            return _ADAPTER.validate_json(text, strict=True)
        except ValidationError as err:
            where = "; ".join(
                f"{'.'.join(map(str, error['loc'])) or 'file'}: {error['msg']}"
                for error in err.errors()[:3]
            )
            raise PlanError(f"this is not a plan of version {VERSION}: {where}") from err
        except NPASError as err:
            raise PlanError(str(err)) from err

    def __str__(self) -> str:
        table = Table(title=f"plan for a budget of {self.budget}", title_justify="left")
        table.add_column("bank", justify="right")
        table.add_column("generator")
        table.add_column("sites", overflow="fold")
        table.add_column("templates", justify="right")
        table.add_column("parameters", justify="right")
        table.add_column("bytes", justify="right")
        for index, bank in enumerate(self.banks):
            table.add_row(str(index), *_cells(bank))
        reasons = Counter(self.kept.values())
        stays = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        kept = (f"{self.kept_parameters:,}", f"{self.kept_bytes:,}")
        table.add_row("", "stays", stays or "nothing", "", *kept, end_section=True)
        total = (f"{self.parameters:,}", f"{self.bytes:,}")
        table.add_row("", "total", f"of {self.model_parameters:,} plain", "", *total)
        with StringIO() as text:
            Console(file=text, width=110, color_system=None).print(table)
            lines = (line.rstrip() for line in text.getvalue().splitlines())
            return (
                "\n".join(lines) + "\n"
                f"{self.fresh_parameters:,} of {self.site_parameters:,} parameters start fresh\n"
                f"certificate: {self.certificate or 'none'}{self._say_gain()}"
            )

    def _say_gain(self) -> str:
        gain = self.gain_of_one_percent
        return "" if gain is None else f"\n1% more budget would lower the objective by {gain:.2g}"


def _cells(bank: BankPlan) -> tuple[str, ...]:
    templates = "" if bank.is_dedicated else _describe(bank.size, bank.parameters)
    names = "\n".join(bank.sites)
    return bank.generator, names, templates, f"{bank.parameters:,}", f"{bank.bytes:,}"


def _describe(size: Size, parameters: int) -> str:
    """Say how many templates there are, and what is owned beside them."""
    at_most = size.num_templates * size.template_size + size.num_partial
    times = "x" if at_most <= parameters else "of up to"
    partial = f" + {size.num_partial:,}" if size.num_partial else ""
    rank = f", rank {size.rank:,}" if size.rank else ""
    return f"{size.num_templates} {times} {size.template_size:,}{partial}{rank}"


_ADAPTER: TypeAdapter[Plan] = TypeAdapter(Plan)
