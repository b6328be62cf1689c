"""One call for each bank, one item for each site, used by all its reads."""

import operator

import torch
from torch import fx, nn
from torch.nn import functional

from npas_fx.passes.generate_weights import generate_weights
from npas_fx.passes.pipeline import rewrite


def graph_of_two():
    """``linear(linear(x, a), b) @ a``, with two reads of ``a``."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    a = graph.get_attr("a")
    y = graph.call_function(functional.linear, (x, a))
    b = graph.get_attr("b")
    y = graph.call_function(functional.linear, (y, b))
    again = graph.get_attr("a")
    graph.output(graph.call_function(torch.matmul, (y, again)))
    a.meta["note"] = "a"
    return graph


class Fixed(nn.Module):
    def __init__(self, *weights):
        super().__init__()
        self.weights = weights
        self.calls = 0

    def forward(self):
        self.calls += 1
        return self.weights


def test_one_call_a_bank_and_one_item_a_site():
    graph = graph_of_two()
    before = str(graph)
    new = generate_weights(graph, {"banks.0": ("b", "a")})
    assert str(graph) == before
    assert not [node for node in new.nodes if node.op == "get_attr"]
    (call,) = (node for node in new.nodes if node.op == "call_module")
    items = [node for node in new.nodes if node.target is operator.getitem]
    assert call.target == "banks.0"
    assert [item.args for item in items] == [(call, 0), (call, 1)]
    assert [len(item.users) for item in items] == [1, 2]
    assert items[1].meta["note"] == "a"
    new.lint()


def test_the_result_computes_with_the_generated_weights():
    a, b, x = torch.randn(3, 3), torch.randn(3, 3), torch.randn(2, 3)
    root = nn.Module()
    root.bank = Fixed(b, a)
    module = fx.GraphModule(root, generate_weights(graph_of_two(), {"bank": ("b", "a")}))
    expected = functional.linear(functional.linear(x, a), b) @ a
    assert torch.equal(module(x), expected)
    assert module.bank.calls == 1


def test_two_banks_in_order_and_other_reads_stay():
    new = generate_weights(graph_of_two(), {"banks.0": ("b",)})
    assert [node.target for node in new.nodes if node.op == "get_attr"] == ["a", "a"]
    new = rewrite(graph_of_two(), {"banks.0": ("b",), "banks.1": ("a",)})
    assert [n.target for n in new.nodes if n.op == "call_module"] == ["banks.0", "banks.1"]


def test_nothing_to_do_gives_an_equal_graph():
    graph = graph_of_two()
    new = generate_weights(graph, {})
    assert new is not graph
    assert str(new) == str(graph)


def test_what_is_read_in_another_graph_only_is_left_out():
    new = generate_weights(graph_of_two(), {"banks.0": ("c", "a"), "banks.1": ("d",)})
    assert [n.target for n in new.nodes if n.op == "call_module"] == ["banks.0"]
    assert [n.args[1] for n in new.nodes if n.target is operator.getitem] == [1]
