"""The networks of the papers that are in none of the libraries."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from npas_fx.examples.wide_resnet import WideResNet
from zoo_case import Case, Inputs


class Retriever(nn.Module):
    """Images and sentences in one space: a small network for pictures, a bi-GRU for words.

    Source: Plummer et al., Neural Parameter Allocation Search, ICLR 2022, image-text retrieval.
    """

    def __init__(self, vocabulary: int = 80, size: int = 32) -> None:
        super().__init__()
        self.pictures = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, size, 3, stride=2, padding=1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.words = nn.Embedding(vocabulary, 24, padding_idx=0)
        self.reader = nn.GRU(24, size, batch_first=True, bidirectional=True)
        self.image_head = nn.Linear(size, size)
        self.text_head = nn.Linear(2 * size, size)

    def forward(self, image: Tensor, words: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        packed = nn.utils.rnn.pack_padded_sequence(
            self.words(words), lengths, batch_first=True, enforce_sorted=False
        )
        _, state = self.reader(packed)
        text = self.text_head(state.transpose(0, 1).flatten(1))
        image = self.image_head(self.pictures(image))
        text, image = functional.normalize(text, dim=1), functional.normalize(image, dim=1)
        return {"image": image, "text": text, "scores": image @ text.t()}


class IsomorphismLayer(nn.Module):
    """A layer of GIN: a network of the sum of a node and its neighbours."""

    def __init__(self, inputs: int, size: int) -> None:
        super().__init__()
        self.epsilon = nn.Parameter(torch.zeros(()))
        self.net = nn.Sequential(
            nn.Linear(inputs, size), nn.BatchNorm1d(size), nn.ReLU(), nn.Linear(size, size)
        )

    def forward(self, values: Tensor, edges: Tensor) -> Tensor:
        summed = torch.zeros_like(values).index_add(0, edges[1], values[edges[0]])
        return self.net((1 + self.epsilon) * values + summed)


class Pool(nn.Module):
    """Sums of the nodes of each graph; how many graphs there are, is in the data."""

    def forward(self, values: Tensor, graph_of: Tensor) -> Tensor:
        pooled = values.new_zeros(int(graph_of.max()) + 1, values.shape[1])
        return pooled.index_add(0, graph_of, values)


class GraphIsomorphismNetwork(nn.Module):
    """Graph classification.

    Source: Errica et al., Adaptive Width Neural Networks, the graph tasks.
    """

    def __init__(self, inputs: int = 7, size: int = 32, classes: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            IsomorphismLayer(inputs if k == 0 else size, size) for k in range(3)
        )
        self.pool = Pool()
        self.head = nn.Linear(size, classes)

    def forward(self, values: Tensor, edges: Tensor, graph_of: Tensor) -> Tensor:
        for layer in self.layers:
            values = layer(values, edges).relu()
        return self.head(self.pool(values, graph_of))


class TabularMLP(nn.Module):
    """Categories and numbers in a table; residual layers of one width."""

    def __init__(self, categories: tuple[int, ...] = (5, 9, 3), numbers: int = 6) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(count, 8) for count in categories)
        self.stem = nn.Linear(8 * len(categories) + numbers, 48)
        self.layers = nn.ModuleList(nn.Linear(48, 48) for _ in range(4))
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(48, 2)

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        columns = [table(categories[:, k]) for k, table in enumerate(self.embeddings)]
        values = self.stem(torch.cat([*columns, numbers], dim=1))
        for layer in self.layers:
            values = values + self.drop(layer(values).relu())
        return self.head(values)


class FiniteWindow(nn.Module):
    """A stack of dilated convolutions over a series, with gates."""

    def __init__(self, size: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv1d(4, size, 1)
        self.gates = nn.ModuleList(
            nn.Conv1d(size, 2 * size, 3, dilation=2**k, padding=2**k) for k in range(4)
        )
        self.head = nn.Conv1d(size, 4, 1)

    def forward(self, series: Tensor) -> Tensor:
        values = self.stem(series)
        for gate in self.gates:
            left, right = gate(values).chunk(2, dim=1)
            values = values + left.tanh() * right.sigmoid()
        return self.head(values)


def _retrieved(batch: int) -> Inputs:
    lengths = torch.tensor([6, *(2 + k % 5 for k in range(batch - 1))])
    return (torch.randn(batch, 3, 24, 24), torch.randint(1, 80, (batch, 6)), lengths), {}


def _graphs(batch: int) -> Inputs:
    nodes = 5 * batch
    graph_of = torch.arange(nodes) // 5
    edges = torch.randint(0, 5, (2, 8 * batch)) + 5 * (torch.arange(8 * batch) // 8)
    return (torch.randn(nodes, 7), edges, graph_of), {}


def _tables(batch: int) -> Inputs:
    categories = torch.stack([torch.randint(0, k, (batch,)) for k in (5, 9, 3)], dim=1)
    return (categories, torch.randn(batch, 6)), {}


def _wide(depth: int, width: int) -> nn.Module:
    return WideResNet(depth=depth, width=width)


def _pictures(batch: int) -> Inputs:
    return (torch.randn(batch, 3, 32, 32),), {}


PAPERS: dict[str, Any] = {
    "bi_gru_retriever": Case(Retriever, _retrieved),
    "dilated_convolutions": Case(FiniteWindow, lambda batch: ((torch.randn(batch, 4, 20),), {})),
    "gin": Case(GraphIsomorphismNetwork, _graphs),
    "tabular_mlp": Case(TabularMLP, _tables),
    "wrn_16_4": Case(partial(_wide, 16, 4), _pictures),
    "wrn_28_2": Case(partial(_wide, 28, 2), _pictures),
}
