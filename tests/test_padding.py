"""The padding row of an embedding keeps its value and gets no gradient, whatever is shared."""

import copy

import pytest
import torch
from torch import nn

import npas_fx


class TextClassifier(nn.Module):
    def __init__(self, padding_idx=3):
        super().__init__()
        self.embedding = nn.Embedding(30, 16, padding_idx=padding_idx)
        self.hidden = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, ids):
        return self.head(torch.relu(self.hidden(self.embedding(ids).mean(1))))


IDS = torch.randint(30, (8, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("budget", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("padding_idx", [3, -1])
@pytest.mark.parametrize("value", [0.0, 0.7])
def test_the_padding_row_is_held(budget, padding_idx, value, tmp_path):
    torch.manual_seed(0)
    model = TextClassifier(padding_idx)
    with torch.no_grad():
        model.embedding.weight[padding_idx] = value
    shared = npas_fx.transform(model, budget, example_inputs=IDS)
    optimizer = torch.optim.SGD(shared.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        shared(IDS).square().sum().backward()
        optimizer.step()
    npas_fx.save(shared, tmp_path)
    loaded = npas_fx.load(tmp_path, TextClassifier(padding_idx), example_inputs=IDS)
    for each in (shared, copy.deepcopy(shared), loaded):
        plain = npas_fx.materialize(each)
        assert torch.equal(plain.embedding.weight[padding_idx], torch.full((16,), value))
        assert torch.equal(plain(IDS), shared(IDS))


def test_a_tied_embedding_whose_padding_row_trains_stays_plain():
    class Tied(TextClassifier):
        def forward(self, ids):
            return self.head(
                self.embedding(ids).mean(1) @ self.embedding.weight.T @ torch.ones(30, 16)
            )

    plan = npas_fx.plan(Tied(), 1.0)
    assert plan.kept["embedding.weight"] == "embedding whose padding row something else reads"


@pytest.mark.parametrize(("option", "reason"), [("max_norm", "max_norm"), ("sparse", "sparse")])
def test_a_functional_lookup_that_needs_the_weight_itself_stays_plain(option, reason):
    class Lookup(TextClassifier):
        def forward(self, ids):
            rows = nn.functional.embedding(ids, self.embedding.weight, **{option: True})
            return self.head(rows.mean(1))

    assert reason in npas_fx.plan(Lookup(), 1.0).kept["embedding.weight"]
