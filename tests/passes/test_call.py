"""The emitted module is called as the original is, and refuses what it was not captured for."""

import functools
import inspect
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import npas_fx
from npas_fx.passes.call import check_constant, read_call


def model_of(forward):
    def __init__(self):  # noqa: N807
        nn.Module.__init__(self)
        self.fc = nn.Linear(4, 4)

    return type("Model", (nn.Module,), {"__init__": __init__, "forward": forward})()


def x():
    return torch.randn(3, 4)


def transform(model, *args, **kwargs):
    return npas_fx.transform(
        model, 1.0, example_inputs=args, example_kwargs=kwargs, solver="greedy", verify=False
    )


def annotated(self, x: Tensor, scale: float = 2.0, *, mask: "Tensor | None" = None) -> Tensor:
    y = self.fc(x) * scale
    return y if mask is None else y * mask


def positional_only(self, x, y=1.0, /, z=2.0):
    return self.fc(x) * y + z


def keyword_only(self, *, x, y=None):
    return self.fc(x) if y is None else self.fc(x) + y


def starred(self, x, *rest, scale=1.0, **named):
    for item in rest:
        x = x + item
    for item in named.values():
        x = x * item
    return self.fc(x) * scale


def odd_names(self, input, print=None, _run_=1.0, lambda_=math.inf, act=F.relu):
    return act(self.fc(input))


def names_that_the_code_reads(self, slice, *torch, getattr=None, inf=2.0):
    shape = slice.shape[0] if getattr is None else getattr.shape[0]
    return F.relu(self.fc(slice))[:shape, 1:] * inf + torch[0][:, 1:]


@pytest.mark.parametrize(
    ("forward", "args", "kwargs"),
    [
        (names_that_the_code_reads, (x(), x()), {}),
        (names_that_the_code_reads, (x(), x()), {"getattr": x()}),
        (annotated, (x(),), {}),
        (annotated, (x(), 3.0), {"mask": x()}),
        (annotated, (x(),), {"scale": x(), "mask": None}),
        (positional_only, (x(),), {}),
        (positional_only, (x(), x()), {"z": x()}),
        (keyword_only, (), {"x": x()}),
        (keyword_only, (), {"y": x(), "x": x()}),
        (starred, (x(),), {}),
        (starred, (x(), x(), x()), {"u": x(), "v": x(), "scale": 2.0}),
        (odd_names, (x(),), {}),
    ],
)
def test_signature_and_results_are_the_same(forward, args, kwargs, check):
    model = model_of(forward)
    emitted = check(model, *args, kwargs=kwargs)
    assert inspect.signature(emitted.forward) == inspect.signature(model.forward)


def test_an_optional_argument_is_captured_at_its_default():
    emitted = transform(model_of(annotated), x())
    emitted(x(), 2.0)
    emitted(x(), scale=2.0, mask=None)
    with pytest.raises(npas_fx.GuardError, match=r"captured for scale=2\.0.*called with another"):
        emitted(x(), 3.0)
    with pytest.raises(npas_fx.GuardError, match="captured for mask=None"):
        emitted(x(), mask=x())
    with pytest.raises(npas_fx.GuardError, match="scale"):
        emitted(x(), 2)  # an int is another constant than a float
    with pytest.raises(TypeError, match="missing"):
        emitted()
    with pytest.raises(TypeError, match="unexpected"):
        emitted(x(), other=1)


def test_a_number_in_the_example_is_a_constant_and_a_tensor_an_input():
    model = model_of(annotated)
    emitted = transform(model, x(), 3.0, mask=x())
    value, mask = x(), x()
    assert torch.equal(emitted(value, 3.0, mask=mask), model(value, 3.0, mask=mask))
    with pytest.raises(npas_fx.GuardError, match=r"scale=3\.0"):
        emitted(value, mask=mask)
    emitted = transform(model, x(), torch.tensor(3.0))
    assert torch.equal(emitted(value, torch.tensor(5.0)), model(value, torch.tensor(5.0)))


def test_an_input_has_the_type_of_the_example():
    emitted = transform(model_of(annotated), x(), mask=x())
    emitted(nn.Parameter(x()), mask=x())
    with pytest.raises(
        npas_fx.GuardError, match="captured for a Tensor as mask, called with a None"
    ):
        emitted(x())
    with pytest.raises(npas_fx.GuardError, match="captured for a Tensor as x, called with a list"):
        emitted([x()], mask=x())


def test_an_input_that_was_taken_for_a_tensor_must_be_one():
    def forward(self, x):
        return self.fc(x if isinstance(x, Tensor) else torch.cat(x))

    emitted = npas_fx.transform(model_of(forward), 1.0, solver="greedy")
    emitted(x())
    with pytest.raises(npas_fx.GuardError, match="captured for a Tensor as x"):
        emitted([x()])


def test_the_number_of_starred_arguments_is_guarded():
    emitted = transform(model_of(starred), x(), x(), u=x())
    emitted(x(), x(), u=x())
    with pytest.raises(npas_fx.GuardError, match="captured for 1 in rest, called with 2"):
        emitted(x(), x(), x(), u=x())
    with pytest.raises(npas_fx.GuardError, match=r"captured for \['u'\] in named"):
        emitted(x(), x(), v=x())


def test_defaults_of_any_type_are_constants(check):
    default = torch.ones(4)

    def forward(self, x, shift=default, size=(1, 2), act=F.relu, nothing=..., nan=math.nan):
        return act(self.fc(x) + shift) * size[1]

    model = model_of(forward)
    emitted = check(model, x())
    emitted(x(), default, (1, 2), F.relu)
    for name, value in {"shift": torch.ones(4), "size": (2, 2), "act": torch.relu}.items():
        with pytest.raises(npas_fx.GuardError, match=f"captured for {name}="):
            emitted(x(), **{name: value})
    assert "0x" not in str(read_call(model, x(), None).describe())


def test_an_example_that_does_not_fit_is_refused(refuses):
    model = model_of(annotated)
    refuses(model, x(), x(), x(), match="the example inputs do not fit forward")
    refuses(model, match="missing a required argument: 'x'")
    with pytest.raises(npas_fx.CaptureError, match=r"takes \*rest"):
        npas_fx.transform(model_of(starred), 1.0)


def test_containers_of_tensors_are_inputs(check):
    def forward(self, batch, pair):
        return self.fc(batch["x"]) + batch["more"][0] + pair[1]

    check(model_of(forward), {"x": x(), "more": [x()]}, (x(), x()))


def test_check_constant_knows_types():
    check_constant(None, "a", None)
    check_constant("mean", "a", "mean")
    check_constant((1, 2), "a", (1, 2))
    for value, expected in ((True, 1), (1, 1.0), (None, 0), (torch.ones(2), torch.ones(2))):
        with pytest.raises(npas_fx.GuardError):
            check_constant(value, "a", expected)


def test_arguments_reach_a_decorator_as_the_example_gives_them(check):
    """One by position, one by name, and what is left at its default not at all."""
    seen = []

    def decorated(forward):
        @functools.wraps(forward)
        def wrapper(self, *args, **kwargs):
            seen.append((len(args), set(kwargs)))
            kwargs.setdefault("scale", 2)
            return forward(self, *args, **kwargs)

        return wrapper

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        @decorated
        def forward(self, x, y=None, scale=1):
            x = self.fc(x) * scale
            return x if y is None else x + y

    check(Model(), torch.randn(3, 4), kwargs={"y": torch.randn(3, 4)})
    assert set(map(str, seen)) == {str((1, {"y"}))}
    seen.clear()
    check(Model(), torch.randn(3, 4), example=False)
    assert {count for count, _ in seen} == {1}
