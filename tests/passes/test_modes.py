"""Constants that differ between the modes read the flag that decides; structure makes a leaf."""

import operator

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import npas_fx
from npas_fx.passes.capture import capture
from npas_fx.passes.skeleton import copy_with
from npas_fx.passes.tracer import Tracer


class Block(nn.Module):
    """Functional dropout under its own flag."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return F.dropout(self.fc(x), 0.5, self.training) + F.dropout1d(x, 0.3, self.training)


class Told(nn.Module):
    """Two dropouts: one under the caller's flag, one under its own."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, is_training):
        return F.dropout(self.fc(F.dropout(x, 0.5, is_training)), 0.5, self.training)


class ToldLater(Told):
    """The same the other way round."""

    def forward(self, x, is_training):
        return F.dropout(self.fc(F.dropout(x, 0.5, self.training)), 0.5, is_training)


class Branch(nn.Module):
    """Another structure in each mode."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.extra = nn.Linear(4, 4)

    def forward(self, x):
        y = self.fc(x)
        if self.training:
            y = y + self.extra(x).relu()
        return y


class Skip(nn.Module):
    """In eval mode its own input, unchanged."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) if self.training else x


class DropPath(nn.Module):
    def forward(self, x):
        if not self.training:
            return x
        return x * (torch.rand(x.shape[0], 1) > 0.5) / 0.5


def run(forward, **children):
    kind = type("Model", (nn.Module,), {"forward": forward})
    model = kind()
    for name, child in children.items():
        model.add_module(name, child)
    return model


def partially(model, emitted, path, same, inputs):
    """Compare with one part in eval mode, then with all but one."""
    for rest in (True, False):
        for module in (model, emitted):
            module.train(rest)
            module.get_submodule(path).train(not rest)
        flags = {name: part.training for name, part in model.named_modules()}
        assert flags == {
            name: part.training
            for name, part in emitted.named_modules()
            if not name.startswith("npas_banks")
        }
        same(emitted, with_flags(model), inputs, modes=(None,))


def with_flags(model):
    return copy_with(model, lambda _, tensor: tensor)


def sites(emitted):
    return {name for bank in emitted.plan.banks for name in bank.sites}


def test_functional_dropout_reads_the_flag_of_its_own_block(check, same):
    blocks = nn.Sequential(Block(), Block(), Block())
    model = run(lambda self, x: F.dropout(self.blocks(x), 0.2, self.training), blocks=blocks)
    emitted = check(model, torch.randn(3, 4))
    for path in ("blocks.0", "blocks.1", "blocks"):
        partially(model, emitted, path, same, (torch.randn(5, 4),))


def test_a_flag_handed_to_a_child_stays_the_flag_of_the_parent(check, same):
    model = run(lambda self, x: self.told(x, self.training), told=Told())
    emitted = check(model, torch.randn(3, 4))
    partially(model, emitted, "told", same, (torch.randn(5, 4),))


def test_a_flag_of_another_module_may_be_read(check, same):
    model = run(
        lambda self, x: F.dropout(self.other(x), 0.5, self.block.training) + self.block(x),
        other=nn.Linear(4, 4),
        block=Block(),
    )
    emitted = check(model, torch.randn(3, 4))
    partially(model, emitted, "block", same, (torch.randn(5, 4),))


def test_a_constant_of_two_flags_makes_a_call(falls_back):
    model = run(
        lambda self, x: F.dropout(self.block(x), 0.5, self.training and self.block.training),
        block=Block(),
    )
    falls_back(model, torch.randn(3, 4), match="training flags of several modules")


@pytest.fixture
def num_traces(monkeypatch):
    """How often models were traced since the fixture was made."""
    traced = []
    trace_once = Tracer.trace_mode

    def count(tracer, root):
        traced.append(root)
        return trace_once(tracer, root)

    monkeypatch.setattr(Tracer, "trace_mode", count)
    return lambda: len(traced)


def test_few_traces_tell_whose_flag_each_of_many_blocks_follows(num_traces, check, same):
    blocks = nn.Sequential(*(Block() for _ in range(12)))
    captured = capture(blocks)
    assert num_traces() <= 4
    assert {str(n.target) for n in captured.graph.nodes if "training" in str(n.target)} == {
        f"{k}.training" for k in range(12)
    }
    emitted = check(blocks, torch.randn(3, 4))
    for path in ("0", "1", "7", "11"):
        partially(blocks, emitted, path, same, (torch.randn(5, 4),))


def test_a_root_that_drops_out_too_costs_no_further_trace(num_traces):
    blocks = nn.Sequential(*(Block() for _ in range(12)))
    model = run(lambda self, x: F.dropout(self.blocks(x), 0.2, self.training), blocks=blocks)
    capture(model)
    assert num_traces() <= 4


def test_flags_handed_down_two_levels(check, same):
    def forward(self, x, is_training):
        return self.told(F.dropout(x, 0.3, self.training), is_training)

    model = run(
        lambda self, x: self.second(self.first(x, self.training), self.training),
        first=run(forward, told=Told()),
        second=run(forward, told=Told()),
    )
    emitted = check(model, torch.randn(3, 4))
    for path in ("first", "first.told", "second", "second.told"):
        partially(model, emitted, path, same, (torch.randn(5, 4),))


def test_the_flag_of_a_sibling_may_be_returned_and_handed_on(check, same):
    class Tells(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return F.dropout(self.fc(x), 0.5, self.training), self.training

    def forward(self, x):
        x, flag = self.tells(x)
        return self.test(self.told(x, flag))

    model = run(forward, tells=Tells(), test=Block(), told=ToldLater())  # in turn 1, 0, 1
    emitted = check(model, torch.randn(3, 4))
    for path in ("tells", "test", "told"):
        partially(model, emitted, path, same, (torch.randn(5, 4),))


def test_the_flag_of_a_sibling_may_be_read_and_handed_on(num_traces, check, same):
    def forward(self, x):
        return self.c(self.b(self.a(x)), self.a.training)

    model = run(forward, a=Block(), b=Block(), c=ToldLater())
    capture(model)
    assert num_traces() <= 6
    emitted = check(model, torch.randn(3, 4))
    for path in "abc":
        partially(model, emitted, path, same, (torch.randn(5, 4),))


def test_a_flag_that_a_finished_call_left_behind_is_found(check, same):
    def leave(self, x):
        self.left = self.training
        return self.fc(x)

    def forward(self, x):
        return F.dropout(self.block(self.leaves(x)), 0.5, self.leaves.left)

    model = run(forward, block=Block(), leaves=run(leave, fc=nn.Linear(4, 4)))
    model.leaves.left = True
    emitted = check(model, torch.randn(3, 4))
    partially(model, emitted, "leaves", same, (torch.randn(5, 4),))


def test_what_train_itself_sets_keeps_the_mode_of_the_innermost_module(check, same):
    class Sets(Block):
        def train(self, mode=True):
            self.rate = 0.5 if mode else 0.1
            return super().train(mode)

        def forward(self, x):
            return F.dropout(self.fc(x), self.rate, True)

    model = run(lambda self, x: self.b(self.a(x)), a=Block(), b=nn.Sequential(Sets(), Block()))
    emitted = check(model, torch.randn(3, 4))
    partially(model, emitted, "b.0", same, (torch.randn(5, 4),))
    check(nn.Sequential(Sets(), Sets()), torch.randn(3, 4))


@pytest.mark.parametrize("combine", [operator.and_, operator.or_, operator.xor], ids=str)
def test_a_constant_of_the_flags_of_parent_and_child_makes_a_call(combine, falls_back):
    class Child(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, flag):
            own = self.training
            return F.dropout(F.dropout(self.fc(x), 0.1, own), 0.5, combine(own, flag))

    model = run(lambda self, x: self.child(x, self.training), child=Child())
    falls_back(model, torch.randn(3, 4), path="child", match="flags of several modules")


def test_probabilities_that_depend_on_the_mode(check, same):
    def forward(self, x):
        scale = 0.1 if self.training else 1.0
        return self.fc(x)[:, slice(0, 2 if self.training else 4)].sum() * scale

    emitted = check(run(forward, fc=nn.Linear(4, 4)), torch.randn(3, 4))
    assert len(sites(emitted)) == 1


def test_a_branching_module_is_a_leaf_and_its_neighbours_are_shared(check):
    body = nn.Sequential(nn.Linear(4, 4), Branch(), nn.Linear(4, 4))
    model = run(lambda self, x: self.body(x), body=body)
    captured = capture(model)
    reason = "code that differs between train and eval mode"
    assert captured.leaves["body.1"] == reason
    weights = {"body.0.weight", "body.2.weight", "body.1.fc.weight", "body.1.extra.weight"}
    assert {site.name for site in captured.inventory.sites} == weights
    check(model, torch.randn(3, 4))


def test_two_branching_modules_at_different_depths(check):
    inner = nn.Sequential(Branch(), nn.Linear(4, 4), Skip())
    model = run(lambda self, x: self.skip(self.inner(x)), inner=inner, skip=Skip())
    captured = capture(model)
    assert captured.leaves.keys() == {"inner.0", "inner.2", "skip"}
    weights = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    assert {site.name for site in captured.inventory.sites} == weights
    check(model, torch.randn(3, 4))


def test_drop_path_is_a_module_call(check, same):
    body = nn.Sequential(nn.Linear(4, 4), DropPath(), nn.Linear(4, 4))
    model = run(lambda self, x: x + self.body(x), body=body)
    emitted = check(model, torch.randn(8, 4))
    assert len(sites(emitted)) == 2
    partially(model, emitted, "body.1", same, (torch.randn(8, 4),))


def test_a_root_that_branches_stays_a_call_as_a_whole(falls_back):
    def forward(self, x):
        return self.fc(x) if self.training else x

    model = run(forward, fc=nn.Linear(4, 4))
    emitted = falls_back(model, torch.randn(3, 4), match="differs between train and eval mode")
    assert sites(emitted) == {"fc.weight"}


def test_norm_frozen_by_an_overridden_train_stays_frozen(check):
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.norm = nn.BatchNorm1d(4)

        def train(self, mode=True):
            super().train(mode)
            self.norm.eval()
            return self

        def forward(self, x):
            return self.norm(self.fc(x))

    model = Frozen()
    emitted = check(model, torch.randn(6, 4))
    assert emitted.train().training
    assert not emitted.norm.training
    assert emitted.norm.num_batches_tracked == 0


def test_flags_at_the_time_of_the_transform_are_kept():
    model = nn.Sequential(Block(), nn.BatchNorm1d(4), Block())
    model[1].eval()
    model[2].eval()
    emitted = npas_fx.transform(model, 1.0, example_inputs=torch.randn(3, 4), solver="greedy")
    flags = {name: part.training for name, part in emitted.named_modules()}
    assert flags[""]
    assert flags["0"]
    assert not flags["1"]
    assert not flags["2"]


def test_batch_norm_by_function(check):
    def forward(self, x):
        return F.batch_norm(
            self.fc(x), self.mean, self.var, None, None, self.training or self.mean is None, 0.3
        )

    model = run(forward, fc=nn.Linear(4, 4))
    model.register_buffer("mean", torch.zeros(4))
    model.register_buffer("var", torch.ones(4))
    check(model, torch.randn(6, 4))


def test_attention_with_functional_dropout(check, same):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)
            self.out = nn.Linear(8, 8)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            y = F.scaled_dot_product_attention(
                q, k, v, dropout_p=0.2 if self.training else 0.0, is_causal=True
            )
            return x + self.out(y)

    model = nn.Sequential(*(Attention() for _ in range(3)))
    emitted = check(model, torch.randn(2, 5, 8), others=((torch.randn(3, 7, 8),),))
    partially(model, emitted, "1", same, (torch.randn(2, 5, 8),))
