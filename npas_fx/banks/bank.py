"""The module that owns the tensors of one bank and generates the weights of its sites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from npas_fx.generators import Generator, Moments
from npas_fx.ir import Size


@cache
def _keep_freed_memory() -> None:
    """Let the C library keep memory that is freed at the end of each step for the next one.

    glibc returns freed memory to the system beyond twice the size of the largest block freed so
    far, up to 64 MiB. Generated weights are freed when backward is done with them, and making their
    pages anew cost 10 of 80 ms for each step of a WRN-16-4 at batch 4. The block is not touched.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")


def _join(parts: Sequence[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), axis)


class Bank(nn.Module):
    """Templates and coefficients of one bank; calling it generates the weights of all its sites.

    Its tensors are named and shaped by the generator, but for ``offset``, ``(S,)``, which is added
    to the weights or, of fused ones, to their parts. It is made with undefined values: ``birth``
    draws them, ``load_state_dict`` fills them in.

    Args:
        generator: the rule.
        shapes: of the weights, in the order in which they are returned.
        size: of the bank.
        dtype: of the weights.
        device: of the weights.
        parts: for each weight, of how many equal ones it is made and along which axis; by default
            none is fused.
        held_rows: place of a weight -> its row that is not generated but held, a buffer.
    """

    offset: Tensor

    def __init__(
        self,
        generator: Generator,
        shapes: Sequence[tuple[int, ...]],
        size: Size,
        *,
        dtype: torch.dtype,
        device: torch.device,
        parts: Sequence[tuple[int, int]] | None = None,
        held_rows: Mapping[int, int] | None = None,
    ) -> None:
        super().__init__()
        if torch.device(device).type == "cpu":
            _keep_freed_memory()
        self.generator = generator
        self.parts = tuple(parts or ((1, 0),) * len(shapes))
        self.shapes = tuple(
            (*shape[:axis], shape[axis] // number, *shape[axis + 1 :])
            for shape, (number, axis) in zip(shapes, self.parts, strict=True)
            for _ in range(number)
        )
        self.size = size
        for name, shape in generator.parameters(self.shapes, size).items():
            self.register_parameter(
                name, nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
            )
        for name, shape in generator.buffers(self.shapes, size).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))
        self.register_buffer("offset", torch.zeros(len(self.shapes), dtype=dtype, device=device))
        self.offset_sites: tuple[int, ...] = ()
        self.held_rows = dict(held_rows or {})
        for place in self.held_rows:
            row = torch.empty(shapes[place][1:], dtype=dtype, device=device)
            self.register_buffer(f"held_row_{place}", row)

    def birth(self, weights: Sequence[Tensor], random: torch.Generator) -> None:
        """Draw all tensors, so that each weight has the moments of the one that it replaces."""
        wanted = [Moments.of(part) for part in self._cut(weights)]
        state = random.get_state()
        self._draw(wanted, weights, random)
        if self.held_rows:
            # The moments were those of the rows that are held too; the same draw is moved to fit.
            with torch.no_grad():
                born = [Moments.of(part) for part in self._cut(self())]
            moved = [
                Moments(mean=2 * m.mean - b.mean, std=m.std * m.std / b.std) if b.std else m
                for m, b in zip(wanted, born, strict=True)
            ]
            self._draw(moved, weights, random.set_state(state))

    def _draw(
        self, moments: Sequence[Moments], weights: Sequence[Tensor], random: torch.Generator
    ) -> None:
        drawn = self.generator.birth(self.shapes, self.size, moments, random)
        for place, row in self.held_rows.items():
            drawn[f"held_row_{place}"] = weights[place].detach()[row]
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                tensor.copy_(drawn[name])
        self.note_offset()

    def tensors(self) -> dict[str, Tensor]:
        """All parameters and buffers by name."""
        owned = {**self._parameters, **self._buffers}
        return {name: tensor for name, tensor in owned.items() if tensor is not None}

    def forward(self) -> tuple[Tensor, ...]:
        """Generate the weights of all sites, in their own dtype also under autocast."""
        device = self.offset.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._generate()
        return self._generate()

    def _generate(self) -> tuple[Tensor, ...]:
        weights = list(self.generator.generate(self.tensors(), self.shapes, self.size))
        for place in self.offset_sites:
            weights[place] = weights[place] + self.offset[place]
        if len(weights) > len(self.parts):
            each = iter(weights)
            weights = [_join(list(islice(each, number)), axis) for number, axis in self.parts]
        for place, row in self.held_rows.items():
            weight, held = weights[place], self._buffers[f"held_row_{place}"]
            assert held is not None
            weights[place] = torch.cat([weight[:row], held[None], weight[row + 1 :]])
        return tuple(weights)

    def _cut(self, weights: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield what is generated by itself: parts of fused weights, others without held rows."""
        for place, (weight, (number, axis)) in enumerate(zip(weights, self.parts, strict=True)):
            row = self.held_rows.get(place)
            if row is not None:
                weight = torch.cat([weight[:row], weight[row + 1 :]])
            yield from weight.chunk(number, axis)

    def extra_repr(self) -> str:
        """Say what the bank is."""
        return f"{self.generator.name}, {len(self.parts)} sites, {self.size}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.note_offset()

    def note_offset(self) -> None:
        """See which offsets differ from zero; to be called after the tensors change."""
        # Adding one is a pass over the weight, and most are zero.
        if not self.offset.is_meta:
            self.offset_sites = tuple(self.offset.nonzero().flatten().tolist())
