"""Constants that differ between the modes read the flag that decides; structure has two graphs."""

import copy
import gc
import inspect
import operator
import random
import types
import weakref

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import npas_fx
from npas_fx.passes.capture import capture
from npas_fx.passes.emitted import emission_of
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


def test_a_constant_of_two_flags_has_a_graph_for_each_mixture(check, same):
    model = run(
        lambda self, x: F.dropout(self.block(x), 0.5, self.training and self.block.training),
        block=Block(),
    )
    assert len(capture(model, torch.randn(3, 4)).modes) == 2
    emitted = check(model, torch.randn(3, 4))
    partially(model, emitted, "block", same, (torch.randn(5, 4),))


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
def test_a_constant_of_the_flags_of_parent_and_child(combine, check, same):
    class Child(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, flag):
            own = self.training
            return F.dropout(F.dropout(self.fc(x), 0.1, own), 0.5, combine(own, flag))

    model = run(lambda self, x: self.child(x, self.training), child=Child())
    assert len(capture(model, torch.randn(3, 4)).modes) == 2
    emitted = check(model, torch.randn(3, 4))
    partially(model, emitted, "child", same, (torch.randn(5, 4),))


def test_probabilities_that_depend_on_the_mode(check, same):
    def forward(self, x):
        scale = 0.1 if self.training else 1.0
        return self.fc(x)[:, slice(0, 2 if self.training else 4)].sum() * scale

    emitted = check(run(forward, fc=nn.Linear(4, 4)), torch.randn(3, 4))
    assert len(sites(emitted)) == 1


def test_a_branching_module_has_two_graphs_and_is_no_leaf(check, same):
    body = nn.Sequential(nn.Linear(4, 4), Branch(), nn.Linear(4, 4))
    model = run(lambda self, x: self.body(x), body=body)
    captured = capture(model)
    assert [mode.flags["body.1"] for mode in captured.modes] == [True, False]
    assert not captured.leaves
    weights = {"body.0.weight", "body.2.weight", "body.1.fc.weight", "body.1.extra.weight"}
    assert {site.name for site in captured.inventory.sites} == weights
    assert {site.kind for site in captured.inventory.sites} == {"linear"}
    emitted = check(model, torch.randn(3, 4))
    for path in ("body.1", "body"):
        partially(model, emitted, path, same, (torch.randn(5, 4),))
    assert inspect.signature(emitted.forward) == inspect.signature(model.forward)


def test_two_branching_modules_at_different_depths(check, same):
    inner = nn.Sequential(Branch(), nn.Linear(4, 4), Skip())
    model = run(lambda self, x: self.skip(self.inner(x)), inner=inner, skip=Skip())
    captured = capture(model)
    assert not captured.leaves
    weights = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    assert {site.name for site in captured.inventory.sites} == weights
    emitted = check(model, torch.randn(3, 4))
    for path in ("inner.0", "inner.2", "skip"):
        partially(model, emitted, path, same, (torch.randn(5, 4),))


def test_drop_path_is_a_module_call(check, same):
    body = nn.Sequential(nn.Linear(4, 4), DropPath(), nn.Linear(4, 4))
    model = run(lambda self, x: x + self.body(x), body=body)
    emitted = check(model, torch.randn(8, 4))
    assert len(sites(emitted)) == 2
    partially(model, emitted, "body.1", same, (torch.randn(8, 4),))


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.fc(x).relu() if self.training else self.fc(x).tanh(),
        lambda self, x: self.fc(x) - (x if self.training else 1.0),
        lambda self, x: self.fc(x).sum((0, 1) if self.training else (0,)),
        lambda self, x: torch.cat([self.fc(x)] * (2 if self.training else 3)),
        lambda self, x: self.fc(x)[:, slice(0, 2) if self.training else 0],
        lambda self, x: self.fc(x)[:, 0 if self.training else slice(0, x.shape[1])],
        lambda self, x: {"a" if self.training else "b": self.fc(x)},
        lambda self, x: self.fc(x) + (x if self.training else self.fc(x)),
    ],
    ids=["operation", "value", "dimensions", "list", "index", "slice", "key", "source"],
)
def test_as_many_operations_that_differ(forward, check):
    model = run(forward, fc=nn.Linear(4, 4))
    assert not capture(model, torch.randn(3, 4)).leaves
    check(model, torch.randn(3, 4))


def test_a_root_that_branches_is_traced_twice(check):
    def forward(self, x):
        return self.fc(x) if self.training else x

    model = run(forward, fc=nn.Linear(4, 4))
    emitted = check(model, torch.randn(3, 4))
    assert not capture(model).leaves
    assert sites(emitted) == {"fc.weight"}


class LayerDrop(nn.Module):
    """Leaves out layers by chance, in train mode."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            if not (self.training and random.random() < 0.5):
                x = layer(x)
        return x


def test_what_cannot_be_traced_in_train_mode_is_a_call_in_train_mode_only(check, same):
    model = nn.Sequential(nn.Linear(4, 4), LayerDrop())
    captured = capture(model, torch.randn(3, 4))
    assert [set(mode.leaves) for mode in captured.modes] == [{"1"}, set()]
    (opaque,) = captured.inventory.opaque
    assert opaque.reason.endswith("(in train mode only)")
    assert {site.kind for site in captured.inventory.sites} == {"linear"}
    emitted = check(model, torch.randn(3, 4))
    partially(model, emitted, "1", same, (torch.randn(5, 4),))


def test_a_root_that_cannot_be_traced_in_one_mode(check):
    for model in (LayerDrop(), run(lambda self, x: self.drops(x), drops=LayerDrop())):
        emitted = check(model, torch.randn(3, 4))
        assert len(emission_of(emitted).capture.modes) == 2
    model = run(lambda self, x: self.norm(self.fc(x)), fc=nn.Linear(4, 4), norm=nn.LayerNorm(4))
    model = nn.Sequential(LayerDrop(), model)
    model.forward = types.MethodType(lambda self, x: self[1](LayerDrop.forward(self[0], x)), model)
    reasons = {kept.reason for kept in capture(model, torch.randn(3, 4)).inventory.kept}
    assert reasons == {"bias", "norm (LayerNorm)"}  # the norm is in a call in the other mode
    root = check(LayerDrop(), torch.randn(3, 4))
    assert isinstance(root, LayerDrop)
    npas_fx.materialize(root)
    copy.deepcopy(root)(torch.randn(3, 4))


def test_eval_mode_does_not_keep_what_a_call_in_train_mode_changes():
    """Neither as an attribute nor in a list: such a module is a call in both modes."""

    def count(self, x):
        if self.training:
            random.random()
            self.calls += 1
        return self.fc(x) * self.calls

    def collect(self, x):
        if self.training:
            random.random()
            self.calls.append(1)
        return self.fc(x) * len(self.calls)

    def store(self, x):
        if self.training:
            random.random()
            self.calls[len(self.calls)] = 1
        return self.fc(x) * len(self.calls)

    def rename(self, x):
        calls = self.calls
        if self.training:
            random.random()
            calls.append(1)
        return self.fc(x) * len(calls)

    for forward, start in ((count, 1), (collect, [1]), (store, {0: 1}), (rename, [1])):
        part = run(forward, fc=nn.Linear(4, 4))
        part.calls = start
        model = nn.Sequential(part, nn.Linear(4, 4))
        x = torch.randn(3, 4)
        assert set(capture(model, x).leaves) == {"0"}
        assert set(capture(model).leaves) == {"0"}  # as its code says, for want of an example
        emitted = npas_fx.transform(model, 0.9, example_inputs=x, solver="greedy")
        before = emitted.eval()(x)
        emitted.train()(x)
        assert not torch.allclose(emitted.eval()(x), before)


def test_a_cache_of_what_is_made_of_weights_is_left_out(check):
    """It is empty again in train mode; the emitted module does without."""

    class Caches(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.bias = nn.Linear(4, 4), nn.Parameter(torch.randn(3, 4))
            self.register_buffer("index", torch.tensor([0, 2, 1, 0]), persistent=False)
            self.cache = {}

        def train(self, mode=True):
            self.cache = {}
            return super().train(mode)

        def forward(self, x):
            if self.training:
                return self.fc(x) + self.bias[:, self.index]
            if str(x.device) not in self.cache:
                self.cache[str(x.device)] = self.bias[:, self.index]
            return self.fc(x) + self.cache[str(x.device)]

    model = nn.Sequential(Caches(), Caches())
    captured = capture(model, torch.randn(3, 4))
    assert not captured.leaves
    check(model, torch.randn(3, 4))


def test_a_cache_of_inputs_or_random_numbers_makes_a_call():
    def first(self, x):
        if self.cache is None:
            self.cache = x * 2
        return self.fc(x) + self.cache

    def draw(self, x):
        if self.cache is None:
            self.cache = self.fc.weight * torch.rand(4)
        return self.fc(x) + self.cache[0]

    def drop(self, x):
        if self.cache is None:
            self.cache = F.dropout(self.fc.weight, 0.5, True)
        return self.fc(x) + self.cache[0]

    for forward in (first, draw, drop):
        part = run(forward, fc=nn.Linear(4, 4))
        part.cache = None
        captured = capture(nn.Sequential(part), torch.randn(3, 4))
        assert captured.leaves.keys() == {"0"}


def test_a_mixture_that_cannot_be_traced_says_so():
    def forward(self, x):
        if self.training and not self.fc.training:
            return self.fc(x) * random.random()
        return self.fc(x).relu() if self.training else self.fc(x)

    model = run(forward, fc=nn.Linear(4, 4))
    emitted = npas_fx.transform(model, 1.0, example_inputs=torch.randn(3, 4), solver="greedy")
    emitted.train()(torch.randn(3, 4))
    emitted.fc.eval()
    with pytest.raises(npas_fx.GuardError, match=r"fc is not in the mode of the model.*draws"):
        emitted(torch.randn(3, 4))
    emitted.train()(torch.randn(3, 4))


def test_two_graphs_are_saved_loaded_and_materialized(tmp_path):
    model = run(lambda self, x: self.b(self.a(x)), a=Branch(), b=LayerDrop())
    x = torch.randn(3, 4)
    emitted = npas_fx.transform(model, 0.6, example_inputs=x, solver="greedy").eval()
    npas_fx.save(emitted, tmp_path)
    loaded = npas_fx.load(tmp_path, model, example_inputs=x).eval()
    assert torch.equal(loaded(x), emitted(x))
    torch.testing.assert_close(npas_fx.materialize(emitted).eval()(x), emitted(x))
    loaded.train()(x)


def test_torch_compile_sees_two_graphs():
    model = run(lambda self, x: self.b(self.a(x)), a=Branch(), b=Skip())
    x = torch.randn(3, 4)
    emitted = npas_fx.transform(model, 0.9, example_inputs=x, solver="greedy")
    compiled = torch.compile(emitted, backend="eager", fullgraph=True)
    for mode in (True, False, True):
        torch.testing.assert_close(compiled.train(mode)(x), emitted.train(mode)(x))


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


def test_hooks_that_a_first_call_installs_are_installed_in_each_trace(check):
    """As those with which some libraries collect hidden states."""

    class Collects(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(
                run(lambda self, x: self.fc(x), fc=nn.Linear(4, 4)) for _ in range(2)
            )
            self.is_hooked, self.seen = False, None

        def forward(self, x):
            if not self.is_hooked:
                for layer in self.layers:
                    layer.register_forward_hook(lambda m, args, output: self.seen.append(output))
                self.is_hooked = True
            self.seen = []
            for layer in self.layers:
                x = layer(x)
            seen, self.seen = self.seen, None
            return x, len(seen), seen[-1] if self.training else seen[0].relu()

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = Collects()

        def forward(self, x):
            return self.inside(x)

    emitted = check(Around(), torch.randn(3, 4))
    assert emitted(torch.randn(3, 4))[1] == 2


@pytest.mark.parametrize("kind", [Block, Branch])
def test_neither_the_model_nor_the_example_is_kept_alive(kind):
    model, x = nn.Sequential(kind(), nn.Linear(4, 4)), torch.randn(3, 4)
    emitted = npas_fx.transform(model, 0.8, example_inputs=x, solver="greedy")
    alive = [weakref.ref(model), weakref.ref(model[1].weight), weakref.ref(x)]
    del model, x
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3
    emitted.get_submodule("0").eval()
    emitted(torch.randn(3, 4))
