"""What capture found: the sites whose weights can be generated, and all that stays."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One weight tensor that can be generated.

    Attributes:
        name: module path and parameter name, the first under which the model lists it.
        aliases: its other names, where it is tied or its module is shared.
        shape: of the weight tensor.
        dtype: of the weight tensor.
        device: of the weight tensor.
        kind: ``linear``, ``conv``, ``embedding`` or ``raw``: the operation that reads it.
        role: what the graph says it does, see ``npas_fx.passes.roles``.
        depth: where it is read, 0 at the input, 1 at the output.
        uses: how many operations read it.
        held_row: the padding row of an embedding, whose value stays as it is; None without one.
    """

    name: str
    aliases: tuple[str, ...] = ()
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    kind: str
    role: str
    depth: float
    uses: int
    held_row: int | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Number of bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A parameter that stays as it is.

    Attributes:
        name: module path and parameter name, the first under which the model lists it.
        aliases: its other names.
        reason: why it stays, for the user to read.
        shape: of the parameter.
        dtype: of the parameter.
        is_trainable: whether it counts towards the budget.
    """

    name: str
    aliases: tuple[str, ...] = ()
    reason: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_trainable: bool

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Number of bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """All parameters of a model, each exactly once: a site, or kept with a reason."""

    sites: tuple[Site, ...]
    kept: tuple[Kept, ...]

    def __iter__(self) -> Iterator[Site | Kept]:
        yield from self.sites
        yield from self.kept

    @property
    def num_parameters(self) -> int:
        """Trainable parameters of the model."""
        return sum(site.numel for site in self.sites) + self.num_kept

    @property
    def num_kept(self) -> int:
        """Trainable parameters that stay as they are."""
        return sum(kept.numel for kept in self.kept if kept.is_trainable)

    @property
    def num_kept_bytes(self) -> int:
        """Bytes of the trainable parameters that stay as they are."""
        return sum(kept.num_bytes for kept in self.kept if kept.is_trainable)

    def names(self) -> dict[str, str]:
        """Every name and alias of a parameter -> the name it goes by here."""
        return {alias: item.name for item in self for alias in (item.name, *item.aliases)}

    def __str__(self) -> str:
        lines = [f"{len(self.sites)} sites, {len(self.kept)} parameters stay"]
        for site in self.sites:
            tied = f" = {', '.join(site.aliases)}" if site.aliases else ""
            lines.append(f"  {site.name}{tied} {list(site.shape)} {site.kind}, {site.role}")
        lines += [f"  {kept.name} {list(kept.shape)} stays: {kept.reason}" for kept in self.kept]
        return "\n".join(lines)
