"""A captured model does what the original does, whatever it is built of."""

import copy
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.utils import parametrize

import npas_fx
from npas_fx.passes.capture import capture
from two_layers import Model, names, reasons, x


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward", "full_backward_pre"])
def test_a_linear_with_hooks_stays_a_call(kind, check):
    model = Model()
    hooks = {
        "forward_pre": lambda module, args: (args[0] * 2,),
        "forward": lambda module, args, output: output * 2,
        "full_backward": lambda module, inputs, outputs: (inputs[0] * 3,),
        "full_backward_pre": lambda module, outputs: (outputs[0] * 3,),
    }
    getattr(model.a, f"register_{kind}_hook")(hooks[kind])
    assert capture(model).leaves["a"].startswith("Linear with a ")
    assert names(model) == ["a.weight", "b.weight"]
    check(model, x().requires_grad_())


def test_hooks_of_norms_and_containers_run(check):
    calls = []
    body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    body[1].register_forward_hook(lambda module, args, output: calls.append(1) or output * 2)
    body.register_forward_hook(lambda module, args, output: output + args[0])
    body.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    emitted = check(Model(lambda self, x: self.run(self.body(x)), body=body), x())
    calls.clear()
    emitted(x())
    assert calls == [1]


def test_containers_with_backward_hooks_stay_calls(falls_back):
    body = nn.Sequential(nn.Linear(4, 4))
    body.register_full_backward_hook(lambda module, inputs, outputs: None)
    model = Model(lambda self, x: self.run(self.body(x)), body=body)
    falls_back(model, x().requires_grad_(), match="has a backward hook", path="body")


def test_a_scripted_part_is_refused_or_kept():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(4, 4))
    with pytest.raises(npas_fx.CaptureError, match="part"):
        capture(Model(lambda self, x: self.run(self.part(x)), part=scripted))


def test_what_cannot_be_copied_is_refused():
    with pytest.raises(npas_fx.CaptureError, match="cannot be copied"):
        capture(Model(lock=threading.Lock()))


def test_weights_behind_a_reparametrization_are_sites(check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = Model()
        nn.utils.weight_norm(old.a)
    assert names(old) == ["a.weight_v", "b.weight"]
    check(old, x())


PARAMETRIZATIONS = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "own": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
}


class Doubled(nn.Module):
    def forward(self, weight):
        return weight.mul(2)


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_weights_behind_a_parametrization_are_sites(name, check):
    def forward(self, x):
        with parametrize.cached():
            return self.run(x) + F.linear(self.a(x), self.a.weight.t())

    model = Model(forward)
    PARAMETRIZATIONS[name](model.a)
    captured = capture(model, x())
    assert not captured.leaves.keys() & {"", "a", "a.parametrizations.weight"}
    found = {site.name: site for site in captured.inventory.sites}
    assert len(found) == 2
    assert {site.kind for site in found.values()} == {"linear"}
    made = [node for node in captured.graph.nodes if node.op == "call_module"]
    assert len(made) == 1
    assert len(names(model)) == 2  # also without an example
    with parametrize.cached():
        capture(model, x())
        assert not parametrize._cache
    check(model, x(), by_copy=True)


def test_a_subclass_of_linear_is_traced_through(check):
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model = Model()
    model.a = Scaled(4, 6)
    assert names(model) == ["a.weight", "b.weight"]
    check(model, x())


def test_parameters_and_buffers_keep_names_flags_and_values(check):
    model = Model(lambda self, x: self.run(x) + self.once + self.always)
    model.register_buffer("once", torch.randn(4), persistent=False)
    model.register_buffer("always", torch.randn(4))
    model.register_parameter("none", None)
    model.register_module("nothing", None)
    emitted = check(model, x())
    assert "always" in emitted.state_dict()
    assert "once" not in emitted.state_dict()
    assert emitted.none is None
    assert emitted.nothing is None
    assert torch.equal(emitted.a.bias, model.a.bias)
    assert emitted.a.bias.data_ptr() != model.a.bias.data_ptr()


def test_capture_and_its_reports_are_deterministic():
    model = Model(lambda self, x: F.dropout(self.run(x), training=self.training))
    first, second, renewed = capture(model), capture(model), capture(copy.deepcopy(model))
    assert str(first.graph) == str(second.graph) == str(renewed.graph)
    assert first.report() == second.report() == renewed.report()


def test_the_meta_device_is_enough_to_capture():
    with torch.device("meta"):
        model = Model()
    assert names(model) == ["a.weight", "b.weight"]
    assert str(capture(model).graph) == str(capture(Model()).graph)


def test_a_model_that_ran_before_is_captured_alike(check):
    def forward(self, x):
        self.last = self.run(x)
        return self.last

    model = Model(forward)
    model(x())
    model.a.weight.grad = torch.ones(6, 4)
    check(model, x())
    assert torch.equal(model.a.weight.grad, torch.ones(6, 4))


def test_a_graph_module_is_a_model(check):
    check(torch.fx.symbolic_trace(Model()), x())


def test_modules_with_awkward_names(check):
    class Awkward(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("plan", "banks", "graph", "meta", "code", "npas_banks", "self", "input"):
                self.add_module(name, nn.Linear(4, 4))

        def forward(self, input, len=None, self_=None):
            for child in self.children():
                input = child(input)
            return input

    emitted = check(Awkward(), x())
    assert isinstance(emitted.plan, nn.Module)
    assert npas_fx.plan_of(emitted).banks


def test_norms_and_dropout_of_any_library_are_leaves(check):
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x):
            if self.training:  # data-dependent structure is no matter inside a leaf
                with torch.no_grad():
                    self.mean.lerp_(x.mean(0), 0.1)
            return (x - self.mean) * self.scale if bool(x.abs().sum() > 0) else x

    class Drop(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5) if self.training else x

    model = Model(lambda self, x: self.drop(self.run(self.norm(x))), norm=Norm(), drop=Drop())
    captured = capture(model)
    assert captured.leaves == {"norm": "norm (Norm)", "drop": "no op rule for Drop"}
    assert reasons(model)["norm.scale"] == "norm (Norm)"
    check(model, x())


def test_the_innermost_module_becomes_a_call(falls_back):
    class Bad(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x) if x.max() > 0 else x

    body = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Bad()))
    model = Model(lambda self, x: self.run(self.body(x)), body=body)
    emitted = falls_back(model, x(), path="body.1.0", match="branches on a value .*test_capture")
    sites = {name for bank in emitted.plan.banks for name in bank.sites}
    assert {"body.0.weight", "body.1.0.fc.weight"} < sites


def test_state_inside_a_leaf_stays_with_the_leaf():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return x * self.calls if bool(x.sum() > -1e9) else x

    model = Model(lambda self, x: self.run(self.counter(x)), counter=Counter())
    emitted = npas_fx.transform(model, 1.0, example_inputs=x(), solver="greedy", verify=False)
    value = x()
    for _ in range(3):
        assert torch.equal(emitted(value), model(value))


def test_modules_of_torch_without_a_rule_are_handed_their_weights(check):
    model = Model(
        lambda self, x: self.run(self.attention(x, x, x)[0] + self.lstm(x)[0] + self.encoder(x)),
        attention=nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True),
        lstm=nn.LSTM(4, 4, num_layers=2, dropout=0.3, batch_first=True),
        encoder=nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1, enable_nested_tensor=False
        ),
    )
    weights = [name for name, parameter in model.named_parameters() if parameter.dim() > 1]
    assert names(model) == weights
    kinds = {site.name: site.kind for site in capture(model).inventory.sites}
    assert kinds["attention.in_proj_weight"] == "attention projection"
    assert kinds["lstm.weight_hh_l1"] == "recurrent"
    assert kinds["encoder.layers.0.linear1.weight"] == "linear"
    check(model, x(2, 5, 4))
