"""What flows through a graph, and what is constant: shapes, positions, views of weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from npas_fx.passes.capture import capture
from npas_fx.passes.flow import Flow


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.places, self.table = nn.Embedding(9, 4), nn.Parameter(torch.randn(7, 4))
        self.viewed = nn.Parameter(torch.randn(2, 8))
        self.register_buffer("index", torch.tensor([1, 3]))

    def forward(self, x):
        length = x.shape[1] // 1
        x = self.fc(x) + self.places(torch.arange(length))
        x = x + self.table[self.index].sum(0)
        return functional.linear(x, torch.tanh(self.viewed.view(4, 4)))


def flow_of(model):
    graph = capture(model).graph
    reads = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            reads.setdefault(node.target, []).append(node)
    return graph, Flow(graph, {name: reads[name] for name in model.state_dict() if name in reads})


def names(nodes):
    return [getattr(node.target, "__name__", node.target) for node in nodes]


def test_weights_are_applied_where_they_meet_what_flows():
    _, flow = flow_of(Model())
    assert {name: names(uses) for name, uses in flow.uses_of.items()} == {
        "fc.weight": ["linear"],
        "fc.bias": ["linear"],
        "places.weight": ["embedding"],  # an operation, though its positions are constant
        "table": ["add"],
        "viewed": ["linear"],  # behind the view and the tanh
        "index": ["add"],
    }
    assert flow.looked_up == {"table", "index"}


def test_shapes_and_what_is_made_from_them_do_not_flow():
    graph, flow = flow_of(Model())
    flowing = set(flow.graph)
    constant = names(node for node in graph.nodes if node not in flowing and node.op[:4] == "call")
    assert constant == [
        "getattr",
        "getitem",
        "floordiv",
        "arange",
        "getitem",
        "sum",
        "view",
        "tanh",
    ]
    positions = next(node for node in flowing if names([node]) == ["embedding"])
    assert positions not in flow.from_input
    assert names(flow.values(next(iter(flow.uses_of["viewed"])))) == ["add"]
