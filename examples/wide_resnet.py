"""Wide residual networks for 32x32 pictures (Zagoruyko and Komodakis, 2016)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Batch norm, ReLU and a 3x3 convolution, twice, added to the input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if in_channels != out_channels or stride != 1:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C_in, H, W)`` to ``(N, C_out, H / stride, W / stride)``."""
        y = torch.relu(self.norm1(x))
        branch: Tensor = self.conv2(torch.relu(self.norm2(self.conv1(y))))
        stream: Tensor = x if self.shortcut is None else self.shortcut(y)
        return stream + branch


class WideResNet(nn.Module):
    """Three stages of blocks, and a linear classifier on the mean of the last.

    Args:
        depth: number of layers, ``6 n + 4``.
        width: factor of the channels 16, 32 and 64, which are rounded; below 1 also of the stem's.
        num_classes: outputs.
    """

    def __init__(self, depth: int = 16, width: float = 4, num_classes: int = 10) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth={depth} is not 6 n + 4; take 10, 16, 22, 28 or more")
        stages = (round(16 * width), round(32 * width), round(64 * width))
        channels = (min(16, stages[0]), *stages)
        self.stem = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.stages = nn.Sequential(
            *(
                _stage(channels[k], channels[k + 1], (depth - 4) // 6, stride=1 if k == 0 else 2)
                for k in range(3)
            )
        )
        self.norm = nn.BatchNorm2d(channels[3])
        self.head = nn.Linear(channels[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, 32, 32)`` to ``(N, num_classes)``."""
        features = torch.relu(self.norm(self.stages(self.stem(x))))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


def _stage(in_channels: int, out_channels: int, num_blocks: int, stride: int) -> nn.Sequential:
    first = Block(in_channels, out_channels, stride)
    return nn.Sequential(
        first, *(Block(out_channels, out_channels, 1) for _ in range(num_blocks - 1))
    )
