"""Models as people write them, small, each with its inputs for any batch size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class MLP(nn.Module):
    """A stack of linear layers with a dropout before the last."""

    def __init__(self, inputs: int = 12, width: int = 24, depth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 2))
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for layer in self.hidden:
            x = torch.relu(layer(x))
        return self.head(self.dropout(x))


class ResidualBlock(nn.Module):
    """Two convolutions around a stream; a 1 x 1 convolution where the width changes."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = (
            nn.Conv2d(channels_in, channels_out, 1, stride)
            if stride > 1 or channels_in != channels_out
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.shortcut(x) + self.conv2(functional.relu(self.conv1(x))))


class ResidualCNN(nn.Module):
    """A residual network without norms."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(
            ResidualBlock(width, width, 1),
            ResidualBlock(width, 2 * width, 2),
            ResidualBlock(2 * width, 2 * width, 1),
        )
        self.head = nn.Linear(2 * width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class WideBlock(nn.Module):
    """Norm, activation, convolution, twice, with dropout in between; as in Wide ResNets."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.dropout = dropout
        self.shortcut = None
        if channels_in != channels_out:
            self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(x), inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = functional.relu(self.bn2(self.conv1(y)))
        if self.dropout > 0:
            y = functional.dropout(y, p=self.dropout, training=self.training)
        return torch.add(shortcut, self.conv2(y))


class WideResNet(nn.Module):
    """Depth ``6 n + 4``; here of 4 channels times ``width``."""

    def __init__(self, depth: int = 10, width: int = 1, dropout: float = 0.3) -> None:
        super().__init__()
        channels = [4, 4 * width, 8 * width, 16 * width]
        self.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        groups = []
        for group, (before, after) in enumerate(pairwise(channels)):
            blocks = [
                WideBlock(before if k == 0 else after, after, 2 if group and k == 0 else 1, dropout)
                for k in range((depth - 4) // 6)
            ]
            groups.append(nn.Sequential(*blocks))
        self.block1, self.block2, self.block3 = groups
        self.bn = nn.BatchNorm2d(channels[3])
        self.fc = nn.Linear(channels[3], 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = functional.adaptive_avg_pool2d(functional.relu(self.bn(x)), 1)
        return self.fc(x.view(-1, x.shape[1]))


class Attention(nn.Module):
    """Causal attention with one projection for query, key and value."""

    def __init__(self, width: int, heads: int, length: int, dropout: float) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.heads, self.width, self.dropout = heads, width, dropout
        mask = torch.tril(torch.ones(length, length)).view(1, 1, length, length)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.size()
        query, key, value = self.c_attn(x).split(self.width, dim=2)
        shape = (batch, length, self.heads, width // self.heads)
        query, key, value = (t.view(shape).transpose(1, 2) for t in (query, key, value))
        scores = (query @ key.transpose(-2, -1)) / math.sqrt(self.width // self.heads)
        scores = scores.masked_fill(self.mask[:, :, :length, :length] == 0, float("-inf"))
        scores = functional.dropout(functional.softmax(scores, dim=-1), self.dropout, self.training)
        mixed = (scores @ value).transpose(1, 2).contiguous().view(batch, length, width)
        return self.c_proj(mixed)


class Block(nn.Module):
    """Attention and an MLP around the stream."""

    def __init__(self, width: int, heads: int, length: int, dropout: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, length, dropout)
        self.ln_2 = nn.LayerNorm(width)
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        y = self.c_proj(functional.gelu(self.c_fc(self.ln_2(x))))
        return x + functional.dropout(y, self.dropout, self.training)


class GPT(nn.Module):
    """A language model whose output layer is its embedding; with targets it gives the loss too."""

    def __init__(
        self,
        vocabulary: int = 17,
        width: int = 16,
        depth: int = 2,
        length: int = 8,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocabulary, width),
                "wpe": nn.Embedding(length, width),
                "drop": nn.Dropout(dropout),
                "h": nn.ModuleList(Block(width, 2, length, dropout) for _ in range(depth)),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        _, length = idx.size()
        position = torch.arange(0, length, dtype=torch.long, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(position)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x)
        logits = self.lm_head(self.transformer.ln_f(x))
        if targets is None:
            return logits
        loss = functional.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
        return logits, loss


class RecursiveBlock(nn.Module):
    """A residual block that is meant to be called again and again."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class Recursive(nn.Module):
    """One block, called twelve times."""

    def __init__(self, width: int = 32, times: int = 12) -> None:
        super().__init__()
        self.stem = nn.Linear(6, width)
        self.block = RecursiveBlock(width)
        self.times = times
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(self.times):
            x = self.block(x)
        return self.head(x)


class TextClassifier(nn.Module):
    """An embedding, an LSTM and a linear layer on its last state."""

    def __init__(self, vocabulary: int = 300, width: int = 12, hidden: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, hidden, num_layers=2, batch_first=True, dropout=0.2)
        self.fc = nn.Linear(hidden, 3)

    def forward(self, text: Tensor) -> Tensor:
        output, (state, _) = self.lstm(self.embedding(text))
        return self.fc(state[-1] + output.mean(1))


@dataclass(frozen=True)
class Example:
    """A model and how it is called.

    Attributes:
        build: makes it, from the global random state.
        draw: batch size -> positional inputs, from the global random state.
    """

    build: Callable[[], nn.Module]
    draw: Callable[[int], tuple[Tensor, ...]]

    def make(self, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.build()

    def inputs(self, batch_size: int, seed: int = 1) -> tuple[Tensor, ...]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.draw(batch_size)


def loss_of(output: Any) -> Tensor:
    """A number to go down: the model's own loss where it gives one."""
    return output[1] if isinstance(output, tuple) else output.square().mean()


MODELS = {
    "mlp": Example(MLP, lambda n: (torch.randn(n, 12),)),
    "residual_cnn": Example(ResidualCNN, lambda n: (torch.randn(n, 3, 8, 8),)),
    "wrn": Example(WideResNet, lambda n: (torch.randn(n, 3, 8, 8),)),
    "gpt": Example(GPT, lambda n: (torch.randint(17, (n, 8)), torch.randint(17, (n, 8)))),
    "recursive": Example(Recursive, lambda n: (torch.randn(n, 6),)),
    "lstm": Example(TextClassifier, lambda n: (torch.randint(300, (n, 7)),)),
}
