"""The module that owns the tensors of one bank and generates the weights of its sites."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from npas_fx.generators import Generator, Moments
from npas_fx.ir import Size


class Bank(nn.Module):
    """Templates and coefficients of one bank; calling it generates the weights of all its sites.

    Its tensors are named and shaped by the generator, but for ``offset``, ``(S,)``, which is added
    to the weights. It is made with undefined values: ``birth``
    draws them, ``load_state_dict`` fills them in.

    Args:
        generator: the rule.
        shapes: of the weights, in the order in which they are returned.
        size: of the bank.
        dtype: of the weights.
        device: of the weights.
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
    ) -> None:
        super().__init__()
        self.generator = generator
        self.shapes = tuple(shapes)
        self.size = size
        for name, shape in generator.parameters(self.shapes, size).items():
            self.register_parameter(
                name, nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
            )
        for name, shape in generator.buffers(self.shapes, size).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))
        self.register_buffer("offset", torch.zeros(len(self.shapes), dtype=dtype, device=device))
        self.offset_sites: tuple[int, ...] = ()

    def birth(self, moments: Sequence[Moments], random: torch.Generator) -> None:
        """Draw all tensors, so that each weight has the moments of the one that it replaces."""
        drawn = self.generator.birth(self.shapes, self.size, moments, random)
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
        weights = self.generator.generate(self.tensors(), self.shapes, self.size)
        if not self.offset_sites:
            return weights
        return tuple(
            weight + self.offset[k] if k in self.offset_sites else weight
            for k, weight in enumerate(weights)
        )

    def extra_repr(self) -> str:
        """Say what the bank is."""
        return f"{self.generator.name}, {len(self.shapes)} sites, {self.size}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.note_offset()

    def note_offset(self) -> None:
        """See which offsets differ from zero; to be called after the tensors change."""
        # Adding one is a pass over the weight, and most are zero.
        if not self.offset.is_meta:
            self.offset_sites = tuple(self.offset.nonzero().flatten().tolist())
