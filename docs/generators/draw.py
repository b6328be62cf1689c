"""Draw the pictures of these pages: ``python docs/generators/draw.py`` (needs matplotlib).

Each shows real banks, just born, and what they generate; but their templates are patterns in place
of random numbers, from which one could not tell what is made of what.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import matplotlib
import PIL.Image
import torch
from matplotlib.figure import Figure
from torch import Tensor

from npas_fx.banks import Bank
from npas_fx.generators import GENERATORS
from npas_fx.ir import Size

FOLDER = Path(__file__).parent
WIDTH, DPI = 9.0, 100  # inches, and pixels of one
LARGEST = 0.11  # inches of an element
FEW = 9  # matrices of no more rows and columns are drawn twice as large
MARGIN, LABEL, TITLE = 0.3, 0.22, 0.35  # inches
HIDDEN = ("gain", "offset", "partial_coefficients")  # tensors that are not drawn
TEMPLATES, COEFFICIENTS = "RdBu_r", "PiYG"  # colour maps


@dataclass(frozen=True, kw_only=True)
class Row:
    """One bank of a picture.

    Attributes:
        generator: its name.
        shapes: of the weights.
        size: of the bank.
        columns: each template is drawn as an image of so many columns; None where there is one, and
            it is a matrix.
        cuts: lines are drawn in weights before these rows, and before these columns.
        is_flat: weights stand in one line.
        own: names of tensors that are drawn in parts, one for each weight.
        rows_of: name of a tensor -> the names of its rows; by default those of weights or tiles.
    """

    generator: str
    shapes: tuple[tuple[int, int], ...]
    size: Size
    columns: int | None = None
    cuts: tuple[Sequence[int], Sequence[int]] = ((), ())
    is_flat: bool = False
    own: Sequence[str] = ()
    rows_of: Mapping[str, Sequence[str]] = field(default_factory=dict)


class Image(NamedTuple):
    """A matrix; what it is called, and its rows where these have names."""

    values: Tensor
    label: str = ""
    rows: Sequence[str] = ()


class Group(NamedTuple):
    """Images of one kind, in columns.

    Attributes:
        title: of all.
        columns: of images.
        colors: a colour map.
        cell: each element is as wide as so many of a weight.
    """

    title: str
    columns: Sequence[Sequence[Image]]
    colors: str
    cell: int

    @property
    def width(self) -> int:
        """In elements of a weight, with one between columns."""
        return sum(self.widths) + len(self.columns) - 1

    @property
    def widths(self) -> list[int]:
        """Of its columns."""
        return [self.cell * max(im.values.shape[1] for im in images) for images in self.columns]

    @property
    def most(self) -> float:
        """The largest absolute value."""
        return max(image.values.abs().max().item() for each in self.columns for image in each)

    def height(self, inches: float) -> float:
        """In inches, where an element of a weight has so many."""
        rows = [sum(im.values.shape[0] for im in images) for images in self.columns]
        labels = [LABEL * len(images) for images in self.columns]
        return max(
            self.cell * inches * number + each for number, each in zip(rows, labels, strict=True)
        )


def one(generator: str, shapes: Sequence[tuple[int, int]], count: int, length: int) -> Row:
    """A bank of templates whose rows are as long as those of the weights."""
    columns = shapes[0][1]
    cuts = range(length // columns, max(rows for rows, _ in shapes), length // columns)
    size = Size(num_templates=count, template_size=length)
    return Row(
        generator=generator, shapes=tuple(shapes), size=size, columns=columns, cuts=(cuts, ())
    )


SQUARES = ((12, 12),) * 4
WIDE = ((12, 16), (9, 16))
WIDE_PAIR = ((12, 16), (12, 16))
PICTURES: dict[str, tuple[Row, ...]] = {
    "tied": (one("tied", SQUARES[:3], 1, 144),),
    "wavg": (one("wavg", SQUARES, 3, 144),),
    "wavg-tiles": (one("wavg", WIDE, 2, 48),),
    "avg": (one("avg", WIDE, 5, 48),),
    "emb": (one("emb", ((12, 16),) * 3, 4, 48),),
    "superweight": (
        Row(
            generator="superweight",
            shapes=((8, 8), (12, 8), (12, 12)),
            size=Size(num_templates=4, template_size=144),
            columns=8,
            cuts=((8,), (8,)),
            rows_of={"coefficients_1": ("W3",), "coefficients_2": ("W2", "W3")},
        ),
    ),
    "basis": (
        Row(
            generator="basis",
            shapes=((12, 16), (9, 16), (6, 16)),
            size=Size(num_templates=2, template_size=16),
            columns=16,
            own=("coefficients",),
        ),
    ),
    "recursive": (
        Row(
            generator="recursive",
            shapes=SQUARES[:3],
            size=Size(num_templates=1, template_size=144, rank=2),
            own=("templates_left", "templates_right"),
        ),
    ),
    "resized": (
        replace(one("wavg_bilinear", WIDE_PAIR, 2, 48), columns=8, cuts=((), ()), is_flat=True),
        *(
            replace(one(f"wavg_{rule}", WIDE_PAIR, 2, 48), is_flat=True)
            for rule in ("repeat", "mask", "slide", "upsample")
        ),
    ),
}


def main() -> None:
    """Draw all pictures."""
    for name, rows in PICTURES.items():
        draw(rows, FOLDER / f"{name}.png")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw one picture, a row for each bank; the same banks give the same bytes."""
    drawn = [list(groups_of(row)) for row in rows]
    elements = max(sum(group.width for group in groups) for groups in drawn)
    gaps = max(len(groups) for groups in drawn) - 1
    inches = min(LARGEST, (WIDTH - 2 * MARGIN - 0.6 * gaps) / elements)
    heights = [TITLE + max(group.height(inches) for group in groups) for groups in drawn]
    page = _Page(sum(heights) + MARGIN * len(rows), inches)
    top = MARGIN / 4
    for row, groups, height in zip(rows, drawn, heights, strict=True):
        room = WIDTH - 2 * MARGIN - inches * sum(group.width for group in groups)
        gap = room / len(groups)
        left = MARGIN + gap / 2
        most = max(group.most for group in groups if group.colors == TEMPLATES)
        for group in groups:
            is_last = group is groups[-1]
            if is_last:
                page.write(left - gap / 2, top + (TITLE + height) / 2, "→", size=16)
            scale = most if group.colors == TEMPLATES else group.most or 1.0
            page.draw_group(group, left, top, height, row.cuts if is_last else ((), ()), scale)
            left += inches * group.width + gap
        if len(rows) > 1:
            page.write(MARGIN / 2, top + (TITLE + height) / 2, row.generator, rotation=90)
        top += height + MARGIN
    with BytesIO() as file:
        page.figure.savefig(file, format="png", dpi=DPI)
        picture = PIL.Image.open(file).convert("RGB")
    picture.quantize(256, kmeans=1).save(path, optimize=True)  # a third of the size


class _Page:
    """A figure that is written on from the top, in inches."""

    def __init__(self, height: float, inches: float) -> None:
        self.figure = Figure(figsize=(WIDTH, height))
        self.height, self.inches = height, inches

    def write(self, x: float, y: float, text: str, size: int = 9, rotation: int = 0) -> None:
        spot = x / WIDTH, 1 - y / self.height
        self.figure.text(*spot, text, fontsize=size, rotation=rotation, ha="center", va="center")

    def draw_group(
        self,
        group: Group,
        left: float,
        top: float,
        height: float,
        cuts: tuple[Sequence[int], Sequence[int]],
        most: float,
    ) -> None:
        middle = left + self.inches * group.width / 2
        self.write(middle, top + TITLE / 2, group.title, size=10)
        start = top + TITLE + (height - TITLE - group.height(self.inches)) / 2
        for images, width in zip(group.columns, group.widths, strict=True):
            y = start
            for image in images:
                y += LABEL
                self._draw_image(image, group, left, y, cuts, most)
                y += self.inches * group.cell * image.values.shape[0]
            left += self.inches * (width + 1)

    def _draw_image(
        self,
        image: Image,
        group: Group,
        left: float,
        top: float,
        cuts: tuple[Sequence[int], Sequence[int]],
        most: float,
    ) -> None:
        rows, columns = image.values.shape
        width, height = (self.inches * group.cell * length for length in (columns, rows))
        self.write(left + width / 2, top - LABEL / 3, image.label, size=8)
        axes = self.figure.add_axes(
            (left / WIDTH, 1 - (top + height) / self.height, width / WIDTH, height / self.height)
        )
        axes.imshow(
            image.values.numpy(),
            cmap=matplotlib.colormaps[group.colors].resampled(33),
            vmin=-most,
            vmax=most,
            interpolation="nearest",
            aspect="auto",
        )
        axes.set_xticks([])
        axes.set_yticks(range(len(image.rows)), image.rows, fontsize=8)
        axes.tick_params(length=0, pad=2)
        axes.spines[:].set_linewidth(0.5)
        for row in cuts[0]:
            if row < rows:
                axes.axhline(row - 0.5, color="black", linewidth=0.7)
        for column in cuts[1]:
            if column < columns:
                axes.axvline(column - 0.5, color="black", linewidth=0.7)


def groups_of(row: Row) -> Iterator[Group]:
    """What the bank of a row owns, tensors of one kind together, and then its weights."""
    bank = make_bank(row)
    kinds: dict[str, list[Image]] = {}
    labels: dict[str, list[str]] = {}  # suffix of a tensor's name -> those of its templates
    for name, tensor in bank.tensors().items():
        if name in HIDDEN:
            continue
        kind = _kind(name)
        suffix = name.removeprefix(kind)
        images, tensor = kinds.setdefault(kind, []), tensor.detach()
        if kind == "templates":
            templates = list(_templates(tensor, row))
            labels[suffix] = [f"T{len(images) + k + 1}" for k in range(len(templates))]
            images += map(Image, templates, labels[suffix])
        elif name in row.own:
            each = (
                _tiles(bank) if len(tensor) == sum(_tiles(bank)) else len(tensor) // len(row.shapes)
            )
            parts = torch.split(tensor, each)
            images += [Image(part, f"W{k + 1}") for k, part in enumerate(parts)]
        else:
            label = f"of {', '.join(labels[suffix])}" if suffix else ""
            names = row.rows_of.get(name) or list(_names_of_rows(bank, len(tensor)))
            images.append(Image(tensor, label, names))
    for kind, images in kinds.items():
        if kind == "templates":
            yield Group(kind, _in_columns(images, 3), TEMPLATES, 1)
        else:
            longest = max(max(image.values.shape) for image in images)
            yield Group(kind, _in_columns(images, 3), COEFFICIENTS, 2 if longest <= FEW else 1)
    weights = [Image(weight.detach(), f"W{k + 1}") for k, weight in enumerate(bank())]
    yield Group("weights", _in_columns(weights, 1 if row.is_flat else 3), TEMPLATES, 1)


def make_bank(row: Row) -> Bank:
    """A bank that was born for random weights, with patterns for templates."""
    generator, cpu = GENERATORS[row.generator], torch.device("cpu")
    bank = Bank(generator, row.shapes, row.size, dtype=torch.float32, device=cpu)
    random = torch.Generator().manual_seed(0)
    scales = torch.linspace(0.6, 1.4, len(row.shapes))
    weights = [torch.randn(shape, generator=random) for shape in row.shapes]
    bank.birth([scale * w for scale, w in zip(scales, weights, strict=True)], random)
    number = 0
    with torch.no_grad():
        for name, tensor in bank.tensors().items():
            if _kind(name) == "templates":
                for image in _templates(tensor, row):
                    image.copy_(pattern(number, *image.shape) * image.std())
                    number += 1
    return bank


def pattern(number: int, rows: int, columns: int) -> Tensor:
    """Stripes, a disc and the like, of mean 0 and standard deviation 1."""
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, rows) if rows > 1 else torch.zeros(1),
        torch.linspace(-1, 1, columns) if columns > 1 else torch.zeros(1),
        indexing="ij",
    )
    drawn = (
        torch.exp(-3 * (x**2 + y**2)),
        torch.sin(2 * math.pi * x) + 0.01 * y,
        x + y,
        torch.sin(2 * math.pi * y) + 0.01 * x,
        x * y,
        x.abs() - y.abs(),
    )[number % 6]
    return (drawn - drawn.mean()) / drawn.std().clamp(min=1e-6)


def _kind(name: str) -> str:
    """The name of a tensor without its number."""
    return name.rstrip("_0123456789")


def _templates(tensor: Tensor, row: Row) -> Iterator[Tensor]:
    """Views of a tensor of templates as they are drawn."""
    if row.columns is None:
        yield tensor
    else:
        yield from tensor.view(len(tensor), -1, row.columns)


def _names_of_rows(bank: Bank, number: int) -> Iterator[str]:
    """Of a row for each weight, or for each of its tiles."""
    tiles = _tiles(bank)
    if number == len(tiles):
        yield from (f"W{k + 1}" for k in range(number))
    elif number == sum(tiles):
        yield from (f"W{k + 1}, {j + 1}" for k, count in enumerate(tiles) for j in range(count))


def _tiles(bank: Bank) -> list[int]:
    """Number of tiles of each weight."""
    return [bank.size.tiles(math.prod(shape)) for shape in bank.shapes]


def _in_columns(images: Sequence[Image], most: int) -> list[list[Image]]:
    """Columns of so many images at most, and of equal numbers."""
    number = math.ceil(len(images) / math.ceil(len(images) / most))
    return [list(images[start : start + number]) for start in range(0, len(images), number)]


if __name__ == "__main__":
    main()
