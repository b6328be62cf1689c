"""Constants that differ between the modes read the flag that decides; structure makes a leaf."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import npas_fx
from npas_fx.passes.capture import capture
from npas_fx.passes.modes import mode_patterns
from npas_fx.passes.skeleton import copy_with


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


def test_a_constant_of_two_flags_is_refused(refuses):
    model = run(
        lambda self, x: F.dropout(self.block(x), 0.5, self.training and self.block.training),
        block=Block(),
    )
    refuses(model, torch.randn(3, 4), match="training flags of more than one module")


def test_patterns_name_each_path_and_no_pair_of_paths():
    for count in (1, 2, 3, 5, 8, 9):
        paths = frozenset(f"m{k}" for k in range(count))
        patterns = mode_patterns(paths)
        codes = {path: tuple(pattern[path] for pattern in patterns) for path in paths}
        assert len(set(codes.values())) == count
        pairs = {
            tuple(a and b for a, b in zip(codes[p], codes[q], strict=True))
            for p in paths
            for q in paths
            if p != q
        }
        assert not pairs & set(codes.values())


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
    reason = "its code differs between train and eval mode"
    assert captured.leaves["body.1"] == reason
    kept = {item.name: item.reason for item in captured.inventory.kept}
    assert kept["body.1.fc.weight"] == kept["body.1.extra.bias"] == reason
    assert {site.name for site in captured.inventory.sites} == {"body.0.weight", "body.2.weight"}
    check(model, torch.randn(3, 4))


def test_two_branching_modules_at_different_depths(check):
    inner = nn.Sequential(Branch(), nn.Linear(4, 4), Skip())
    model = run(lambda self, x: self.skip(self.inner(x)), inner=inner, skip=Skip())
    captured = capture(model)
    assert captured.leaves.keys() == {"inner.0", "inner.2", "skip"}
    assert {site.name for site in captured.inventory.sites} == {"inner.1.weight"}
    check(model, torch.randn(3, 4))


def test_drop_path_is_a_module_call(check, same):
    body = nn.Sequential(nn.Linear(4, 4), DropPath(), nn.Linear(4, 4))
    model = run(lambda self, x: x + self.body(x), body=body)
    emitted = check(model, torch.randn(8, 4))
    assert len(sites(emitted)) == 2
    partially(model, emitted, "body.1", same, (torch.randn(8, 4),))


def test_a_root_that_branches_is_refused(refuses):
    def forward(self, x):
        return self.fc(x) if self.training else x

    refuses(run(forward, fc=nn.Linear(4, 4)), torch.randn(3, 4), match="another way")


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
