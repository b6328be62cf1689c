"""Shapeshifter Networks: layers of a group read windows of one flat vector, the published baseline.

Follows the authors' release in its one variant that runs, *wavg*: which window a layer reads, how
many templates it mixes, how coefficients and banks start, bilinear resizing where a layer does not
fit, the split of the budget, and k-means on coefficients for the groups. Different from it are:

- Shared layers keep their biases; the release drops them.
- The budget is met from below: the banks get what all other parameters leave, the coefficients
  among them. The release counts neither coefficients nor norms nor biases and is always above.
- Every entry of a bank is drawn, and all draws, those of k-means too, take a seed. In the release
  the last entries can be uninitialized memory, and k-means has no seed.
- A resized layer reads at least one row and one column, where the release rounds some to none.
- Layers that are alone in their group are left to the model as they are: kernel groups, biases and
  start unchanged.

Source: Plummer, Dryden, Frost, Hoefler and Saenko, Neural Parameter Allocation Search, ICLR 2022,
sections 3.1 and 3.2, and its code.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn

Shape: TypeAlias = tuple[int, ...]

MAX_TEMPLATES = 8
SEARCH_TEMPLATES = 4

# Banks start as if cut into 3x3 kernels of one channel, as the release's do.
BANK_STD = math.sqrt(2 / 9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What a layer reads of its bank: ``num_templates`` matrices, one after the other.

    Attributes:
        start: of the first, in the bank.
        num_templates: how many; 1 where the layer is resized.
        rows: of each; as many as the weight has outputs, or fewer.
        columns: of each; as many as the rest of the weight's shape has entries, or fewer.
    """

    start: int
    num_templates: int
    rows: int
    columns: int

    @property
    def length(self) -> int:
        """Entries of the bank."""
        return self.num_templates * self.rows * self.columns


class FlatBanks(nn.Module):
    """``W_l = sum_k a_lk T_lk``, the ``T_lk`` being the parts of layer ``l``'s window of a bank.

    With one template there is no coefficient. A weight larger than its bank is a smaller matrix,
    resized. Layers that are alone in their group are not made here; they stay in the model.

    Args:
        shapes: name -> shape of the weight, ``(o, i, …)``, in the order in which the model was
            built; may name more layers than the groups do.
        groups: the layers of each bank.
        sizes: of the banks, one for each group; not read where a layer is alone.
        random: draws banks and coefficients.

    Raises:
        ValueError: a bank is too small for one of its layers, or the groups do not fit the shapes.
    """

    def __init__(
        self,
        shapes: Mapping[str, Shape],
        groups: Sequence[Sequence[str]],
        sizes: Sequence[int],
        random: torch.Generator,
    ) -> None:
        super().__init__()
        _check(shapes, groups)
        if len(sizes) != len(groups):
            raise ValueError(f"there are {len(sizes)} sizes for {len(groups)} groups")
        self.shapes: dict[str, Shape] = {}
        self.windows: dict[str, Window] = {}
        self.bank_of: dict[str, int] = {}
        self.mixed: list[str] = []
        self.banks = nn.ParameterList()
        self.alpha = nn.ParameterList()
        for group, size in zip(groups, sizes, strict=True):
            if len(group) == 1:
                continue
            members = {name: tuple(shapes[name]) for name in shapes if name in set(group)}
            windows = place(members, size)
            self.shapes |= members
            self.windows |= windows
            self.bank_of |= dict.fromkeys(windows, len(self.banks))
            self.banks.append(nn.Parameter(_draw_bank(members, windows, size, random)))
            for count in sorted({each.num_templates for each in windows.values()} - {1}):
                names = [name for name in members if windows[name].num_templates == count]
                self.mixed += names
                rows = nn.init.orthogonal_(torch.empty(len(names), count), generator=random)
                self.alpha.extend(nn.Parameter(row.clone()) for row in rows)

    @property
    def generation_flops(self) -> int:
        """To make all weights once: 2 for each template of a sum, 8 for each resized entry."""
        flops = 0
        for name, window in self.windows.items():
            entries = math.prod(self.shapes[name])
            if window.num_templates > 1:
                flops += 2 * window.num_templates * entries
            elif window.length < entries:
                flops += 8 * entries
        return flops

    def coefficients(self) -> list[nn.Parameter]:
        """One vector for each layer that mixes; they get no weight decay."""
        return list(self.alpha)

    def forward(self) -> dict[str, Tensor]:
        """Make the weights of all layers that share."""
        row_of = dict(zip(self.mixed, self.alpha, strict=True))
        made = {}
        for name, shape in self.shapes.items():
            window = self.windows[name]
            read = self.banks[self.bank_of[name]].narrow(0, window.start, window.length)
            templates = read.view(window.num_templates, window.rows, window.columns)
            if name in row_of:
                made[name] = torch.tensordot(row_of[name], templates, dims=1).view(shape)
            else:
                made[name] = _resize(templates[0], shape)
        return made


class SearchBank(nn.Module):
    """The network of the search: every weight is a mixture of the four quarters of one bank.

    ``W_l = resize(sum_k softmax(a_l)_k Q_k)``, the quarters ``Q_k`` taken as matrices of about the
    weight's proportions. The release resizes before it sums, which is the same and costs more.

    Args:
        shapes: name -> shape of the weight, ``(o, i, …)``, for all layers that may share.
        size: of the bank, at least 4; the release's is 5,000,000 for any budget.
        random: draws bank and coefficients.
    """

    def __init__(self, shapes: Mapping[str, Shape], size: int, random: torch.Generator) -> None:
        super().__init__()
        _check(shapes, [list(shapes)])
        if size < SEARCH_TEMPLATES:
            raise ValueError(f"size={size} cannot be cut into {SEARCH_TEMPLATES} templates")
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.bank = nn.Parameter(torch.randn(size, generator=random) * BANK_STD)
        rows = nn.init.orthogonal_(torch.empty(len(shapes), SEARCH_TEMPLATES), generator=random)
        self.alpha = nn.Parameter(rows)

    def coefficients(self) -> list[nn.Parameter]:
        """What gets no weight decay."""
        return [self.alpha]

    def raw_coefficients(self) -> npt.NDArray[np.float64]:
        """``(layers, 4)``, before the softmax, in the order of the shapes; what is clustered."""
        return self.alpha.detach().cpu().double().numpy()

    def forward(self) -> dict[str, Tensor]:
        """Make the weights of all layers."""
        quarter = len(self.bank) // SEARCH_TEMPLATES
        quarters = self.bank[: SEARCH_TEMPLATES * quarter].view(SEARCH_TEMPLATES, quarter)
        mixtures = self.alpha.softmax(dim=1) @ quarters
        made = {}
        for mixture, (name, shape) in zip(mixtures, self.shapes.items(), strict=True):
            rows, columns = search_matrix(shape, quarter)
            made[name] = _resize(mixture[: rows * columns].view(rows, columns), shape)
        return made


def cluster(
    coefficients: npt.NDArray[np.floating[Any]], names: Sequence[str], num_groups: int, seed: int
) -> tuple[tuple[str, ...], ...]:
    """Group layers whose coefficients are close, by k-means.

    Args:
        coefficients: ``(layers, K)``, a row for each name.
        names: of the layers.
        num_groups: at most the number of layers.
        seed: of the starts, of which k-means takes the best of 10.

    Returns:
        The groups in the order of their first layers, names in the given order.

    Raises:
        ValueError: the coefficients do not fit the names, or the number of groups does not.
    """
    if coefficients.ndim != 2 or len(coefficients) != len(names):
        raise ValueError(
            f"coefficients of shape {coefficients.shape} are not a row for each of "
            f"{len(names)} layers"
        )
    if not 1 <= num_groups <= len(names):
        raise ValueError(f"num_groups={num_groups} is not between 1 and the {len(names)} layers")
    labels = KMeans(num_groups, n_init=10, random_state=seed).fit_predict(coefficients)
    groups: dict[int, list[str]] = {}
    for label, name in zip(labels.tolist(), names, strict=True):
        groups.setdefault(label, []).append(name)
    return tuple(tuple(group) for group in groups.values())


def shared_names(groups: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """Names of the layers that are not alone in their group: those that ``FlatBanks`` makes."""
    return tuple(name for group in groups if len(group) > 1 for name in group)


def split_budget(
    shapes: Mapping[str, Shape], groups: Sequence[Sequence[str]], available: int
) -> list[int]:
    """Choose the sizes of the banks, in proportion to the plain sizes of their layers.

    Layers that are alone are paid first, then banks and coefficients. How many coefficients there
    are depends on the sizes: the banks get the most with which the sum stays within the budget.
    What rounding leaves goes to the first bank that can grow. So less than the next step of any
    bank is left over: nothing, unless one more entry would bring new coefficients with it.

    Args:
        shapes: name -> shape of the weight.
        groups: the layers of each bank.
        available: parameters for the layers of all groups and for their coefficients.

    Returns:
        A size for each group, 0 where a layer is alone.

    Raises:
        ValueError: it does not suffice, or the groups do not fit the shapes.
    """
    _check(shapes, groups)
    alone = sum(math.prod(shapes[group[0]]) for group in groups if len(group) == 1)
    room = available - alone
    if room < 0:
        raise ValueError(
            f"available={available} parameters do not hold the layers that are alone in their "
            f"group, which have {alone}. Use available>={alone}, or fewer groups."
        )
    members = [[shapes[name] for name in group] if len(group) > 1 else [] for group in groups]
    plain = [sum(map(math.prod, group)) for group in members]

    def split(banks: int) -> list[int]:
        return [banks * each // max(1, sum(plain)) for each in plain]

    def spent(sizes: Iterable[int]) -> int:
        return sum(map(_cost, members, sizes))

    most = bisect_right(range(room + 1), room, key=lambda banks: spent(split(banks))) - 1
    sizes = split(most)
    rest = room - spent(sizes)
    for index, layers in enumerate(members):
        while layers:
            step = _cost(layers, sizes[index] + 1) - _cost(layers, sizes[index])
            if step > rest:
                break
            sizes[index] += 1
            rest -= step
    size_of = {name: size for group, size in zip(groups, sizes, strict=True) for name in group}
    for name in shared_names(groups):
        try:
            read_matrix(shapes[name], size_of[name])
        except ValueError as err:
            raise ValueError(
                f"available={available} parameters are too few: {name!r} cannot be made, because "
                f"{err}. Use more, or other groups."
            ) from err
    return sizes


def count_templates(shape: Shape, size: int) -> int:
    """``K_l = min(max(1, floor(P_g / n_l)), 8)`` for ``n_l`` weights and a bank of ``P_g``."""
    return min(max(1, size // math.prod(shape)), MAX_TEMPLATES)


def read_matrix(shape: Shape, size: int) -> tuple[int, int]:
    """Rows and columns of a template: those of the weight, or the most that the bank holds.

    Smaller ones have 95, 90, …, 5 percent of the outputs and of the inputs, rounded. A column is an
    entry of a kernel, so resizing mixes those of neighbouring inputs: so does the release.

    Raises:
        ValueError: even 5 percent of each is too much.
    """
    outputs, inputs, taps = shape[0], shape[1], math.prod(shape[2:])
    if math.prod(shape) <= size:
        return outputs, inputs * taps
    for percent in range(95, 0, -5):
        rows = max(1, round(outputs * percent / 100))
        columns = max(1, round(inputs * percent / 100)) * taps
        if rows * columns <= size:
            return rows, columns
    raise ValueError(
        f"a bank of {size} entries is too small for a weight of shape {tuple(shape)}, which needs "
        f"at least {rows * columns}"
    )


def search_matrix(shape: Shape, quarter: int) -> tuple[int, int]:
    """Rows and columns of a quarter in the search: the weight's proportions, rounded down."""
    rows = math.isqrt(quarter * shape[0] // math.prod(shape[1:]))
    rows = min(max(1, rows), quarter)  # a bank smaller than a row of the weight, or a column
    return rows, quarter // rows


def place(shapes: Mapping[str, Shape], size: int) -> dict[str, Window]:
    """Give each layer of a group its window of the bank.

    Shapes go from the most common to the least, layers of a shape in the given order. Windows of
    one length follow each other, from the start again where the bank ends. The first of a length
    begins past the first windows of the other lengths, until that would skip as many windows as
    it has templates.

    Args:
        shapes: name -> shape of the weight, for the layers of one group.
        size: of the bank.

    Returns:
        name -> window, in the order in which they are placed.

    Raises:
        ValueError: the bank is too small for one of the layers.
    """
    windows: dict[str, Window] = {}
    next_of: dict[int, int] = {}  # length of windows -> number of the next one
    offset = 0
    for shape, _ in Counter(shapes.values()).most_common():
        count = count_templates(shape, size)
        for name in (name for name in shapes if shapes[name] == shape):
            try:
                rows, columns = read_matrix(shape, size)
            except ValueError as err:
                raise ValueError(f"{name!r} cannot be made, because {err}") from err
            length = count * rows * columns
            if length not in next_of:
                next_of[length] = -(-offset // length)  # rounded up
                offset += length
                if next_of[length] >= count:
                    next_of[length] = offset = 0
            if (next_of[length] + 1) * length > size:
                next_of[length] = 0
            windows[name] = Window(
                start=next_of[length] * length, num_templates=count, rows=rows, columns=columns
            )
            next_of[length] += 1
    return windows


def _draw_bank(
    shapes: Mapping[str, Shape],
    windows: Mapping[str, Window],
    size: int,
    random: torch.Generator,
) -> Tensor:
    """Draw ``(size,)``: Kaiming's normal for the layers that read it; the most common shape wins.

    What no layer reads as it is keeps the standard deviation of a bank of 3x3 kernels.
    """
    bank = torch.randn(size, generator=random) * BANK_STD
    for name in reversed(list(windows)):
        window, shape = windows[name], shapes[name]
        if window.length >= math.prod(shape):
            std = math.sqrt(2 / math.prod(shape[1:]))
            bank.narrow(0, window.start, window.length).normal_(0, std, generator=random)
    return bank


def _cost(shapes: Sequence[Shape], size: int) -> int:
    """Parameters of a bank and of the coefficients that its layers then have."""
    counts = [count_templates(shape, size) for shape in shapes]
    return size + sum(count for count in counts if count > 1)


def _resize(matrix: Tensor, shape: Shape) -> Tensor:
    target = (shape[0], math.prod(shape[1:]))
    if matrix.shape != target:
        matrix = nn.functional.interpolate(
            matrix[None, None], size=target, mode="bilinear", align_corners=False
        )
    return matrix.view(shape)


def _check(shapes: Mapping[str, Shape], groups: Sequence[Sequence[str]]) -> None:
    for name, shape in shapes.items():
        if len(shape) < 2 or min(shape) < 1:
            raise ValueError(
                f"{name!r} of shape {tuple(shape)} is not a weight (outputs, inputs, …)"
            )
    names = [name for group in groups for name in group]
    unknown = [name for name in names if name not in shapes]
    if unknown:
        raise ValueError(f"the groups name {unknown[0]!r}, which has no shape")
    if not all(groups):
        raise ValueError("a group is empty")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} is in the groups more than once")
