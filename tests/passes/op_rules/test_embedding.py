"""A lowered embedding computes what its module computes; what changes its weight stays a call."""

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

import npas_fx
from npas_fx.passes.lower import lower


@pytest.mark.parametrize(
    "settings", [{}, {"scale_grad_by_freq": True}, {"padding_idx": 4}, {"padding_idx": -1}], ids=str
)
def test_embedding_is_bit_equal_with_its_gradient(settings):
    model = nn.Sequential(nn.Embedding(7, 3, **settings))
    graph, stays = lower(fx.symbolic_trace(model).graph, model)
    assert stays == {}
    ids = torch.tensor([[1, 1, 1], [4, 0, 6]])
    lowered = fx.GraphModule(model, graph)
    assert torch.equal(lowered(ids), model(ids))
    gradients = [torch.autograd.grad(m(ids).sum(), model.parameters())[0] for m in (lowered, model)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_norm": 1.0}, "max_norm"),
        ({"sparse": True}, "sparse gradients"),
    ],
    ids=str,
)
def test_embedding_that_stays_a_call_says_why(settings, reason, check):
    model = nn.Sequential(nn.Embedding(7, 4, **settings), nn.Linear(4, 4))
    _, stays = lower(fx.symbolic_trace(model).graph, model)
    assert reason in stays["0"]
    if "sparse" not in settings:
        check(model, torch.tensor([[1, 1, 1], [4, 0, 6]]))


class Bag(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 4, **settings), nn.Linear(4, 4)

    def forward(self, ids, *further):
        return self.head(self.bag(ids, *further))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"padding_idx": 1}, {"padding_idx": -1}, {"include_last_offset": True}],
    ids=str,
)
def test_bags_of_both_forms_are_as_in_the_module(mode, settings, check):
    model = Bag(mode=mode, **settings)
    rows = torch.tensor([[1, 1, 6], [4, 0, 6]])
    check(model, rows, others=[(rows.repeat(2, 2),)])
    flat, offsets = torch.tensor([1, 1, 6, 4, 0]), torch.tensor([0, 2, 2, 5])
    check(model, flat, offsets, others=[(flat[:4], torch.tensor([0, 1, 3, 4]))])
    assert npas_fx.inspect(model, example_inputs=(flat, offsets)).opaque == ()


def test_weights_of_each_sample_and_gradients_by_frequency_are_kept(check):
    ids = torch.tensor([[1, 1, 6], [4, 0, 6]])
    check(Bag(mode="sum"), ids, None, torch.rand(2, 3), others=[(ids[:1], None, torch.rand(1, 3))])
    check(Bag(mode="sum", scale_grad_by_freq=True), ids)


def test_a_bag_may_be_given_its_arguments_by_name(check):
    class Named(Bag):
        def forward(self, ids, offsets, weights):
            made = self.bag(per_sample_weights=weights, offsets=offsets, input=ids)
            return self.head(made)

    ids, offsets = torch.tensor([1, 1, 6, 4, 0]), torch.tensor([0, 2, 2])
    check(Named(mode="sum"), ids, offsets, torch.rand(5))


def test_bags_are_embeddings_and_hold_their_padding_row():
    model = Bag(mode="sum", padding_idx=-1)
    ids = torch.tensor([[1, 1, 6], [4, 0, 6]])
    site = npas_fx.inspect(model, example_inputs=ids).sites[0]
    assert (site.name, site.kind, site.role, site.held_row) == (
        *("bag.weight", "embedding", "embedding", 6),
    )
    emitted = npas_fx.transform(model, 0.7, example_inputs=ids)
    plain = npas_fx.materialize(emitted)
    assert torch.equal(plain.bag.weight[6], model.bag.weight[6])


@pytest.mark.parametrize(
    ("settings", "reason"), [({"max_norm": 1.0}, "max_norm"), ({"sparse": True}, "sparse")], ids=str
)
def test_bags_that_change_their_weight_or_have_sparse_gradients_stay_plain(settings, reason, check):
    class Raw(Bag):
        def forward(self, ids):
            return self.head(functional.embedding_bag(ids, self.bag.weight, **settings))

    ids = torch.tensor([[1, 1, 6], [4, 0, 6]])
    for model in (Bag(**settings), Raw()):
        kept = {each.name: each.reason for each in npas_fx.inspect(model, example_inputs=ids).kept}
        assert reason in kept["bag.weight"]
    if "sparse" not in settings:
        check(Bag(**settings), ids)
