"""Banks for the weights of real models, measured against one product and clones."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

from generation_cases.turns import Ratio, compare, take_turns
from npas_fx.banks.bank import Bank
from npas_fx.examples.wide_resnet import WideResNet
from npas_fx.generators import GENERATORS
from npas_fx.generators.generator import Shapes, num_parameters
from npas_fx.ir import Size

HALF, TENTH = 0.5, 0.1
REFERENCE_TEMPLATES, MOST_TEMPLATES = 8, 16
LARGE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A bank for all weights of one shape in a model."""

    model: str
    shapes: Shapes
    generator: str
    size: Size

    @property
    def bytes_owned(self) -> int:
        """Bytes of the parameters."""
        return 4 * num_parameters(GENERATORS[self.generator], self.shapes, self.size)

    @property
    def operands(self) -> tuple[int, int, int]:
        """Sizes of the product that the bank is compared with.

        Its own, if it mixes templates tile by tile; otherwise that of as many templates of a whole
        weight as it has parameters.
        """
        numel = math.prod(self.shapes[0])
        if self.generator in ("tied", "wavg"):
            rows = self.size.rows([numel] * len(self.shapes))
            return rows, self.size.num_templates, self.size.template_size
        return len(self.shapes), max(1, round(self.bytes_owned / (4 * numel))), numel

    @property
    def bytes_written(self) -> int:
        """Bytes of the weights."""
        return 4 * sum(map(math.prod, self.shapes))

    @property
    def is_large(self) -> bool:
        """Whether the target is a multiple of a clone of what it writes."""
        return self.bytes_owned >= LARGE_BYTES and self.size.num_templates <= len(self.shapes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """What was measured of a bank.

    Attributes:
        case: the bank.
        seconds: of CPU time, the median.
        by_product: as a multiple of one product into a result that is there.
        by_clone: of a clone of each weight.
    """

    case: Case
    seconds: float
    by_product: Ratio
    by_clone: Ratio


def make_model(name: str) -> nn.Module:
    """Make a model on the meta device: ``wrn_28_10``, or what ``planning.py`` knows."""
    if name.startswith("wrn_"):
        depth, width = map(int, name.removeprefix("wrn_").split("_"))
        with torch.device("meta"):
            return WideResNet(depth, width)
    from planning_instances.models import make_model  # timm and transformers take seconds

    return make_model(name)[0]


def largest_classes(model: nn.Module, number: int) -> Sequence[Shapes]:
    """List the shapes that several weights have, those of the most elements first."""
    counts = Counter(tuple(weight.shape) for weight in model.parameters() if weight.dim() > 1)
    classes = [(shape,) * count for shape, count in counts.items() if count > 1]
    return sorted(classes, key=lambda shapes: -len(shapes) * math.prod(shapes[0]))[:number]


def mixed_cases(model: str, shapes: Shapes) -> Iterator[Case]:
    """Yield banks of ``tied`` and ``wavg``: of whole weights, of tiles, and large ones."""
    numel = math.prod(shapes[0])
    proposed = list(GENERATORS["wavg"].propose(shapes, above=False))
    sizes = [
        *_nearest("wavg", shapes, [s for s in proposed if s.template_size == numel], HALF),
        *_nearest("wavg", shapes, [s for s in proposed if s.template_size < numel], TENTH),
    ]
    for most in (REFERENCE_TEMPLATES, MOST_TEMPLATES):
        size = Size(num_templates=min(most, len(shapes)), template_size=numel)
        if size not in sizes and 4 * size.num_templates * numel >= LARGE_BYTES:
            sizes.append(size)
    tied = Size(num_templates=1, template_size=numel)
    yield Case(model=model, shapes=shapes, generator="tied", size=tied)
    for size in sizes:
        yield Case(model=model, shapes=shapes, generator="wavg", size=size)


def cases_at_half(model: str, shapes: Shapes) -> Iterator[Case]:
    """Yield a bank of about half the weights for every generator that proposes one."""
    for name, generator in GENERATORS.items():
        for size in _nearest(name, shapes, generator.propose(shapes, above=False), HALF):
            yield Case(model=model, shapes=shapes, generator=name, size=size)


def _nearest(name: str, shapes: Shapes, sizes: Iterable[Size], share: float) -> list[Size]:
    """The size that is nearest to a share of the weights, if there is any."""
    wanted = share * sum(map(math.prod, shapes))

    def distance(size: Size) -> float:
        return abs(num_parameters(GENERATORS[name], shapes, size) - wanted)

    return sorted(sizes, key=distance)[:1]


def make_bank(case: Case) -> Bank:
    """Make the bank, with values as in training."""
    generator = GENERATORS[case.generator]
    bank = Bank(generator, case.shapes, case.size, dtype=torch.float32, device=torch.device("cpu"))
    random = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=random) / 50 for shape in case.shapes]
    bank.birth(weights, random)
    return bank


def measure(case: Case, repeats: int) -> Figure:
    """Call a bank in turn with a product and clones."""
    bank = make_bank(case)
    rows, middle, columns = case.operands
    first, second = torch.randn(rows, middle), torch.randn(middle, columns)
    result, weights = torch.empty(rows, columns), [torch.randn(shape) for shape in case.shapes]
    calls: dict[str, Callable[[], object]] = {
        "bank": bank,
        "product": lambda: torch.mm(first, second, out=result),
        "clone": lambda: [weight.clone() for weight in weights],
    }
    seconds = take_turns(calls, repeats)
    return Figure(
        case=case,
        seconds=median(seconds["bank"]),
        by_product=compare(seconds["bank"], seconds["product"]),
        by_clone=compare(seconds["bank"], seconds["clone"]),
    )
