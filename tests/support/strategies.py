"""Random networks and budgets, as values that print what they are and build the same each time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from npas_fx import InfeasibleBudgetError, plan
from oracle import count_trainable

# Names that the library or torch.fx might want for itself come first.
RESERVED = ("plan", "banks", "graph", "meta", "code", "forward_fn", "npas_banks", "bank0")
ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh, "gelu": functional.gelu}
DOMAINS = ("vector", "sequence", "picture")

_LAYERS = {"vector": nn.Linear, "sequence": nn.Conv1d, "picture": nn.Conv2d}
_APPLY = {
    "vector": functional.linear,
    "sequence": functional.conv1d,
    "picture": functional.conv2d,
}
_ROOM = {"vector": (), "sequence": (5,), "picture": (4, 4)}


@dataclass(frozen=True)
class PartSpec:
    """One part of a network; it keeps the shape of what flows through.

    Attributes:
        kind: one of ``PARTS``.
        hidden: width inside, where it has an inside.
        bias: whether its layers have biases.
        times: how often the one module is called.
        activation: one of ``ACTIVATIONS``.
    """

    kind: str
    hidden: int = 3
    bias: bool = True
    times: int = 1
    activation: str = "tanh"


@dataclass(frozen=True)
class NetworkSpec:
    """A network: a stem, parts and a linear head.

    Attributes:
        domain: what flows: ``vector`` ``(N, C)``, ``sequence`` ``(N, C, 5)`` or ``picture``
            ``(N, C, 4, 4)``.
        width: channels.
        parts: in order.
        names: of the parts, as submodules.
        dtype: ``float32`` or ``float64``; ``mixed`` puts the head into float64.
        constants: place of a weight among those with two dimensions -> the value it is filled with.
        frozen: places of weights that do not train.
        inputs: features of the input.
        seed: of weights and inputs.
    """

    domain: str
    width: int
    parts: tuple[PartSpec, ...]
    names: tuple[str, ...]
    dtype: str = "float32"
    constants: tuple[tuple[int, float], ...] = ()
    frozen: tuple[int, ...] = ()
    inputs: int = 3
    seed: int = 0

    def build(self, device: str = "cpu") -> Network:
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(self.seed)
            network = Network(self)
            dtype = torch.float64 if self.dtype == "float64" else torch.float32
            network.to(dtype)
            if self.dtype == "mixed":
                network.head.double()
            weights = [p for p in network.parameters() if p.dim() > 1]
            for place, value in self.constants:
                nn.init.constant_(weights[place % len(weights)], value)
            for place in self.frozen:
                weights[place % len(weights)].requires_grad_(False)
            for module in network.modules():  # norms that do something
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    nn.init.normal_(module.running_mean, std=0.3)
                    nn.init.uniform_(module.running_var, 0.5, 2.0)
        return network

    def draw(self, batch_size: int = 6, seed: int = 0) -> tuple[Tensor]:
        """Inputs."""
        random = torch.Generator().manual_seed(1000 + self.seed + seed)
        dtype = torch.float64 if self.dtype == "float64" else torch.float32
        shape = (batch_size, self.inputs, *_ROOM[self.domain])
        return (torch.randn(shape, generator=random, dtype=dtype),)

    def renamed(self, prefix: str = "renamed") -> NetworkSpec:
        """The same network with other names."""
        names = tuple(f"{prefix}{chr(ord('z') - k)}" for k in range(len(self.names)))
        return replace(self, names=names)


class Part(nn.Module):
    def __init__(self, spec: PartSpec, domain: str, width: int) -> None:
        super().__init__()
        self.act = ACTIVATIONS[spec.activation]
        self.apply_weight = _APPLY[domain]
        self.spec, self.domain, self.width = spec, domain, width

    def layer(self, inputs: int, outputs: int) -> nn.Module:
        size = () if self.domain == "vector" else (1 if inputs != outputs else 3,)
        options = {} if size in ((), (1,)) else {"padding": 1}
        return _LAYERS[self.domain](inputs, outputs, *size, bias=self.spec.bias, **options)

    def raw(self, outputs: int, inputs: int) -> nn.Parameter:
        ones = (1,) * len(_ROOM[self.domain])
        return nn.Parameter(torch.randn(outputs, inputs, *ones) / inputs**0.5)


class Plain(Part):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.layer0 = self.layer(self.width, self.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.layer0(x))


class Residual(Part):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.reader = self.layer(self.width, self.spec.hidden)
        self.writer = self.layer(self.spec.hidden, self.width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.writer(self.act(self.reader(x)))


class Concat(Part):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.left = self.layer(self.width, self.spec.hidden)
        self.right = self.layer(self.width, self.width)
        self.join = self.layer(self.spec.hidden + self.width, self.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.cat([self.act(self.left(x)), self.right(x)], dim=1))


class Raw(Part):
    """A functional call with a parameter that no layer owns."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.kernel = self.raw(self.width, self.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.apply_weight(x, self.kernel))


class Matmul(Part):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.w = nn.Parameter(torch.randn(self.width, self.width) / self.width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.domain == "vector":
            return x + x @ self.w
        return x + torch.einsum("nc...,cd->nd...", x, self.w)


class Scale(Part):
    """Parameters that are multiplied and added."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        shape = (1, self.width, *(1,) * len(_ROOM[self.domain]))
        self.scale = nn.Parameter(1 + 0.1 * torch.randn(shape))
        self.shift = nn.Parameter(0.1 * torch.randn(shape))
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x * self.scale + self.shift


class Tied(Part):
    """Two layers with one weight, and the same weight once more, transposed."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.first = self.layer(self.width, self.width)
        self.second = self.layer(self.width, self.width)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.act(self.first(x)))
        if self.domain == "vector":
            x = x + functional.linear(x, self.first.weight.t())
        return x


class Twice(Part):
    """One module under two names."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.one = self.layer(self.width, self.width)
        self.other = self.one

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.one(x)) + self.other(x)


class Dropout(Part):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.drop = nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x)


class FunctionalDropout(Part):
    """With a weight beside it; a module without weights is called whole, and keeps its flag."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.layer0 = self.layer(self.width, self.width)

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(self.layer0(x), 0.25, self.training)


class BatchNorm(Part):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        norm = {"vector": nn.BatchNorm1d, "sequence": nn.BatchNorm1d, "picture": nn.BatchNorm2d}
        self.norm = norm[self.domain](self.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class LayerNorm(Part):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        vector = self.domain == "vector"
        self.norm = nn.LayerNorm(self.width) if vector else nn.GroupNorm(1, self.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


PARTS = {
    "plain": Plain,
    "residual": Residual,
    "concat": Concat,
    "raw": Raw,
    "matmul": Matmul,
    "scale": Scale,
    "tied": Tied,
    "twice": Twice,
    "dropout": Dropout,
    "functional_dropout": FunctionalDropout,
    "batch_norm": BatchNorm,
    "layer_norm": LayerNorm,
}


class Network(nn.Module):
    """What a ``NetworkSpec`` says."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        stem = PartSpec("stem", bias=True)
        self.stem = Part(stem, spec.domain, spec.width).layer(spec.inputs, spec.width)
        for name, part in zip(spec.names, spec.parts, strict=True):
            self.add_module(name, PARTS[part.kind](part, spec.domain, spec.width))
        self.calls = [
            name
            for name, part in zip(spec.names, spec.parts, strict=True)
            for _ in range(part.times)
        ]
        self.is_vector = spec.domain == "vector"
        self.head = nn.Linear(spec.width, 2)
        self.head_dtype = torch.float64 if spec.dtype == "mixed" else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for name in self.calls:
            x = self.get_submodule(name)(x)
        x = x if self.is_vector else x.flatten(2).mean(2)
        return self.head(x if self.head_dtype is None else x.to(self.head_dtype))


@st.composite
def networks(draw: st.DrawFn, *, max_parts: int = 4) -> NetworkSpec:
    """Networks that torch.fx traces, of all domains and parts."""
    kinds = st.sampled_from(sorted(PARTS))
    parts = tuple(
        draw(
            st.lists(
                st.builds(
                    PartSpec,
                    kind=kinds,
                    hidden=st.integers(1, 7),
                    bias=st.booleans(),
                    times=st.sampled_from((1, 1, 1, 2, 3)),
                    activation=st.sampled_from(sorted(ACTIVATIONS)),
                ),
                min_size=1,
                max_size=max_parts,
            )
        )
    )
    names = st.lists(
        st.sampled_from((*RESERVED, "a", "b", "c")),
        min_size=len(parts),
        max_size=len(parts),
        unique=True,
    )
    places = st.integers(0, 7)
    some = st.booleans().flatmap(
        lambda any_: st.lists(places, max_size=2, unique=True) if any_ else st.just([])
    )
    values = st.sampled_from((0.0, 0.0, 0.5, -1.5))
    return NetworkSpec(
        domain=draw(st.sampled_from(DOMAINS)),
        width=draw(st.integers(2, 8)),
        parts=parts,
        names=tuple(draw(names)),
        dtype=draw(st.sampled_from(("float32", "float32", "float32", "float64", "mixed"))),
        constants=tuple((place, draw(values)) for place in draw(some)),
        frozen=tuple(draw(some)),
        inputs=draw(st.integers(2, 5)),
        seed=draw(st.integers(0, 3)),
    )


# One network of each domain with all parts, every second of them called twice.
EVERYTHING = tuple(
    NetworkSpec(
        domain=domain,
        width=4,
        parts=tuple(
            PartSpec(kind, hidden=5, bias=False, times=1 + k % 2) for k, kind in enumerate(PARTS)
        ),
        names=(*RESERVED, *(f"part{k}" for k in range(len(PARTS) - len(RESERVED)))),
        constants=((3, 0.0), (5, 0.5)),
        frozen=(2,),
    )
    for domain in DOMAINS
)


@dataclass(frozen=True)
class BudgetSpec:
    """Where a budget lies, and how it is written.

    Attributes:
        place: 0 is the smallest that can be met, 1 ten times the model, evenly in ratios.
        form: ``int``, ``float``, ``string``, ``percent`` or ``bytes``.
    """

    place: float
    form: str = "int"

    def amount(self, model: nn.Module, **rules: Any) -> int:
        """Parameters or bytes, for a model."""
        in_bytes = self.form == "bytes"
        floor = smallest(model, in_bytes=in_bytes, **rules)
        ceiling = max(10 * count_trainable(model, in_bytes=in_bytes), floor)
        return min(max(round(floor * (ceiling / floor) ** self.place), floor), ceiling)

    def of(self, model: nn.Module, **rules: Any) -> Any:
        """The budget for a model, as a user would write it."""
        amount, size = self.amount(model, **rules), count_trainable(model)
        return {
            "int": amount,
            "float": (amount + 0.5) / size,
            "string": f"{amount}",
            "percent": f"{100 * (amount + 0.5) / size:.9f}%",
            "bytes": f"{amount / 1000:.3f}KB",
        }[self.form]


def smallest(model: nn.Module, *, in_bytes: bool = False, **rules: Any) -> int:
    """The smallest budget that the library says can be met."""
    try:
        plan(model, "0.001KB" if in_bytes else 1, **rules)
    except InfeasibleBudgetError as err:
        return err.smallest
    return 1


FORMS = ("int", "float", "string", "percent", "bytes")


def budgets(forms: tuple[str, ...] = FORMS) -> st.SearchStrategy[BudgetSpec]:
    """Budgets between the smallest that can be met and ten times the model."""
    special = st.sampled_from((0.0, 0.5, 1.0))
    places = st.one_of(special, st.floats(0, 1, allow_nan=False).map(lambda p: round(p, 3)))
    return st.builds(BudgetSpec, place=places, form=st.sampled_from(forms))
