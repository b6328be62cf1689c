"""The plain networks of the tasks that `npas_fx.examples` does not have."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class DecoderBlock(nn.Module):
    """Causal attention and an MLP, each normalised before and added to the stream."""

    bias: Tensor

    def __init__(self, width: int, num_heads: int, context: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.register_buffer("bias", _make_bias(num_heads, context), persistent=False)
        self.norm1 = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, T, width)`` to the same."""
        y = self.norm1(x)
        query, key, value = (
            projected.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for projected in (self.query(y), self.key(y), self.value(y))
        )
        # Written out: on a CPU the fused one takes half of a step with pieces as short as ours.
        scores = query @ key.transpose(2, 3) / query.shape[3] ** 0.5
        read = (scores + self.bias[:, : x.shape[1], : x.shape[1]]).softmax(3) @ value
        x = x + self.out(read.transpose(1, 2).flatten(2))
        update: Tensor = self.down(functional.gelu(self.up(self.norm2(x))))
        return x + update


class Decoder(nn.Module):
    """A decoder-only transformer over characters with linear biases for places (ALiBi).

    Args:
        num_tokens: of the vocabulary.
        width: of the stream, a multiple of ``num_heads``.
        depth: number of blocks.
        num_heads: of each attention.
        context: most characters that it reads.
    """

    def __init__(
        self, num_tokens: int, *, width: int, depth: int, num_heads: int, context: int
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(num_tokens, width)
        self.blocks = nn.ModuleList(DecoderBlock(width, num_heads, context) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_tokens)
        for name, parameter in self.named_parameters():
            if name == "tokens.weight":
                nn.init.normal_(parameter, std=0.1)
            elif parameter.dim() > 1:
                # What a block adds to the stream starts small, the more blocks the smaller.
                is_last = name.endswith(("out.weight", "down.weight"))
                factor = 1 / (2 * depth) ** 0.5 if is_last else 1.0
                nn.init.normal_(parameter, std=factor / parameter.shape[1] ** 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``(N, T)`` characters to ``(N, T, num_tokens)`` logits of the next."""
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def _make_bias(num_heads: int, context: int) -> Tensor:
    """``(num_heads, context, context)``: minus slope times distance, and nothing that comes later.

    Source: Press et al., Train Short, Test Long, ICLR 2022, section 3. Places that have to be
    learned leave short trainings on a plateau for a time that differs from seed to seed.
    """
    places = torch.arange(context)
    distance = (places[:, None] - places).float()
    slopes = 2.0 ** (-8 * torch.arange(1, num_heads + 1) / num_heads)
    return (-slopes[:, None, None] * distance).masked_fill(distance < 0, float("-inf"))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with norms; a shortcut without parameters where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.more_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C_in, H, W)`` to ``(N, C_out, H / stride, W / stride)``."""
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        if self.stride > 1 or self.more_channels:
            x = functional.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more_channels)
            )
        return torch.relu(x + y)


class CifarResNet(nn.Module):
    """The residual networks for 32x32 pictures of He et al., 2016, section 4.2.

    Args:
        depth: ``6 n + 2``.
        width: channels of the first stage; the others have twice and four times as many.
        num_classes: outputs.
    """

    def __init__(self, depth: int = 20, width: int = 16, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        blocks = []
        channels = width
        for stage in range(3):
            for block in range((depth - 2) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(BasicBlock(channels, width * 2**stage, stride))
                channels = width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, 32, 32)`` to ``(N, num_classes)``."""
        features = self.blocks(torch.relu(self.norm(self.stem(x))))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits
