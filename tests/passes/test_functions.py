"""A ``torch.autograd.Function`` keeps its own backward in the emitted module."""

import pytest
import torch
from torch import nn

import npas_fx
from npas_fx.passes.capture import capture
from npas_fx.passes.functions import ApplyFunction
from two_layers import net, x


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 7


class Linear(torch.autograd.Function):
    """Has a setting, a weight, several results, and a result that is None."""

    @staticmethod
    def forward(ctx, value, weight, setting):
        ctx.save_for_backward(value, weight)
        assert not torch.is_grad_enabled()
        return value @ weight.t() * setting["factor"], None, weight.sum()

    @staticmethod
    def backward(ctx, gradient, nothing, of_sum):
        value, weight = ctx.saved_tensors
        return gradient @ weight * 3, gradient.t() @ value + of_sum, None


class AddsInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        ctx.mark_dirty(value)
        return value.add_(1)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 5


class Noise(torch.autograd.Function):
    generate_vmap_rule = False

    @staticmethod
    def forward(value):
        return value + torch.rand_like(value)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0]


class Rescales(torch.autograd.Function):
    """Changes what it is given behind the back of autograd."""

    @staticmethod
    def forward(ctx, value, weight):
        weight.data /= weight.data.abs().max()
        return value + weight.sum()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class Notes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, seen):
        seen.append(value.shape)
        return value * 1

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class Precise(torch.autograd.Function):
    """With decorators, which are functions around it."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, value):
        return value * 2

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, gradient):
        return gradient * 3


def doubles(self, x):
    return self.b(Double.apply(self.pre(x)))


def applies_a_weight(self, x):
    y, nothing, total = Linear.apply(x, self.a.weight, {"factor": 2.0})
    return self.b(y) + total if nothing is None else y


def adds_in_place(self, x):
    y = self.pre(x) * 1
    alias = y
    AddsInPlace.apply(y)
    return self.b(alias)


def draws(self, x):
    return self.b(Noise.apply(self.pre(x)))


def before_dropout(self, x):
    return self.b(nn.functional.dropout(Double.apply(self.pre(x)), training=self.training))


def decorated(self, x):
    return self.b(Precise.apply(self.pre(x)))


def made_in_forward(self, x):
    factor = 2 if self.training else 3

    class Scales(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value * factor

        @staticmethod
        def backward(ctx, gradient):
            return gradient * (factor + 1)

    return self.b(Scales.apply(self.pre(x)))


def in_train_mode_only(self, x):
    return self.b(Double.apply(self.pre(x)) if self.training else self.pre(x))


IN_TWO_GRAPHS = (in_train_mode_only, made_in_forward)
TRACED = (
    *(doubles, applies_a_weight, adds_in_place, draws, before_dropout, decorated),
    *IN_TWO_GRAPHS,
)


@pytest.mark.parametrize("forward", TRACED, ids=lambda f: f.__name__)
def test_is_traced(forward, check):
    model = net(forward)
    captured = capture(model, x())
    assert not captured.leaves
    assert len(captured.modes) == (2 if forward in IN_TWO_GRAPHS else 1)
    assert any(isinstance(node.target, ApplyFunction) for node in captured.graph.nodes)
    assert {"a.weight", "b.weight"} <= {site.name for site in captured.inventory.sites}
    check(model, x(), others=((torch.randn(5, 4),),))


def test_the_backward_is_the_function_s_own():
    emitted = npas_fx.transform(net(doubles), 1.0, example_inputs=x(), solver="greedy")
    value = x().requires_grad_()
    emitted(value).sum().backward()
    plain = npas_fx.materialize(emitted)
    (gradient,) = torch.autograd.grad(plain.run(value).sum(), value)
    torch.testing.assert_close(value.grad, 7 * gradient)


def test_survives_compilation():
    emitted = npas_fx.transform(net(doubles), 0.8, example_inputs=x(), solver="greedy")
    compiled = torch.compile(emitted, backend="eager", fullgraph=True)
    value = x(6, 4)
    torch.testing.assert_close(compiled(value), emitted(value))


def test_a_weight_that_it_changes_stays_plain(check):
    model = net(lambda self, x: self.run(Rescales.apply(x, self.a.weight)))
    assert {site.name for site in capture(model, x()).inventory.sites} == {"b.weight"}
    check(model, x())


def test_without_an_example_it_is_a_call():
    assert "Function Double gives is not known" in capture(net(doubles)).leaves[""]


def test_a_list_that_it_changes_makes_it_a_call(falls_back):
    def forward(self, x):
        seen = []
        y = Notes.apply(self.run(x), seen)
        return y * len(seen)

    falls_back(net(forward), x(), match="Function Notes gives is not known")


def test_one_that_reads_the_code_around_it_makes_it_a_call(falls_back):
    def forward(self, x):
        factor = x.mean()

        class Scales(torch.autograd.Function):
            @staticmethod
            def forward(ctx, value):
                return value * factor

            @staticmethod
            def backward(ctx, gradient):
                return gradient * factor

        return Scales.apply(self.run(x))

    falls_back(net(forward), x(), match="Function Scales, which reads variables")


def test_what_it_gives_is_kept_by_code_that_is_called():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.kept = nn.Linear(4, 4), None

        def forward(self, x):
            if self.kept is None:
                self.kept = Noise.apply(self.fc.weight)
            return x @ self.kept

    model = nn.Sequential(nn.Linear(4, 4), Keeps())
    assert "an earlier call left" in capture(model, x()).leaves["1"]
