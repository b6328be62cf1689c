"""What capture found: the sites whose weights can be generated, and all that stays."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO

import torch
from rich.console import Console
from rich.table import Table

from npas_fx.ir.globs import find_globs

# What is printed at most; the fields of the inventory hold all.
_MOST_GLOBS = 8  # in a row
_MOST_REPEATS = 12
_MOST_OPAQUE = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One weight tensor that can be generated.

    Attributes:
        name: module path and parameter name, the first under which the model lists it.
        aliases: its other names, where it is tied or its module is shared.
        shape: of the weight tensor.
        dtype: of the weight tensor.
        device: of the weight tensor.
        kind: the operation that reads it: ``linear``, ``conv``, ``embedding``, ``attention
            projection``, ``recurrent``, or ``raw`` for any other.
        role: what the graph says it does, see ``npas_fx.passes.roles``.
        depth: where it is read, 0 at the input, 1 at the output.
        uses: how many operations read it.
        held_row: the padding row of an embedding, whose value stays as it is; None without one.
        num_parts: weights of equal shape that a fused one is made of, such as those of a q/k/v
            projection; generators see each by itself.
        parts_axis: along which these lie.
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
    num_parts: int = 1
    parts_axis: int = 0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Number of bytes."""
        return self.numel * self.dtype.itemsize

    @property
    def part_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of each weight that this one is made of; its own where it is not fused."""
        shape, axis = self.shape, self.parts_axis
        part = (*shape[:axis], shape[axis] // self.num_parts, *shape[axis + 1 :])
        return (part,) * self.num_parts


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
class Repeats:
    """Blocks that are the same again: the same operations, on weights of the same shapes.

    Attributes:
        signature: a hash of what they compute, equal under renaming.
        paths: of the modules that are the blocks, in the order in which they are called; of a block
            that is no module, those of its first and last weight.
        sites: names of the sites of each of them, those in the same place playing the same part.
    """

    signature: str
    paths: tuple[str, ...]
    sites: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opaque:
    """A module with weights that is called as it is, not traced into.

    Its weights are sites like all others, but what it does with them is not known: where there are
    several, they have the role ``other``.

    Attributes:
        path: of the module, the root as an empty string.
        kind: its class.
        reason: why it is not traced, with the line of code where there is one.
        numel: elements of its trainable parameters.
    """

    path: str
    kind: str
    reason: str
    numel: int


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Inventory:
    """All parameters of a model, each exactly once: a site, or kept with a reason.

    Attributes:
        sites: what can be generated.
        kept: what stays as it is.
        repeats: the largest blocks of the model that are repeated.
        opaque: the modules that are not traced into.
    """

    sites: tuple[Site, ...]
    kept: tuple[Kept, ...]
    repeats: tuple[Repeats, ...] = ()
    opaque: tuple[Opaque, ...] = ()

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

    def places(self) -> dict[str, tuple[int, int]]:
        """Name of a site in a repeated block -> which of ``repeats``, and its place in a block."""
        return {
            name: (number, place)
            for number, repeats in enumerate(self.repeats)
            for block in repeats.sites
            for place, name in enumerate(block)
        }

    @property
    def coverage(self) -> float:
        """Share of the trainable parameters that are in sites; 0 for a model without any."""
        total = self.num_parameters
        return 1 - self.num_kept / total if total else 0.0

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        head = (
            f"{self.num_parameters:,} trainable parameters, {self.coverage:.1%} of them in "
            f"{len(self.sites):,} sites, weights that can be generated"
        )
        tables = [
            *(self._sites_table(), self._kept_table(), self._repeats_table()),
            self._opaque_table(),
        ]
        with StringIO() as text:
            for table in tables:
                if table.row_count:
                    Console(file=text, width=110, color_system=None, markup=False).print(table)
            lines = (line.rstrip() for line in text.getvalue().splitlines())
            return "\n".join([head, *lines])

    def _sites_table(self) -> Table:
        table = _make_table("sites, from input to output", "kind", "role", "number", *_COUNTED)
        rows: dict[tuple[str, str], list[Site]] = defaultdict(list)
        for site in sorted(self.sites, key=lambda site: site.depth):
            rows[site.kind, site.role].append(site)
        for (kind, role), sites in rows.items():
            table.add_row(kind, role, *self._cells(sites))
        return table

    def _kept_table(self) -> Table:
        table = _make_table("what stays as it is", "reason", "number", *_COUNTED)
        rows: dict[str, list[Kept]] = defaultdict(list)
        for kept in self.kept:
            rows[kept.reason].append(kept)
        for reason, group in rows.items():
            table.add_row(reason, *self._cells(group))
        return table

    def _repeats_table(self) -> Table:
        table = _make_table(
            "repeated blocks", "signature", "number", "sites in each", *_COUNTED[:2], "modules"
        )
        numel = {site.name: site.numel for site in self.sites}
        sizes = [sum(numel[name] for names in r.sites for name in names) for r in self.repeats]
        shown = sorted(sizes, reverse=True)[:_MOST_REPEATS]
        for repeats, size in zip(self.repeats, sizes, strict=True):
            if size >= shown[-1]:
                table.add_row(
                    repeats.signature,
                    f"{len(repeats.paths):,}",
                    f"{len(repeats.sites[0]):,}",
                    f"{size:,}",
                    self._share(size),
                    _first_and_last(repeats.paths),
                )
        if table.row_count < len(sizes):
            table.add_row(f"and {len(sizes) - table.row_count:,} smaller")
        return table

    def _opaque_table(self) -> Table:
        table = _make_table("not traced into", "module", *_COUNTED[:2], "reason")
        largest = sorted(self.opaque, key=lambda opaque: -opaque.numel)
        for opaque in largest[:_MOST_OPAQUE]:
            name = f"{opaque.path} ({opaque.kind})" if opaque.path else opaque.kind
            table.add_row(name, f"{opaque.numel:,}", self._share(opaque.numel), opaque.reason)
        if len(largest) > _MOST_OPAQUE:
            table.add_row(f"and {len(largest) - _MOST_OPAQUE:,} smaller")
        return table

    def _cells(self, group: Sequence[Site | Kept]) -> Iterator[str]:
        numel = sum(item.numel for item in group)
        is_counted = all(isinstance(item, Site) or item.is_trainable for item in group)
        yield f"{len(group):,}"
        yield f"{numel:,}"
        yield self._share(numel) if is_counted else "not counted"
        yield _shorten(find_globs([item.name for item in group], self.names()))

    def _share(self, numel: int) -> str:
        share = numel / max(self.num_parameters, 1)
        return "< 0.1%" if 0 < share < 5e-4 else f"{share:.1%}"


_COUNTED = ("parameters", "share", "names")


def _make_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        is_number = column in ("number", "sites in each", "parameters", "share")
        table.add_column(column, justify="right" if is_number else "left", overflow="fold")
    return table


def _first_and_last(paths: Sequence[str]) -> str:
    return ", ".join(paths if len(paths) < 5 else (*paths[:2], "…", paths[-1]))


def _shorten(globs: Sequence[str]) -> str:
    more = len(globs) - _MOST_GLOBS
    return "\n".join([*globs[:_MOST_GLOBS], *([f"and {more:,} more"] if more > 0 else [])])
