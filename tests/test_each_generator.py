"""Each generator by itself, from the plan to the plain model."""

import copy

import pytest
import torch
from torch import nn

import npas_fx
from npas_fx.generators import GENERATORS
from npas_fx.rules import apply_rules
from oracle import count_trainable
from pricers import pricer_of

NAMES = [name for name in GENERATORS if name != "dedicated"]


class Mixed(nn.Module):
    """Layers of many kinds, some of equal shapes, with a fused projection."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 24, padding_idx=0)
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.up = nn.ModuleList(nn.Linear(24, 48) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(48, 24) for _ in range(3))
        self.depthwise = nn.Conv1d(24, 24, 5, padding=2, groups=24)
        self.pointwise = nn.Conv1d(24, 24, 1)
        self.back = nn.ConvTranspose1d(24, 24, 3, padding=1)
        self.memory = nn.GRU(24, 24, batch_first=True)
        self.head = nn.Linear(24, 40)
        self.table = nn.Parameter(torch.randn(24, 24) * 0.1)

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(x).relu())
        x = x + self.back(self.pointwise(self.depthwise(x.mT)).relu()).mT
        x = self.memory(x)[0] @ self.table
        return self.head(x)


def tokens():
    return torch.randint(1, 40, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Mixed()


@pytest.mark.parametrize("budget", [0.5, pytest.param(0.8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_it_uses_the_budget_and_computes_what_the_model_did(name, budget, model, tmp_path):
    try:
        shared = npas_fx.transform(model, budget, example_inputs=tokens(), generators=[name])
    except npas_fx.InfeasibleBudgetError as err:
        budget = err.smallest
        shared = npas_fx.transform(model, budget, example_inputs=tokens(), generators=[name])
    plan = npas_fx.plan_of(shared)
    used = {bank.generator for bank in plan.banks}
    assert name in used
    assert used <= {name, "dedicated"}
    assert count_trainable(shared) == plan.parameters == plan.budget.amount
    before = {key: p.detach().clone() for key, p in shared.named_parameters()}
    optimizer = torch.optim.AdamW(npas_fx.param_groups(shared, lr=1e-2, weight_decay=0.1))
    for _ in range(2):
        optimizer.zero_grad()
        shared(tokens()).square().mean().backward()
        optimizer.step()
    for key, parameter in shared.named_parameters():
        assert not torch.equal(parameter, before[key]), key
    npas_fx.save(shared, tmp_path / "saved")
    loaded = npas_fx.load(tmp_path / "saved", Mixed(), example_inputs=tokens())
    plain = npas_fx.materialize(shared)
    assert plain.state_dict().keys() == model.state_dict().keys()
    for module in (shared, loaded, plain):
        module.eval()
    assert torch.equal(loaded(tokens()), shared(tokens()))
    torch.testing.assert_close(plain(tokens()), shared(tokens()))


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("more", [-300, 0, 20, 100, 400, 4000])
def test_a_fused_weight_that_opens_a_bank_uses_the_budget(more):
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    budget = count_trainable(Fused()) + more
    shared = npas_fx.transform(Fused(), budget, example_inputs=x, keep_private="*out_proj*")
    assert count_trainable(shared) == budget


def test_parts_of_one_fused_weight_are_not_tied():
    inventory = npas_fx.inspect(Fused(), example_inputs=torch.randn(2, 5, 16))
    pricer = pricer_of(apply_rules(inventory))
    (joint,) = (k for k, site in enumerate(inventory.sites) if site.num_parts == 3)
    found = {candidate.generator for candidate in pricer.candidates((joint,), spacing=1.0)}
    assert found == {"dedicated", "wavg"}
    both = pricer.options((joint,), 1.0)
    assert not any(option.mixture.templates == option.mixture.parts == 1 for option in both[1:])


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_that_names_it_can_be_written_read_and_applied(name, model):
    try:
        plan = npas_fx.plan(model, 0.7, example_inputs=tokens(), generators=[name])
    except npas_fx.InfeasibleBudgetError as err:
        plan = npas_fx.plan(model, err.smallest, example_inputs=tokens(), generators=[name])
    read = npas_fx.Plan.from_json(plan.to_json())
    assert read == plan
    shared = npas_fx.apply(copy.deepcopy(model), read, example_inputs=tokens())
    assert npas_fx.plan_of(shared) == plan
    bank = next(bank for bank in plan.banks if bank.generator == name)
    pinned = npas_fx.plan(model, 0.9, example_inputs=tokens(), pin=[bank])
    assert bank in pinned.banks
