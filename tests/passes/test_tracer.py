"""What Python and torch hide from plain symbolic tracing is either right or refused."""

import collections
import dataclasses
import math
import random
import re
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import npas_fx
from npas_fx.passes.capture import capture
from npas_fx.passes.guards import check_guard
from two_layers import net, x


class Named(collections.namedtuple("Named", ["y", "z"])):
    pass


class Output(collections.OrderedDict):
    pass


@dataclasses.dataclass
class Record:
    y: Tensor
    n: int = 3


MODULE_CONSTANT = torch.arange(4.0)


def is_tensor_by_isinstance(self, x):
    return self.run(x) if isinstance(x, Tensor) else x


def is_tensor_by_union(self, x):
    return self.run(x) if isinstance(x, Tensor | list) else x


def is_tensor_by_torch(self, x):
    return self.run(x) if torch.is_tensor(x) else x


def number_of_rows_is_an_int(self, x):
    rows = x.shape[0]
    return self.run(x).reshape((rows, 4) if isinstance(rows, int) else rows)


def shape_is_a_size(self, x):
    return self.run(x) if isinstance(x.shape, torch.Size) and isinstance(x.shape, tuple) else x


def is_no_tuple(self, x):
    y = self.run(x)
    return y[0] if isinstance(y, (tuple, list)) else y


def alias_sees_in_place(self, x):
    y = self.pre(x) + 0
    alias = y
    y += 1
    y *= 2
    return self.b(alias)


def buffer_iadd(self, x):
    self.count += 1
    return self.run(x) * self.count


def buffer_add(self, x):
    self.count.add_(1)
    return self.run(x) * self.count


def buffer_rebound(self, x):
    self.count = self.count + 1
    return self.run(x) * self.count


def buffer_copy(self, x):
    self.count.copy_(x.detach().mean())
    return self.run(x) * self.count


def torch_rand(self, x):
    return self.run(x) + torch.rand(4) + torch.randn_like(x)


def zeros_of_shape(self, x):
    return self.run(x) + torch.zeros(x.shape[0], 4) + torch.arange(4, device=x.device)


def set_items(self, x):
    y = self.pre(x) + 0
    y[0] = 1.0
    y[:, 1] += x[:, 0]
    y[..., -1:] *= 2
    return self.b(y)


def unpacks_shape(self, x):
    rows, columns = x.shape
    return self.run(x).view(rows, columns)


_SOURCE = """
def asserts(self, x):
    assert x.shape[1] == 4
    assert x.dim() == 2, "two dimensions"
    return self.run(x)
"""
exec(compile(_SOURCE, "model.py", "exec"))  # pytest would rewrite assertions of this file
asserts = globals()["asserts"]


def math_of_sizes(self, x):
    return self.run(x) / math.sqrt(x.shape[-1]) + math.sqrt(self.a.weight.shape[0])


def modules_made_in_forward(self, x):
    return nn.Dropout(0.3)(nn.Softmax(dim=1)(self.run(x)))


def tensor_from_numbers(self, x):
    return self.run(x) + torch.tensor([1.0, 2, 3, 4])


def module_constant(self, x):
    return self.run(x) + MODULE_CONSTANT


def attribute_constant(self, x):
    return self.run(x) + self.constant * 2 + self.constant.to(x.dtype)


def attribute_changed_in_place(self, x):
    self.constant.add_(1)
    return self.run(x) * self.constant


def write_only_state(self, x):
    self.last = self.pre(x)
    self.constant = self.last  # a tensor before
    return self.b(self.last)


def number_cached_at_first_call(self, x):
    if not hasattr(self, "scale"):
        self.scale = 0.5
    return self.run(x) * self.scale


def device_of_parameters(self, x):
    device = next(self.parameters()).device
    return self.run(x.to(next(self.parameters()).dtype)) + torch.arange(4, device=device)


def norm_of_parameters(self, x):
    return self.run(x) + sum(p.pow(2).sum() for p in self.parameters())


def asks_for_attributes(self, x):
    y = self.run(x)
    y = y if hasattr(y, "shape") else y * 3
    return y.logits if hasattr(y, "logits") else y * 2


def output_named_tuple(self, x):
    y = self.run(x)
    return Named(y, [x, {"k": (y, 1, None)}])


def output_ordered_dict(self, x):
    return collections.OrderedDict(z=self.run(x), y=x)


def output_own_dict(self, x):
    return Output(y=self.run(x), n={"inner": Output(x=x)})


def output_dataclass(self, x):
    return [Record(self.run(x)), Record(x, n=4)]


def inlined_checkpoint(self, x):
    return self.b(checkpoint(self.pre, x, use_reentrant=False))


def list_of_parameters(self, x):
    return self.b(F.linear(self.run(x), self.hidden[0]))


def output_size(self, x):
    return self.run(x).reshape(torch.Size([-1, 2])), self.a.weight.shape, x.shape


def infinities(self, x):
    y = self.run(x)
    return (
        y.masked_fill(x > 0, float("-inf")).softmax(-1).nan_to_num(nan=0.0) + y[..., None, :].sum()
    )


RIGHT = [
    *(is_tensor_by_isinstance, is_tensor_by_union, is_tensor_by_torch, number_of_rows_is_an_int),
    *(shape_is_a_size, is_no_tuple, alias_sees_in_place, buffer_iadd, buffer_add, buffer_copy),
    buffer_rebound,
    *(torch_rand, zeros_of_shape, set_items, unpacks_shape, asserts, math_of_sizes),
    *(modules_made_in_forward, tensor_from_numbers, module_constant, attribute_constant),
    *(attribute_changed_in_place, write_only_state, number_cached_at_first_call),
    *(device_of_parameters, norm_of_parameters, asks_for_attributes, output_named_tuple),
    *(output_ordered_dict, output_own_dict, output_dataclass, output_size, infinities),
]


@pytest.mark.parametrize("forward", RIGHT, ids=lambda f: f.__name__)
def test_is_right(forward, check):
    assert "" not in capture(net(forward, constant=torch.ones(4)), x()).leaves
    check(net(forward, constant=torch.ones(4)), x(), others=((torch.randn(5, 4),),))


@pytest.mark.parametrize("forward", [inlined_checkpoint, list_of_parameters])
def test_is_right_where_functional_call_is_not(forward, check):
    model = net(forward)
    model.hidden = [model.a.weight]
    check(model, x(), by_copy=True)


def test_a_parameter_is_a_parameter(check):
    def forward(self, x):
        return self.run(x) * (2 if isinstance(self.a.weight, nn.Parameter) else 3)

    model = net(forward)
    emitted = npas_fx.transform(model, 1.0, example_inputs=x(), solver="greedy")
    value = x()
    assert torch.equal(emitted(value), model(value))


def set_grad_enabled(self, x):
    torch.set_grad_enabled(False)
    return self.run(x)


def branches(self, x):
    return self.run(x) if x.sum() > 0 else x


def branches_on_shape(self, x):
    return self.run(x) if x.shape[0] > 2 else x


def swallows_the_refusal(self, x):
    try:
        if x.sum() > 0:
            x = x + 1
    except Exception:
        x = x * 1
    return self.run(x)


def swallows_a_number(self, x):
    try:
        scale = float(x.sum())
    except Exception:
        scale = 1.0
    return self.run(x) * scale


def loops(self, x):
    return sum(row for row in self.run(x))


def loops_over_a_size(self, x):
    y = self.run(x)
    for k in range(x.shape[1]):
        y = y + k
    return y


def nothing_in_a_tuple(self, x):
    y, nothing = self.attention(x, x, x, need_weights=False)
    return self.run(y) if nothing is None else y


def dtype_in_a_set(self, x):
    return self.run(x) * (2 if x.dtype in {torch.float32} else 1)


def dtype_as_text(self, x):
    return self.run(x) * (2 if str(x.dtype) == "torch.float32" else 1)


def type_of_an_unknown(self, x):
    y = self.run(x).max(dim=1)
    return y[0] if isinstance(y, tuple) else y


def type_of_a_recurrent_output(self, x):
    y = self.recurrent(self.run(x)[None])
    return y[0] if isinstance(y, tuple) else y


def assigns_data(self, x):
    self.count.data = self.count + 1
    return self.run(x) * self.count


def rebinds_to_another_shape(self, x):
    self.count = self.count + x.sum(1)
    return self.run(x) * self.count.sum()


def rebinds_to_what_depends_on_data(self, x):
    self.count = x[x > 0]
    return self.run(x) * self.count.sum()


def sets_a_buffer_to_none(self, x):
    self.count = None
    return self.run(x)


def deletes_a_buffer(self, x):
    y = self.run(x) * self.count
    del self.count
    return y


def registers_a_buffer(self, x):
    self.register_buffer("other", self.count.clone())
    return self.run(x) * self.other


def python_random(self, x):
    return self.run(x) * random.random()


def numpy_random(self, x):
    return self.run(x) * np.random.rand()


def own_generator(self, x):
    return self.run(x) * (1 if self.generator.random() < 2 else 0)


def seeds(self, x):
    torch.manual_seed(12345)
    return self.run(x) + torch.rand(4)


def unregistered_module(self, x):
    return self.run(self.hidden[0](x))


def weights_made_in_forward(self, x):
    return self.run(nn.Linear(4, 4)(x))


def reads_back(self, x):
    y = self.pre(x)
    if self.previous is not None:
        y = y + self.previous
    self.previous = y
    return self.b(y)


def reads_back_in_train_mode_only(self, x):
    scale = 1.0 if self.previous is None else 2.0
    if self.training:
        self.previous = x
    return self.run(x) * (scale if self.training else 1.0)


def counts(self, x):
    self.calls = self.calls + 1
    return self.run(x) * self.calls


def counts_in_a_dict(self, x):
    self.calls_of["x"] += 1
    return self.run(x) * self.calls_of["x"]


def appends(self, x):
    self.hidden.append(self.pre(x))
    return self.b(self.hidden[-1])


def float_tensor(self, x):
    return self.run(x) + torch.FloatTensor([1, 2, 3, 4])


def computes_with_hidden_parameter(self, x):
    return self.b(self.run(x) @ self.weights[0].t())


def type_as_argument(self, x):
    return self.run(x.type(torch.FloatTensor))


def star(self, x):
    return self.run(torch.cat([*x.chunk(2, 1)], 1))


def torch_generator(self, x):
    return self.run(x) + torch.rand(4, generator=self.torch_generator)


def outputs_a_set(self, x):
    return {self.run(x)}


def branches_on_a_weight(self, x):
    return self.run(x) if self.a.weight.sum() > 0 else x


NOT_TRACED = {
    torch_generator: "hands a Generator to a traced operation",
    outputs_a_set: "hands a set to a traced operation",
    branches_on_a_weight: "forward branches on a value",
    set_grad_enabled: "switches gradients or autocast",
    branches: r"forward branches on a value .*\[.*test_tracer.py:\d+\]",
    swallows_the_refusal: "forward branches on a value",
    swallows_a_number: "Python number",
    loops: "loops over a value",
    assigns_data: "attribute 'data' of a traced value",
    rebinds_to_another_shape: "parameter or buffer 'count', and its shape or type does not stay",
    rebinds_to_what_depends_on_data: "not known whether its shape and type stay",
    sets_a_buffer_to_none: "deletes the parameter or buffer 'count'",
    deletes_a_buffer: "deletes the parameter or buffer 'count'",
    registers_a_buffer: "adds, replaces or deletes the parameter or buffer 'other'",
    python_random: "random numbers in Python",
    numpy_random: "random numbers in Python",
    own_generator: "own attribute 'generator' at each call",
    seeds: "random numbers",
    unregistered_module: "a Linear with weights is called but is no submodule",
    weights_made_in_forward: "makes a parameter, or a module with weights",
    reads_back: "an earlier call left on the module",
    reads_back_in_train_mode_only: "what an earlier call left on it",
    counts: "changes its own attribute 'calls'",
    counts_in_a_dict: "changes its own attribute 'calls_of'",
    appends: "changes its own attribute 'hidden'",
    float_tensor: "makes a tensor while it runs",
    computes_with_hidden_parameter: "makes a tensor while it runs",
    type_as_argument: "hands a tensortype to a traced operation",
}


# What an example answers, and the reason why these are called without one.
ANSWERED = {
    branches_on_shape: "forward branches on a value",
    loops_over_a_size: "Python number",
    dtype_in_a_set: "a traced dtype up in a set",
    dtype_as_text: "the text of a traced dtype",
    type_of_an_unknown: "type of a value that is not known",
    type_of_a_recurrent_output: "type of a value that is not known",
    star: "unpacks it with a star",
    nothing_in_a_tuple: None,
}


@pytest.mark.parametrize("forward", ANSWERED, ids=lambda f: f.__name__)
def test_an_example_answers_what_the_code_asks(forward, check):
    parts = {"recurrent": nn.LSTM(4, 4), "attention": nn.MultiheadAttention(4, 2)}
    model = net(forward, **parts)
    assert not capture(model, x()).leaves.keys() & {"", "recurrent"}
    check(model, x(), others=((torch.randn(5, 4),),))
    if ANSWERED[forward] is not None:
        assert ANSWERED[forward] in capture(model).leaves[""]
    check(model, x(), example=False)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_another_answer_than_in_the_example_is_an_error_with_the_line(rows):
    def forward(self, x):
        if x.shape[1] % 3 == 1:
            x = x * 2
        return self.run(x[:, :4])

    emitted = npas_fx.transform(net(forward), 1.0, example_inputs=x(rows, 7), solver="greedy")
    for size in ((1, 7), (2, 7), (5, 7), (4, 10)):
        assert emitted(torch.randn(*size)).shape == (size[0], 4)
    words = (
        r"captured for x\.shape\[1\] % 3 == 1 = True, called with False at .*test_tracer.py:\d+; "
        "pass an example that covers it"
    )
    with pytest.raises(npas_fx.GuardError, match=words):
        emitted(torch.randn(3, 8))


def test_what_depends_on_the_number_of_rows_is_not_fixed(falls_back):
    def forward(self, x):
        return self.run(x) * (2 if x.shape[0] == 3 else 1)

    falls_back(net(forward), x(), match="branches on a value", others=((torch.randn(5, 4),),))

    def loops_over_rows(self, x):
        return torch.stack([self.run(row) for row in x])

    falls_back(net(loops_over_rows), x(), match="loops over a value", others=((x(5, 4),),))


def test_the_length_of_a_batch_stays_free(check):
    model = net(lambda self, x: self.run(x).reshape(len(x), -1) / len(x))
    assert "" not in capture(model, x()).leaves
    check(model, x(), others=((torch.randn(5, 4),),))


def test_a_call_that_changes_what_it_is_given_is_called_with_what_reads_it(falls_back):
    class Notes(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, notes):
            notes.append(x.mean())
            return self.fc(x) if x.sum() < 1e9 else x

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.notes = Notes()

        def forward(self, x):
            notes = []
            y = self.notes(x, notes)
            return y + notes[0] if notes else y

    falls_back(nn.Sequential(Reads()), x(), path="0", match="changes a list or dict")


def test_questions_about_weights_need_no_guard(check):
    model = net(
        lambda self, x: (
            self.run(x)
            if self.a.weight.shape[0] > 2 and (self.a.weight * 2).mT.shape[0] == 4
            else x
        )
    )
    graph = capture(model, x()).graph
    assert not [node for node in graph.nodes if node.target is check_guard]
    check(model, x())


def test_a_question_asked_twice_is_checked_once():
    def forward(self, x):
        is_flat = x.dim() == 2
        for _ in range(3):
            x = x + 1 if is_flat else x
        return self.run(x)

    graph = capture(net(forward), x()).graph
    assert sum(node.target is check_guard for node in graph.nodes) == 1


def test_guards_survive_compilation(check):
    def forward(self, x):
        return self.run(x) if x.shape[1] == 4 else self.run(x[:, :4])

    emitted = npas_fx.transform(net(forward), 0.8, example_inputs=x(), solver="greedy")
    compiled = torch.compile(emitted, backend="eager", fullgraph=True)
    value = x(6, 4)
    torch.testing.assert_close(compiled(value), emitted(value))


# What these do differs from call to call.
STATEFUL = (torch_generator, own_generator, reads_back, counts, counts_in_a_dict, appends)


@pytest.mark.parametrize(
    ("forward", "words"), NOT_TRACED.items(), ids=lambda v: getattr(v, "__name__", "")
)
def test_becomes_a_call_with_the_reason(forward, words, falls_back):
    model = net(forward, previous=None, calls=0, calls_of={"x": 0}, generator=random.Random(0))
    model.hidden = [nn.Linear(4, 4)]
    model.weights = [model.a.weight]
    model.recurrent = nn.LSTM(4, 4)
    model.torch_generator = torch.Generator()
    if forward in STATEFUL:
        captured = capture(model, x())
        assert re.search(words, captured.leaves[""])
        emitted = npas_fx.transform(model, 0.5, example_inputs=x(), verify=False)
        original = npas_fx.materialize(emitted, model)
        for k in range(4):
            value = x()
            assert torch.equal(emitted.train(k < 2)(value), original.train(k < 2)(value))
    else:
        by_copy = forward is computes_with_hidden_parameter  # which functional_call does not see
        falls_back(model, x(), match=words, by_copy=by_copy)
    assert model.hidden[0].weight.is_leaf
    assert len(model.hidden) == 1


def test_a_module_that_draws_from_its_own_numpy_generator_becomes_a_call():
    model = net(lambda self, x: self.run(x) * self.noise.random())
    model.noise = np.random.default_rng(0)
    assert "own attribute 'noise'" in capture(model, x()).leaves[""]


def test_inputs_are_of_the_types_in_the_example(check):
    def forward(self, x, extra=None):
        if isinstance(x, (list, tuple)):
            x = torch.cat([x[0], x[1]])
        if isinstance(extra, dict):
            x = x + extra["y"]
        return self.run(x)

    check(net(forward), [x(), x()], kwargs={"extra": {"y": torch.randn(4)}})
    check(net(forward), x())


def default_for_none(self, batch):
    y, bias = self.fc(batch["x"]), batch["bias"]
    if bias is None:
        y = y * 2
    return nn.functional.linear(y, torch.eye(4), bias)


def first_of_nested(self, batch):
    x = batch["x"]
    if isinstance(x, (list, tuple)):
        x = x[0]
    return self.fc(x)


def shape_of_some(self, batch):
    x = batch["x"]
    return self.fc(x * 2 if hasattr(x, "shape") else x[0])


X, BIAS = torch.ones(2, 4), torch.ones(4)


@pytest.mark.parametrize(
    ("forward", "example", "other", "words"),
    [
        (default_for_none, {"x": X, "bias": None}, {"x": X, "bias": BIAS}, "is None.* = True"),
        (default_for_none, {"x": X, "bias": BIAS}, {"x": X, "bias": None}, "is None.* = False"),
        (first_of_nested, {"x": [X]}, {"x": X}, r"type.* = 'list', called with 'Tensor'"),
        (first_of_nested, {"x": X}, {"x": [X]}, r"type.* = 'Tensor', called with 'list'"),
        (shape_of_some, {"x": [X]}, {"x": X}, r"type.* = 'list', called with 'Tensor'"),
    ],
)
def test_what_an_input_holds_is_of_the_kind_in_the_example(forward, example, other, words):
    def make(model, *examples):
        return npas_fx.transform(
            model, 1.0, example_inputs=(example,), more_examples=[(each,) for each in examples]
        )

    model = net(forward)
    model.fc = nn.Linear(4, 4)
    shared = make(model)
    assert torch.equal(shared(example), model(example))
    with pytest.raises(npas_fx.GuardError, match=words):
        shared(other)
    both = make(model, other)
    assert all(torch.equal(both(each), model(each)) for each in (example, other))


def test_an_attribute_that_only_some_examples_have_is_asked_at_each_call():
    def forward(self, batch):
        y = self.run(batch.x)
        return y * batch.scale if hasattr(batch, "scale") else y

    batch = types.SimpleNamespace(x=x(), scale=3.0)
    other, model = types.SimpleNamespace(x=x()), net(forward)
    with pytest.raises(npas_fx.GuardError, match=r"hasattr\(batch, 'scale'\) = True"):
        npas_fx.transform(model, 1.0, example_inputs=batch)(other)
    both = {"example_inputs": (batch,), "more_examples": [(other,)]}
    (call,) = npas_fx.inspect(model, **both).opaque
    assert "not all objects of its class have" in call.reason
    emitted = npas_fx.transform(model, 1.0, **both)
    plain = npas_fx.materialize(emitted)
    assert torch.equal(emitted(batch), plain(batch))
    assert torch.equal(emitted(other), plain(other))


def test_without_an_example_inputs_are_tensors(check):
    check(net(is_tensor_by_isinstance), x(), example=False)


def test_assertions_hold_in_the_emitted_module():
    emitted = npas_fx.transform(net(asserts), 1.0, example_inputs=x(), solver="greedy")
    with pytest.raises(AssertionError, match=r"code of the model raises, at model\.py:3"):
        emitted(torch.randn(3, 2, 4))


def test_a_lazy_module_is_refused():
    with pytest.raises(npas_fx.CaptureError, match=r"0\.weight is uninitialised"):
        capture(nn.Sequential(nn.LazyLinear(3)))


class Tied(nn.Module):
    """Applies the weight of a module that it is handed, and owns no weight itself."""

    def forward(self, x, module):
        return torch.tanh(x @ module.weight.t()) + module(x)


def test_a_module_that_is_handed_a_module_is_traced(check):
    model = net(lambda self, x: self.tied(self.run(x), self.a), tied=Tied())
    captured = capture(model, x())
    assert not captured.leaves.keys() & {"", "tied"}
    (weight,) = (s for s in captured.inventory.sites if s.name == "a.weight")
    assert weight.uses == 3
    check(model, x())


def test_a_called_module_is_handed_no_module(falls_back):
    class Branches(Tied):
        def forward(self, x, module):
            return x if x.sum() > 1e9 else super().forward(x, module)

    class Hands(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.branches = nn.Linear(4, 4), Branches()

        def forward(self, x):
            return self.branches(x, self.fc)

    model = nn.Sequential(nn.Linear(4, 4), Hands())
    falls_back(model, x(), path="1", match="hands a module .a Linear.")


class Passes(nn.Module):
    def forward(self, value, factor=None):
        if factor is not None:
            value = value * factor
        return value


@pytest.mark.parametrize("kind", [nn.Identity, Passes])
def test_none_that_passes_through_a_module_is_none(kind, check):
    def forward(self, x):
        y = self.passes(None)
        return self.run(x) if y is None else self.run(x) + 1

    model = net(forward, passes=kind())
    assert not capture(model, x()).leaves.keys() & {""}
    check(model, x())
    assert "may return None" in capture(model).leaves[""]
    assert "" not in capture(net(lambda self, x: self.passes(self.run(x)), passes=kind())).leaves


class Gate(nn.Module):
    """Branches, and leaves a value on itself; or reads one that was left on it."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.mean, self.factor = None, 1.0

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.keep(self.fc(x)) * self.factor

    def keep(self, y):
        self.mean = y.mean()
        return y


def test_what_a_call_leaves_on_its_module_is_read_by_code_that_is_called_too(falls_back):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = Gate()

        def forward(self, x):
            y = self.gate(x)
            return y if self.gate.mean is None else y - self.gate.mean

    model = nn.Sequential(nn.Linear(4, 4), Reads())
    falls_back(model, x(), path="1", match="mean")


def test_what_is_handed_to_a_call_by_an_attribute_is_not_lost(falls_back):
    class Hands(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = Gate()

        def forward(self, x):
            self.gate.factor = x.mean()
            return self.gate(x)

    model = nn.Sequential(nn.Linear(4, 4), Hands())
    falls_back(model, x(), path="1", match="'factor' of a module that is called")


def test_settings_of_a_call_may_be_read(falls_back):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = Gate()

        def forward(self, x):
            return self.gate(x) * self.gate.factor

    falls_back(nn.Sequential(nn.Linear(4, 4), Reads()), x(), path="1.gate", match="branches")


def test_a_failed_call_leaves_no_trace(falls_back):
    class Messy(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.seen, self.last = nn.Linear(4, 4), [], None

        def forward(self, x, notes):
            self.seen.append(self.fc(x))
            self.last = x
            y = self.seen[0] if len(self.seen) == 1 else x
            assert not notes
            if y.sum() > 1e9:
                return x
            self.seen.clear()
            return y

    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.messy, self.fc = Messy(), nn.Linear(4, 4)

        def forward(self, x):
            notes = []
            y = self.messy(self.fc(x), notes)
            return y * (1 if not notes else 100)

    model = nn.Sequential(nn.Linear(4, 4), Calls())
    captured = capture(model, x())
    assert captured.leaves.keys() == {"1.messy"}
    assert model[1].messy.seen == []
    operations = [node.name for node in captured.graph.nodes if node.op == "call_function"]
    assert len(operations) == 4  # linear, linear, the call, times one


def test_limits_of_a_traced_dtype(check):
    def forward(self, value):
        y = self.a(value)
        low = torch.finfo(y.dtype).min
        y = y.masked_fill(y < 0, low / torch.finfo(torch.float32).max)
        return self.b(y).clamp(max=torch.iinfo(value.long().dtype).max)

    assert not capture(net(forward), x()).leaves
    emitted = check(net(forward), x())
    assert emitted.double()(x().double()).min() < torch.finfo(torch.float32).min
    assert torch.finfo(torch.float32).bits == 32


@pytest.mark.parametrize("way", ["no_grad", "data", "by_one", "none"])
def test_weights_that_a_called_module_changes_stay_plain(way, check):
    class Rescales(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.is_done = False

        def forward(self, value):
            if not self.training and not self.is_done:
                if way == "no_grad":
                    with torch.no_grad():
                        self.a.weight.div_(2)
                elif way == "by_one":  # the same values, and yet a tensor that autograd refuses
                    with torch.no_grad():
                        self.a.weight.mul_(1)
                elif way == "data":
                    self.a.weight.data = self.a.weight.data / 2
                self.is_done = True
            return self.b(self.a(value))

    model = nn.Sequential(Rescales(), nn.Linear(4, 4))
    inventory = capture(model, x()).inventory
    reasons = {kept.name: kept.reason for kept in inventory.kept}
    changed = {name for name, reason in reasons.items() if reason == "changed in place"}
    assert changed == ({"0.a.weight"} if way != "none" else set())
    assert not model[0].is_done
    emitted = npas_fx.transform(model, 0.95, example_inputs=x())
    torch.testing.assert_close(emitted.eval()(value := x()), emitted(value))


def test_an_assignment_to_requires_grad_is_recorded(check):
    def forward(self, value):
        start = value * 1
        start.requires_grad = True
        (slope,) = torch.autograd.grad(start.pow(2).sum(), start, create_graph=True)
        return self.run(slope)

    assert not capture(net(forward), x()).leaves
    check(net(forward), x())


class ReadsPacked(nn.Module):
    """Hands a container over whose type checks what it is made of."""

    def __init__(self):
        super().__init__()
        self.reader = nn.GRU(4, 4, batch_first=True)
        self.head = nn.Linear(4, 4)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return self.head(self.reader(packed)[1])


def test_a_packed_sequence_is_handed_to_a_call():
    lengths = torch.tensor([3, 2])
    captured = capture(ReadsPacked(), (torch.randn(2, 3, 4), lengths))
    assert "" not in captured.leaves
    assert "reader.weight_hh_l0" in {site.name for site in captured.inventory.sites}
