"""What a graph of a model would get wrong is refused before anything is traced."""

import types
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import nn

import npas_fx
from npas_fx.passes.capture import capture
from two_layers import Model, x


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


def test_two_parameters_over_one_memory_are_refused(refuses):
    model = Model(lambda self, x: self.run(x) + self.b(self.c(x)), c=nn.Linear(4, 6))
    model.c.weight = nn.Parameter(model.a.weight.data)
    refuses(model, x(), match=r"c\.weight and a\.weight are two tensors over the same memory")
    model = Model(lambda self, x: self.run(x) + self.view.sum())
    model.register_buffer("view", model.a.weight.detach())
    refuses(model, x(), match=r"view and a\.weight are two tensors")


def test_instance_level_forward(check, refuses):
    model = Model()
    model.forward = types.MethodType(lambda self, x: self.b(self.a(x)) * 3, model)
    model.b.forward = types.MethodType(lambda self, x: F.linear(x, self.weight) * 2, model.b)
    check(model, x())
    assert capture(model).leaves == {"b": "Linear with a forward of its own"}

    model = Model()
    plain = model.a.forward
    model.a.forward = lambda x: plain(x) * 2
    refuses(model, x(), match="'a' has a forward of its own")
    model = Model()
    outer = model.forward
    model.forward = lambda x: outer(x) * 2
    refuses(model, x(), match="'Model' has a forward of its own")


class Merges(nn.Module):
    """Adds its low-rank part to the weight in eval mode, as loralib does."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(8, 8).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.rand(2, 8)), nn.Parameter(torch.rand(8, 2))
        self.is_merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.is_merged:
            self.base.weight.data += (-1 if mode else 1) * self.b @ self.a
            self.is_merged = not mode
        return self

    def forward(self, x):
        y = self.base(x)
        return y if self.is_merged else y + x @ self.a.t() @ self.b.t()


def test_weights_that_train_merges_need_the_models_own_code():
    model, inputs = Merges(), torch.rand(3, 8)
    with pytest.raises(npas_fx.CaptureError, match=r"train\(False\) changes .* base\.weight"):
        npas_fx.transform(model, 1.0, example_inputs=inputs)
    shared = npas_fx.transform(model, 1.0, example_inputs=inputs, emit="module")
    expected = model(inputs)
    for is_training in (True, False, True):
        torch.testing.assert_close(shared.train(is_training)(inputs), expected)


class Hides(nn.Module):
    """Its module goes by the name of a method, which ``self.to`` is."""

    def __init__(self):
        super().__init__()
        self.to = nn.Linear(3, 3)

    def forward(self, x):
        return self._modules["to"](x)


def test_a_module_that_its_parents_class_hides_is_refused():
    with pytest.raises(npas_fx.CaptureError, match=r"'1\.to' cannot be reached.* gives Hides\.to;"):
        npas_fx.inspect(nn.Sequential(nn.Linear(3, 3), Hides()), example_inputs=torch.zeros(2, 3))


class Shows(nn.Module):
    """A property gives the module of its name."""

    def __init__(self):
        super().__init__()
        self._modules["inner"] = nn.Linear(3, 3)

    @property
    def inner(self):
        return self._modules["inner"]

    def forward(self, x):
        return self.inner(x)


def test_a_module_that_a_property_gives_is_captured():
    inventory = npas_fx.inspect(Shows(), example_inputs=torch.zeros(2, 3))
    assert [site.name for site in inventory.sites] == ["inner.weight"]
