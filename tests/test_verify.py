"""The oracle catches a wrong graph, a wrong mode and a wrong buffer, and changes nothing."""

import copy
import operator

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import torch.utils.checkpoint
from torch import fx, nn

import npas_fx
from npas_fx.build import build_banks, give_birth
from npas_fx.errors import VerificationError
from npas_fx.generators import GENERATORS
from npas_fx.passes import emit as emit_module
from npas_fx.passes.capture import capture
from npas_fx.passes.modes import choose
from npas_fx.passes.skeleton import clone, copy_with
from npas_fx.verify import generate, verify


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count.add_(1)
        y = self.norm(self.b(self.a(x).relu()))
        return {"y": F.dropout(y, 0.5, self.training), "rows": x.shape[0]}


def x():
    return torch.randn(5, 6)


def emit(model, corrupt=None, budget=0.6, mode=0):
    """Transform by the same steps as ``apply``, with a corruption of a graph in between."""
    plan = npas_fx.plan(model, budget, example_inputs=x(), solver="greedy")
    captured = capture(model, x())
    if corrupt is not None:
        corrupt(captured.modes[mode].graph)
        captured.modes[mode].graph.lint()
    banks = build_banks(plan, captured.inventory, GENERATORS)
    weights = {site.name: model.get_parameter(site.name) for site in captured.inventory.sites}
    give_birth(banks, plan, weights, 0)
    store = copy_with(model, lambda _, tensor: clone(tensor))
    return emit_module.emit(captured, plan, store, banks)


def find(graph: fx.Graph, target):
    return next(node for node in graph.nodes if node.target == target)


def replace_relu(graph):
    find(graph, "relu").target = "tanh"


def detach_weight(graph):
    read = next(n for n in graph.nodes if n.op == "get_attr" and n.target == "b.weight")
    with graph.inserting_after(read):
        cut = graph.call_method("detach", (read,))
    read.replace_all_uses_with(cut, delete_user_cb=lambda user: user is not cut)


def swap_flag(graph):
    node = find(graph, choose)
    node.args = (node.args[0], node.args[2], node.args[1])


def never_drop(graph):
    node = find(graph, choose)
    node.args = (node.args[0], False, False)


def other_buffer(graph):
    find(graph, "add_").args = (find(graph, "add_").args[0], 2)


def lose_buffer(graph):
    graph.erase_node(find(graph, "add_"))


def other_number(graph):
    node = graph.output_node()
    rows = node.args[0]["rows"]
    with graph.inserting_before(node):
        more = graph.call_function(operator.add, (rows, 1))
    node.args = ({**node.args[0], "rows": more},)


def other_structure(graph):
    node = graph.output_node()
    node.args = ([node.args[0]["y"], node.args[0]["rows"]],)


def other_dtype(graph):
    node = graph.output_node()
    with graph.inserting_before(node):
        double = graph.call_method("double", (node.args[0]["y"],))
    node.args = ({**node.args[0], "y": double},)


def swap_weights(graph):
    reads = [n for n in graph.nodes if n.op == "get_attr" and n.target in ("a.weight", "b.weight")]
    reads[0].target, reads[1].target = reads[1].target, reads[0].target


CORRUPTIONS = {
    replace_relu: r"outputs in train mode\['y'\] differs",
    detach_weight: "gradients in train mode",
    swap_flag: "outputs in train mode",
    never_drop: "outputs in train mode",
    other_buffer: r"buffers in train mode\['count'\]",
    lose_buffer: r"buffers in train mode\['count'\]",
    other_number: r"outputs in train mode\['rows'\] is 6, not 5",
    other_structure: "outputs in train mode differ in structure",
    other_dtype: "shape or dtype",
    swap_weights: "outputs in train mode",
}


@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("budget", [0.6, 1.0])
def test_a_corrupted_module_is_caught(corrupt, budget):
    torch.manual_seed(0)
    model = Model()
    verify(emit(model, budget=budget), model, x())
    with pytest.raises(VerificationError, match=CORRUPTIONS[corrupt]):
        verify(emit(model, corrupt, budget), model, x())


def test_a_fault_in_eval_mode_alone_is_caught():
    def always_drop(graph):
        node = find(graph, choose)
        node.args = (node.args[0], True, True)

    model = Model()
    with pytest.raises(VerificationError, match="outputs in eval mode"):
        verify(emit(model, always_drop), model, x())


def test_a_module_of_another_model_is_caught():
    model, other = Model(), Model()
    other.norm.running_mean.add_(1)
    with pytest.raises(VerificationError):
        verify(emit(model), other, x())


def test_nothing_is_changed():
    torch.manual_seed(0)
    model = Model()
    model.norm.eval()
    emitted = emit(model)
    emitted.norm.train()
    modules = (model, emitted)
    before = [copy.deepcopy(module.state_dict()) for module in modules]
    flags = [[part.training for part in module.modules()] for module in modules]
    value = x()
    copied = value.clone()
    reports = verify(emitted, model, value)
    assert [report.mode for report in reports] == ["train", "eval"]
    assert max(report.outputs for report in reports) < 1e-5
    assert torch.equal(value, copied)
    assert [[part.training for part in module.modules()] for module in modules] == flags
    for module, old in zip(modules, before, strict=True):
        assert all(torch.equal(tensor, old[name]) for name, tensor in module.state_dict().items())
        assert all(parameter.grad is None for parameter in module.parameters())


def test_the_random_state_is_not_touched():
    model = Model()
    emitted, value = emit(model), x()
    state = torch.get_rng_state()
    verify(emitted, model, value, seed=5)
    assert torch.equal(torch.get_rng_state(), state)


class WithoutBackward(nn.Module):
    """In eval mode it changes what backward needs, as code for inference may."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, value):
        y = self.fc(value).relu().exp()
        return y if self.training else y.mul_(y)


def test_where_the_original_has_no_backward_outputs_are_compared():
    shared = npas_fx.transform(WithoutBackward(), 0.5, example_inputs=x(), solver="greedy")
    assert [each.mode for each in verify(shared, WithoutBackward(), x())] == ["train", "eval"]
    with pytest.raises(VerificationError, match="outputs in eval mode"):
        verify(emit(WithoutBackward(), replace_relu, 1.0, mode=1), WithoutBackward(), x())


def test_an_example_that_the_model_refuses():
    model = Model()
    emitted = emit(model)
    with pytest.raises(npas_fx.CaptureError, match="the model raised RuntimeError on the example"):
        verify(emitted, model, torch.randn(5, 7))


def test_generated_weights_are_those_of_the_banks():
    emitted = emit(Model(), budget=0.5)
    weights = generate(emitted)
    shared = {n for bank in emitted.plan.banks if not bank.is_dedicated for n in bank.sites}
    assert weights.keys() == shared
    assert all(weight.shape == (6, 6) for weight in weights.values())


class ZeroStart(nn.Module):
    """As people initialise residual networks: at birth nothing behind the zeros can be seen."""

    def __init__(self):
        super().__init__()
        self.read, self.write = nn.Linear(6, 6), nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.zeros(6))
        self.head = nn.Linear(6, 3)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        return self.head(x + self.scale * self.write(self.read(x).relu()))


@pytest.mark.parametrize("corrupt", [replace_relu, None])
def test_layers_that_start_at_zero_hide_nothing(corrupt):
    model = ZeroStart()
    shared = emit(model, corrupt, budget=0.7)
    before = {name: tensor.clone() for name, tensor in shared.state_dict().items()}
    if corrupt is None:
        verify(shared, model, x())
    else:
        with pytest.raises(VerificationError, match="outputs in train mode"):
            verify(shared, model, x())
    assert all(torch.equal(tensor, before[name]) for name, tensor in shared.state_dict().items())


def test_a_parameter_that_must_not_be_moved_is_not():
    class Logarithm(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.tiny = nn.Parameter(torch.full((6,), 1e-6))

        def forward(self, x):
            return self.b(self.a(x).relu()) * self.tiny.log()

    model = Logarithm()
    verify(emit(model), model, x())
    with pytest.raises(VerificationError):
        verify(emit(model, replace_relu), model, x())


class ChangesInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x, extra):
        x.mul_(2)
        return self.fc(x) + extra.pop("bias")


def test_a_model_that_changes_its_inputs_is_run_on_copies():
    inputs, extra = x(), {"bias": torch.ones(6, requires_grad=True)}
    before = inputs.clone()
    for emit in ("graph", "module"):
        npas_fx.transform(ChangesInputs(), 1.0, example_inputs=(inputs, extra), emit=emit)
    assert torch.equal(inputs, before)
    assert list(extra) == ["bias"]
    assert extra["bias"].grad is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_may_be_reentrant(reentrant):
    class Checkpointed(Model):
        def forward(self, x):
            y = torch.utils.checkpoint.checkpoint(self.a, x, use_reentrant=reentrant)
            return self.b(y.relu())

    npas_fx.transform(Checkpointed(), 0.6, example_inputs=x().requires_grad_())


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(6, 6, dtype=torch.cfloat)) for _ in range(2))

    def forward(self, x):
        return x.to(torch.cfloat) @ self.a @ self.b.conj()


def test_complex_outputs_are_compared():
    shared = npas_fx.transform(Complex(), 1.0, example_inputs=x())
    assert max(each.gradients for each in verify(shared, Complex(), x())) < 1e-3

    def scale(graph):
        find(graph, "conj").target = "positive"

    with pytest.raises(VerificationError, match="outputs"):
        verify(emit(Complex(), scale, 1.0), Complex(), x())


class Freezes(nn.Module):
    """Freezes its norm whenever its mode is set."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval().weight.requires_grad_(False)
        return self

    def forward(self, x):
        return self.norm(self.fc(x))


@pytest.mark.parametrize("emit", ["graph", "module"])
def test_what_train_freezes_is_frozen(emit):
    shared = npas_fx.transform(Freezes(), 1.0, example_inputs=x(), emit=emit)
    assert shared.norm.weight.requires_grad
    copied = copy.deepcopy(shared)
    for each in (shared, copied):
        assert not each.train().norm.weight.requires_grad
        assert each.norm.bias.requires_grad
