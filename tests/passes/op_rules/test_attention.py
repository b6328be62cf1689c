"""Multi-head attention as a function: all its settings, forms of inputs and masks."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from npas_fx.passes.capture import capture


class Attends(nn.Module):
    """Attention with a residual, and whatever else it is called with."""

    def __init__(self, options, **call):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options)
        self.call = call
        self.fc = nn.Linear(8, 8)

    def forward(self, query, key, value, **masks):
        y, attended = self.attention(query, key, value, **masks, **self.call)
        return self.fc(y), attended


def sequences(batch_first=False, batch=3):
    query, key = torch.randn(5, batch, 8), torch.randn(4, batch, 8)
    return (query.transpose(0, 1), key.transpose(0, 1)) if batch_first else (query, key)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True, "dropout": 0.3},
        {"bias": False},
        {"add_bias_kv": True, "add_zero_attn": True},
        {"kdim": 6, "vdim": 10},
    ],
    ids=str,
)
def test_settings(check, options):
    query, key = sequences(options.get("batch_first", False))
    value = key
    if "kdim" in options:
        key, value = torch.randn(4, 3, 6), torch.randn(4, 3, 10)
    model = Attends(options)
    check(model, query, key, value)
    captured = capture(model, (query, key, value))
    assert not captured.leaves
    names = {"q_proj_weight", "k_proj_weight", "v_proj_weight"} if "kdim" in options else set()
    wanted = {f"attention.{name}" for name in (names or {"in_proj_weight"})}
    kinds = {site.name: site.kind for site in captured.inventory.sites}
    assert wanted <= kinds.keys()
    assert kinds["attention.out_proj.weight"] == "linear"
    assert {kinds[name] for name in wanted} == {"attention projection"}


@pytest.mark.parametrize("batch_first", [True, False])
def test_inputs_that_are_the_same_and_other_sizes(check, batch_first):
    x = sequences(batch_first)[0]
    wider = sequences(batch_first, batch=7)[0]
    check(Attends({"batch_first": batch_first}), x, x, x, others=((wider, wider, wider),))
    query, key = sequences(batch_first)
    check(Attends({"batch_first": batch_first}), query, key, key)


def test_one_sequence_without_a_batch(check):
    x = torch.randn(5, 8)
    check(Attends({"batch_first": True}), x, x, x)


def test_masks_and_what_is_wanted_of_the_weights(check):
    x = sequences(batch_first=True)[0]
    causal = torch.triu(torch.ones(5, 5, dtype=torch.bool), diagonal=1)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    options = {"batch_first": True}
    check(Attends(options), x, x, x, kwargs={"attn_mask": causal, "key_padding_mask": padding})
    check(Attends(options, average_attn_weights=False), x, x, x)
    model = Attends(options, need_weights=False, is_causal=True)
    emitted = check(model, x, x, x, kwargs={"attn_mask": causal})
    assert emitted(x, x, x, attn_mask=causal)[1] is None


def test_a_call_by_position(check):
    class Positional(Attends):
        def forward(self, x):
            return self.fc(self.attention(x, x, x, None, False)[0])

    x = sequences()[0]
    assert not capture(Positional({}), x).leaves
    check(Positional({}), x)


def test_one_with_hooks_or_parametrizations_is_called(check):
    x = sequences()[0]
    model = Attends({})
    model.attention.register_forward_hook(lambda module, args, output: (output[0] * 2, output[1]))
    assert "attention" in capture(model, (x, x, x)).leaves
    check(model, x, x, x)
    model = Attends({})
    parametrize.register_parametrization(model.attention.out_proj, "weight", nn.Tanh())
    assert capture(model, (x, x, x)).leaves
    check(model, x, x, x, by_copy=True)
