"""A small residual network for 8 x 8 pictures with one channel, such as scikit-learn's digits."""

from __future__ import annotations

from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions, whose result is added to what came in.

    Where the number of channels or the size of the picture changes, a 1 x 1 convolution brings
    what came in to the same shape.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels_in != channels_out:
            self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, channels_in, H, W)`` to ``(N, channels_out, H / stride, W / stride)``."""
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        result: Tensor = self.relu(y + self.shortcut(x))
        return result


class ResidualCNN(nn.Module):
    """Three stages at 8 x 8, 4 x 4 and 2 x 2 pixels, then a linear head.

    Args:
        width: channels of the last stage; the first has a quarter of them, the second a half.
        num_blocks: residual blocks in each stage.
        num_classes: outputs of the head.
    """

    def __init__(self, width: int = 64, num_blocks: int = 2, num_classes: int = 10) -> None:
        super().__init__()
        widths = (round(width / 4), round(width / 2), width)
        channels = widths[0]
        self.stem = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )
        blocks = []
        for stage, stage_width in enumerate(widths):
            for block in range(num_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(ResidualBlock(channels, stage_width, stride))
                channels = stage_width
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, pictures: Tensor) -> Tensor:
        """Map pictures ``(N, 1, 8, 8)`` to logits ``(N, num_classes)``."""
        features = self.pool(self.blocks(self.stem(pictures)))
        logits: Tensor = self.head(features.flatten(1))
        return logits
