"""Opaque calls: the module's own code runs with the weights that are handed in, and keeps none."""

import copy
import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import npas_fx
from npas_fx.passes.capture import capture
from npas_fx.passes.opaque import call_opaque, empty_slots, handed_in


class Branching(nn.Module):
    """Cannot be traced, so that the parts given to it stay in one opaque call."""

    def __init__(self, run, **parts):
        super().__init__()
        self.own = nn.Linear(4, 4)
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.run(self, self.own(x))


class Waits(nn.Linear):
    """Waits inside its call until it may leave."""

    def __init__(self):
        super().__init__(4, 4)
        self.inside, self.leave = threading.Event(), threading.Event()
        self.num_calls = 0

    def forward(self, value):
        self.num_calls += 1
        self.inside.set()
        self.leave.wait(10)
        return super().forward(value)


def body(run, **parts):
    return nn.Sequential(nn.Linear(4, 4), Branching(run, **parts), nn.Linear(4, 4))


def x(*shape):
    return torch.randn(*(shape or (3, 4)))


PARTS = {
    "conv": (lambda self, y: self.conv(y[:, None])[:, 0], {"conv": nn.Conv1d(1, 1, 3, padding=1)}),
    "attention": (
        lambda self, y: self.attention(y, y, y)[0],
        {"attention": nn.MultiheadAttention(4, 2, dropout=0.1)},
    ),
    "lstm": (lambda self, y: self.lstm(y)[0], {"lstm": nn.LSTM(4, 4, 2, dropout=0.2)}),
    "norm": (lambda self, y: self.norm(y), {"norm": nn.BatchNorm1d(4)}),
    "encoder": (
        lambda self, y: self.encoder(y),
        {"encoder": nn.TransformerEncoderLayer(4, 2, 8)},
    ),
    "bag": (
        lambda self, y: self.bag((y > 0).long()) + y,
        {"bag": nn.EmbeddingBag(5, 4, mode="mean")},
    ),
    "cell": (lambda self, y: self.cell(y, y), {"cell": nn.GRUCell(4, 4)}),
    "spectral": (
        lambda self, y: self.linear(y),
        {"linear": nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))},
    ),
    "no_grad": (lambda self, y: y + self.linear(y.detach()), {"linear": nn.Linear(4, 4)}),
}


@pytest.mark.parametrize("name", PARTS)
def test_all_weights_inside_are_sites_and_the_result_is_right(name, falls_back):
    run, parts = PARTS[name]
    model = body(run, **copy.deepcopy(parts))
    emitted = falls_back(model, x(), path="1", match="branches on a value")
    weights = {n for n, p in model.named_parameters() if p.dim() > 1 and max(p.shape) < p.numel()}
    assert weights <= {site.name for site in capture(model, x()).inventory.sites}
    emitted(x()).sum().backward()
    copied = copy.deepcopy(emitted)
    value = x()
    assert torch.equal(copied.eval()(value), emitted.eval()(value))
    assert copied.state_dict().keys() == emitted.state_dict().keys()


def test_no_weight_that_is_generated_stays_in_the_module():
    model = body(lambda self, y: self.lstm(y)[0], lstm=nn.LSTM(4, 4))
    emitted = npas_fx.transform(model, 0.5, example_inputs=x())
    shared = {name for bank in emitted.plan.banks if len(bank.sites) > 1 for name in bank.sites}
    assert "1.lstm.weight_hh_l0" in shared
    emitted(x())
    assert not shared & {name for name, _ in emitted.named_parameters()}
    assert not shared & emitted.state_dict().keys()
    lstm = emitted.get_submodule("1.lstm")
    assert lstm.weight_hh_l0 is None
    assert not any(w is not None and w.dim() > 1 for w in lstm._flat_weights)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_checkpoints_inside_keep_their_results(reentrant, depth, falls_back):
    def run(self, y):
        for _ in range(depth):
            y = checkpoint(self.linear, y, use_reentrant=reentrant).relu()
        return y

    model = body(run, linear=nn.Linear(4, 4))
    if not reentrant:  # the reentrant one does not know torch.autograd.grad
        inputs = x().requires_grad_()
        falls_back(model, inputs, path="1", match="branches on a value", by_copy=True)
    emitted = npas_fx.transform(model, 0.8, example_inputs=x(), verify=False)
    plain = npas_fx.materialize(emitted)
    value = x()
    for module in (emitted, plain):
        (module(value).square().sum() + module(value + 1).sum()).backward()
    for name, parameter in emitted.named_parameters():
        if name.endswith("bias"):
            torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad)


def test_checkpoints_outside_work_as_before():
    linear = nn.Linear(4, 4)
    calls = []
    linear.register_forward_pre_hook(lambda *args: calls.append(1))
    waits = Waits()
    thread = threading.Thread(
        target=call_opaque, args=(waits, ("weight",), (torch.randn(4, 4),), (x(),), {})
    )
    thread.start()
    assert waits.inside.wait(10)
    for reentrant in (False, True):
        calls.clear()
        checkpoint(linear, x().requires_grad_(), use_reentrant=reentrant).sum().backward()
        assert len(calls) == 2  # forward, and again in backward
    waits.leave.set()
    thread.join()
    checkpoint(linear, x().requires_grad_(), use_reentrant=False).sum().backward()
    assert len(calls) == 4


def test_an_error_inside_leaves_everything_as_it_was():
    def fail(self, y):
        raise KeyError("inside")

    module = Branching(fail)
    before = dict(module.own._parameters)
    with pytest.raises(KeyError, match="inside"):
        call_opaque(module, ("own.weight",), (torch.randn(4, 4),), (x(),), {})
    assert module.own._parameters == before
    linear = nn.Linear(4, 4)
    calls = []
    linear.register_forward_pre_hook(lambda *args: calls.append(1))
    checkpoint(linear, x().requires_grad_(), use_reentrant=False).sum().backward()
    assert len(calls) == 2


def test_calls_within_calls():
    inner = nn.Linear(4, 4)
    w, v = torch.randn(4, 4), torch.randn(4, 4)
    module = Branching(lambda self, y: call_opaque(inner, ("weight",), (v,), (y,), {}))
    value = x()
    got = call_opaque(module, ("own.weight",), (w,), (value,), {})
    expected = functional_call(inner, {"weight": v}, value @ w.T + module.own.bias)
    torch.testing.assert_close(got, expected)


def test_what_can_be_handed_in():
    tied = nn.Linear(4, 4)
    module = nn.ModuleDict(
        {
            "tied": tied,
            "again": tied,
            "norm": nn.LayerNorm(4),
            "sparse": nn.Embedding(5, 4, sparse=True),
            "bounded": nn.EmbeddingBag(5, 4, max_norm=1.0),
            "plain": nn.Embedding(5, 4),
        }
    )
    assert handed_in(module) == ["tied.weight", "again.weight", "plain.weight"]


def test_embeddings_that_change_or_hide_their_weight_stay_plain(falls_back):
    model = body(
        lambda self, y: self.bounded((y > 0).long()).sum(1) + self.sparse((y > 0).long()).sum(1),
        bounded=nn.Embedding(5, 4, max_norm=1.0),
        sparse=nn.Embedding(5, 4, sparse=True),
    )
    reasons = {kept.name: kept.reason for kept in capture(model, x()).inventory.kept}
    assert reasons["1.bounded.weight"].startswith("embedding with max_norm")
    assert reasons["1.sparse.weight"] == "embedding with sparse gradients"
    emitted = npas_fx.transform(model, 0.9, example_inputs=x())
    assert emitted.get_submodule("1").bounded.weight.shape == (5, 4)


def test_hooks_inside_and_on_the_call_run(falls_back):
    model = body(lambda self, y: self.linear(y), linear=nn.Linear(4, 4))
    model[1].register_forward_hook(lambda module, args, output: output * 2)
    model[1].linear.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    falls_back(model, x(), path="1", match="branches on a value")


def test_a_weight_is_shared_between_a_call_and_the_graph_around_it(falls_back):
    model = body(lambda self, y: self.linear(y), linear=nn.Linear(4, 4))
    model[1].linear.weight = model[0].weight
    falls_back(model, x(), path="1", match="branches on a value")
    (site,) = (site for site in capture(model, x()).inventory.sites if site.aliases)
    assert (site.name, site.aliases, site.uses) == ("0.weight", ("1.linear.weight",), 2)


def test_a_module_that_holds_another_one_in_a_list_does_not_get_its_weights(falls_back):
    model = body(lambda self, y: self.others[0](y))
    model[1].others = [model[0]]
    falls_back(model, x(), path="1", match="branches on a value", by_copy=True)
    reasons = {kept.name: kept.reason for kept in capture(model, x()).inventory.kept}
    assert reasons["0.weight"].startswith("read behind torch's back")


def test_emptying_and_filling():
    lstm = nn.LSTM(4, 4)
    weights = {name: p.detach().clone() for name, p in lstm.named_parameters()}
    value = x(2, 3, 4)
    expected = lstm(value)[0]
    empty_slots(lstm, ["weight_ih_l0", "weight_hh_l0"])
    assert [name for name, _ in lstm.named_parameters()] == ["bias_ih_l0", "bias_hh_l0"]
    names = ("weight_ih_l0", "weight_hh_l0")
    for moved in (lstm, copy.deepcopy(lstm)):
        got = call_opaque(moved, names, [weights[name] for name in names], (value,), {})[0]
        assert torch.equal(got, expected)
        moved.to(torch.float64)
        copy.deepcopy(moved)


def test_threads_that_call_one_module_do_not_see_each_other_s_weights():
    model = body(lambda self, y: self.linear(y).relu(), linear=nn.Linear(4, 4))
    emitted = npas_fx.transform(model, 0.7, example_inputs=x()).eval()
    values = [x() for _ in range(8)]
    with torch.no_grad():
        expected = [emitted(value) for value in values]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(20):
                got = list(pool.map(emitted, values))
                assert all(map(torch.equal, got, expected))
    assert emitted.get_submodule("1.linear").weight is None


def test_a_thread_waits_for_the_slots_of_the_other():
    waits, value = Waits(), x()
    weights = torch.randn(4, 4), torch.randn(4, 4)
    results = {}

    def run(k):
        results[k] = call_opaque(waits, ("weight",), (weights[k],), (value,), {})

    threads = [threading.Thread(target=run, args=(k,)) for k in (0, 1)]
    threads[0].start()
    assert waits.inside.wait(10)
    threads[1].start()
    threads[1].join(0.2)
    assert waits.num_calls == 1
    waits.leave.set()
    for thread in threads:
        thread.join()
    for k in (0, 1):
        assert torch.equal(results[k], nn.functional.linear(value, weights[k], waits.bias))


def test_what_a_decorated_forward_leaves_behind_is_seen(check):
    """Its own code assigns; that of the decorator does not."""

    def decorated(forward):
        @functools.wraps(forward)
        def wrapper(self, *args, **kwargs):
            return forward(self, *args, **kwargs)

        return wrapper

    class Leaves(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.last = nn.Linear(4, 4), torch.zeros(3, 4)

        @decorated
        def forward(self, x):
            self.last = self.fc(x)
            return self.last if self.last.sum() > 0 else -self.last

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.leaves, self.fc = Leaves(), nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(self.leaves(x)) + self.leaves.last

    check(nn.Sequential(Reads()), torch.randn(3, 4))
