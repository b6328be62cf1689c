"""Lowering shows the weights of exactly the classes that have a rule, and changes nothing else."""

import types

import torch
from torch import fx, nn
from torch.nn import functional

from npas_fx.passes.lower import lower
from npas_fx.passes.op_rules import Refusal
from npas_fx.passes.opaque import call_opaque


def traced(model):
    return fx.symbolic_trace(model).graph


def test_input_graph_is_not_changed_and_names_and_order_stay():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    graph = traced(model)
    before = str(graph)
    lowered, stays = lower(graph, model)
    assert str(graph) == before
    assert stays == {"1": "no op rule for ReLU"}
    order = [n.target for n in lowered.nodes if n.op in ("call_function", "call_module")]
    assert order == [functional.linear, "1", functional.linear]
    lowered.lint()
    again, _ = lower(lowered, model)
    assert str(again) == str(lowered)


def test_new_nodes_take_the_meta_of_the_call():
    model = nn.Sequential(nn.Linear(4, 4))
    graph = traced(model)
    call = next(node for node in graph.nodes if node.op == "call_module")
    call.meta["note"] = "kept"
    lowered, _ = lower(graph, model)
    assert all(
        node.meta["note"] == "kept" for node in lowered.nodes if node.op.startswith(("get", "call"))
    )


def test_a_tied_weight_is_read_under_its_first_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    lowered, _ = lower(traced(model), model)
    assert {n.target for n in lowered.nodes if n.op == "get_attr"} == {"0.weight", "0.bias"}


def test_subclasses_hooks_and_own_forwards_stay_calls():
    class Own(nn.Linear):
        pass

    class OwnCell(nn.GRUCell):
        pass

    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)), OwnCell(4, 4), nn.LayerNorm(4))
    model[0].__class__ = Own
    model[1].register_forward_hook(lambda *args: None)
    model[2].forward = types.MethodType(lambda self, x: x, model[2])
    graph = fx.Graph()
    value = graph.placeholder("x")
    for k in range(5):
        value = graph.call_module(str(k), (value,))
    graph.output(value)
    lowered, stays = lower(graph, model)
    assert stays == {
        "0": "no op rule for Own",
        "1": "Linear with a forward hook",
        "2": "Linear with a forward of its own",
        "3": "no op rule for OwnCell",
        "4": "norm (LayerNorm)",
    }
    opaque = [node for node in lowered.nodes if node.target is call_opaque]
    assert [node.args[0].target for node in opaque] == ["0", "1", "2", "3"]
    assert opaque[3].args[1] == ("weight_ih", "weight_hh")
    assert [weight.target for weight in opaque[3].args[2]] == ["3.weight_ih", "3.weight_hh"]
    assert [node.target for node in lowered.nodes if node.op == "call_module"] == ["4"]


def test_all_names_of_a_tied_weight_are_handed_in():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x)) if x.sum() > 0 else x

    model = nn.Sequential(Pair(), nn.Linear(4, 4))
    model[1].weight = model[0].a.weight
    graph = fx.Graph()
    graph.output(graph.call_module("0", (graph.placeholder("x"),)))
    lowered, _ = lower(graph, model)
    (opaque,) = (node for node in lowered.nodes if node.target is call_opaque)
    assert opaque.args[1] == ("a.weight", "b.weight")
    assert [weight.target for weight in opaque.args[2]] == ["0.a.weight", "0.a.weight"]


def test_rules_can_be_given_and_may_refuse():
    def double(graph, call, module, read):
        return graph.call_function(torch.mul, (call.args[0], 2))

    model = nn.Sequential(nn.ReLU(), nn.Tanh())
    rules = {nn.ReLU: double, nn.Tanh: lambda *args: Refusal("too curved")}
    lowered, stays = lower(traced(model), model, rules)
    assert stays == {"1": "too curved"}
    x = torch.randn(3)
    assert torch.equal(fx.GraphModule(model, lowered)(x), (x * 2).tanh())
