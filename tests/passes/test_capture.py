"""Every parameter is accounted for once: a site, or kept with the reason."""

import copy
import threading
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import nn

import npas_fx
from npas_fx.passes.capture import capture


class Model(nn.Module):
    """Two linear layers, and what a test adds."""

    def __init__(self, forward=None, **attributes):
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.b = nn.Linear(6, 4)
        self._forward = forward
        for name, value in attributes.items():
            setattr(self, name, value)

    def run(self, x):
        return self.b(self.a(x).relu())

    def forward(self, x):
        return self.run(x) if self._forward is None else self._forward(self, x)


def reasons(model):
    return {item.name: item.reason for item in capture(model).inventory.kept}


def names(model):
    return [site.name for site in capture(model).inventory.sites]


def x(*shape):
    return torch.randn(*(shape or (3, 4)))


def parameter(*shape, **options):
    return nn.Parameter(torch.randn(shape, **options))


def test_every_parameter_once_with_a_reason(check):
    shared = nn.Linear(4, 4)

    def forward(self, x):
        x = self.shared(self.norm(self.alias(x))) + self.vector * self.scalar
        x = x + self.matrix.sum() + self.frozen.mean() + self.one * 1 + self.empty.sum()
        return self.run(x + F.linear(x, self.shared.weight))

    model = Model(
        forward,
        shared=shared,
        alias=shared,
        norm=nn.LayerNorm(4),
        vector=parameter(4),
        scalar=parameter(),
        matrix=parameter(2, 3),
        frozen=nn.Parameter(torch.randn(2, 2), requires_grad=False),
        one=parameter(1, 1),
        empty=parameter(0, 4),
        unused=parameter(5, 5),
        spectrum=nn.Parameter(torch.randn(2, 2, dtype=torch.complex64)),
        integers=nn.Parameter(torch.ones(2, 2, dtype=torch.int64), requires_grad=False),
    )
    inventory = capture(model).inventory
    listed = [name for item in inventory for name in (item.name, *item.aliases)]
    assert sorted(listed) == sorted(
        name for name, _ in model.named_parameters(remove_duplicate=False)
    )
    assert len(set(listed)) == len(listed)
    assert {item.name: item.reason for item in inventory.kept} == {
        "vector": "vector",
        "scalar": "vector",
        "frozen": "frozen",
        "one": "too small",
        "empty": "too small",
        "unused": "not used in forward",
        "spectrum": "dtype complex64",
        "integers": "frozen",
        "a.bias": "bias",
        "b.bias": "bias",
        "shared.bias": "bias",
        "norm.weight": "norm (LayerNorm)",
        "norm.bias": "norm (LayerNorm)",
    }
    shared_site = next(site for site in inventory.sites if site.name == "shared.weight")
    assert shared_site.aliases == ("alias.weight",)
    assert shared_site.uses == 3
    assert {site.name: site.kind for site in inventory.sites}["matrix"] == "raw"
    check(model, x())


def test_tied_weights_are_one_site_used_everywhere(check):
    def forward(self, ids):
        y = self.b(self.a(self.embedding(ids)))
        return self.head(y)

    model = Model(forward, embedding=nn.Embedding(7, 4), head=nn.Linear(4, 7, bias=False))
    model.head.weight = model.embedding.weight
    (site,) = (s for s in capture(model).inventory.sites if s.aliases)
    assert (site.name, site.aliases, site.uses) == ("embedding.weight", ("head.weight",), 2)
    emitted = check(model, torch.randint(7, (2, 5)))
    assert "head.weight" not in dict(emitted.named_parameters())


def test_a_weight_tied_to_that_of_a_leaf_stays(check):
    hooked = nn.Linear(4, 6)
    model = Model(lambda self, x: self.run(x) + self.b(self.hooked(x)), hooked=hooked)
    hooked.weight = model.a.weight
    hooked.register_forward_hook(lambda module, args, output: output * 2)
    assert reasons(model)["a.weight"] == "Linear with a forward hook"
    emitted = check(model, x())
    assert emitted.a.weight is emitted.hooked.weight


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward", "full_backward_pre"])
def test_a_linear_with_hooks_stays_a_call_and_plain(kind, check):
    model = Model()
    hooks = {
        "forward_pre": lambda module, args: (args[0] * 2,),
        "forward": lambda module, args, output: output * 2,
        "full_backward": lambda module, inputs, outputs: (inputs[0] * 3,),
        "full_backward_pre": lambda module, outputs: (outputs[0] * 3,),
    }
    getattr(model.a, f"register_{kind}_hook")(hooks[kind])
    assert reasons(model)["a.weight"].startswith("Linear with a ")
    assert names(model) == ["b.weight"]
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


def test_backward_hooks_of_containers_are_refused(refuses):
    body = nn.Sequential(nn.Linear(4, 4))
    body.register_full_backward_hook(lambda module, inputs, outputs: None)
    model = Model(lambda self, x: self.run(self.body(x)), body=body)
    refuses(model, x(), match="'body' has a backward hook")


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward", "full_backward_pre"])
def test_hooks_of_the_root_are_refused(kind, refuses):
    model = Model()
    getattr(model, f"register_{kind}_hook")(lambda *args: None)
    refuses(model, x(), match=f"itself has a {kind.removeprefix('full_')} hook")


def test_wrapped_roots_are_refused(refuses):
    with pytest.raises(npas_fx.CaptureError, match=r"DataParallel; pass model\.module"):
        capture(nn.DataParallel(Model()))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(Model())
        with pytest.raises(npas_fx.CaptureError, match=r"DistributedDataParallel; pass model\.mod"):
            capture(wrapped)
    finally:
        dist.destroy_process_group()
    with pytest.raises(npas_fx.CaptureError, match="the model is compiled"):
        capture(torch.compile(Model(), backend="eager"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(npas_fx.CaptureError, match="TorchScript"):
        capture(scripted)
    with pytest.raises(TypeError, match=r"not a torch\.nn\.Module"):
        capture(lambda x: x)


def test_a_scripted_part_is_refused_or_kept():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(4, 4))
    with pytest.raises(npas_fx.CaptureError, match="part"):
        capture(Model(lambda self, x: self.run(self.part(x)), part=scripted))


def test_what_cannot_be_copied_is_refused():
    with pytest.raises(npas_fx.CaptureError, match="cannot be copied"):
        capture(Model(lock=threading.Lock()))


def test_two_parameters_over_one_memory_are_refused(refuses):
    model = Model(lambda self, x: self.run(x) + self.b(self.c(x)), c=nn.Linear(4, 6))
    model.c.weight = nn.Parameter(model.a.weight.data)
    refuses(model, x(), match=r"c\.weight and a\.weight are two tensors over the same memory")
    model = Model(lambda self, x: self.run(x) + self.view.sum())
    model.register_buffer("view", model.a.weight.detach())
    refuses(model, x(), match=r"view and a\.weight are two tensors")


def test_parameter_lists_and_dicts(check):
    def forward(self, x):
        for weight in self.items:
            x = x @ weight
        return self.run(x @ self.named["k"] + self.single)

    model = Model(
        forward,
        items=nn.ParameterList(parameter(4, 4) for _ in range(3)),
        named=nn.ParameterDict({"k": parameter(4, 4), "unused": parameter(4, 4)}),
        single=parameter(4, 4)[:1].detach(),
    )
    assert set(names(model)) == {
        *(f"items.{k}" for k in range(3)),
        "named.k",
        "a.weight",
        "b.weight",
    }
    check(model, x())


def test_reparametrized_linears_stay_plain_with_a_reason(check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = Model()
        nn.utils.weight_norm(old.a)
    assert reasons(old)["a.weight_v"] == "Linear with a forward_pre hook"
    check(old, x())
    for reparametrize in (
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
    ):
        model = Model()
        reparametrize(model.a)
        kept = reasons(model)
        assert {kept[name] for name in kept if "original" in name} == {
            "no op rule for ParametrizedLinear"
        }
        check(model, x())


def test_a_subclass_of_linear_is_traced_through(check):
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model = Model()
    model.a = Scaled(4, 6)
    assert names(model) == ["a.weight", "b.weight"]
    check(model, x())


def test_a_parameter_changed_in_place_stays(check):
    def forward(self, x):
        self.a.weight.data.clamp_(-0.1, 0.1)
        self.b.weight.data[0] = 0.5
        return self.run(x)

    model = Model(forward)
    assert reasons(model)["a.weight"] == reasons(model)["b.weight"] == "changed in place"


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


def test_only_the_device_of_a_parameter_is_no_use_of_it(check):
    def forward(self, x):
        return self.run(x) + torch.zeros(4, device=self.anchor.device, dtype=self.anchor.dtype)

    model = Model(forward, anchor=parameter(3, 3))
    assert reasons(model)["anchor"] == "not used in forward"
    check(model, x())


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


def test_frozen_modules_and_mixed_dtypes(check):
    model = Model(
        lambda self, x: self.run(x) + self.c(x.double()).float(), c=nn.Linear(4, 4).double()
    )
    model.a.requires_grad_(False)
    assert reasons(model)["a.weight"] == "frozen"
    emitted = check(model, x())
    assert not emitted.a.weight.requires_grad


def test_an_error_names_the_innermost_module(refuses):
    class Bad(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x) if x.max() > 0 else x

    body = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Bad()))
    model = Model(lambda self, x: self.run(self.body(x)), body=body)
    refuses(
        model, x(), match=r"'body\.1\.0' \(Bad\) cannot be traced in train mode: .*test_capture"
    )


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


def test_modules_of_torch_without_a_rule_stay_with_a_reason(check):
    model = Model(
        lambda self, x: self.run(self.attention(x, x, x)[0] + self.lstm(x)[0] + self.encoder(x)),
        attention=nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True),
        lstm=nn.LSTM(4, 4, num_layers=2, dropout=0.3, batch_first=True),
        encoder=nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1, enable_nested_tensor=False
        ),
    )
    kept = reasons(model)
    assert kept["attention.in_proj_weight"] == "no op rule for MultiheadAttention"
    assert kept["lstm.weight_hh_l1"] == "recurrent (LSTM)"
    assert kept["encoder.layers.0.linear1.weight"] == "no op rule for TransformerEncoder"
    assert names(model) == ["a.weight", "b.weight"]
    check(model, x(2, 5, 4))
