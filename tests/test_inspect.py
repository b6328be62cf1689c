"""``inspect`` says what a model is made of, and its text holds all of it."""

from __future__ import annotations

import copy
import re
from collections import Counter
from fnmatch import fnmatchcase

import pytest
import torch
from hypothesis import given
from torch import nn

import npas_fx
from models import MODELS
from oracle import count_trainable, snapshot
from strategies import networks
from zoo import ZOO, large_at_night

EVERY = {**MODELS, **ZOO}


def cells(text: str) -> list[list[str]]:
    """Rows of the tables as a reader sees them: what starts empty goes on from the row above."""
    rows: list[list[str]] = []
    for line in text.splitlines():
        if line.startswith("│"):
            row = [cell.strip() for cell in line.strip("│").split("│")]
            if row[0]:
                rows.append(row)
            else:
                rows[-1] = [f"{a} {b}".strip() for a, b in zip(rows[-1], row, strict=True)]
    return rows


@pytest.mark.parametrize(
    "name", [*MODELS, *(pytest.param(name, marks=pytest.mark.zoo) for name in ZOO)]
)
def test_the_text_accounts_for_every_parameter(name):
    model = EVERY[name].make()
    inventory = npas_fx.inspect(model, example_inputs=EVERY[name].inputs(2))
    text = str(inventory)
    rows = cells(text)
    size = count_trainable(model)
    assert text.startswith(f"{size:,} trainable parameters, {inventory.coverage:.1%} of them in ")
    kinds = ("linear", "conv", "embedding", "recurrent", "raw")
    sites = [row for row in rows if len(row) == 6 and row[0] in kinds]
    kept = [row for row in rows if len(row) == 5]
    assert {(row[0], row[1]): int(row[2]) for row in sites} == dict(
        Counter((site.kind, site.role) for site in inventory.sites)
    )
    assert {row[0]: int(row[1]) for row in kept} == dict(
        Counter(item.reason for item in inventory.kept)
    )
    numels = [int(row[-3].replace(",", "")) for row in (*sites, *kept)]
    assert sum(numels) == size
    assert inventory.coverage == pytest.approx(1 - sum(numels[len(sites) :]) / size)
    for repeats in inventory.repeats[:12]:
        assert repeats.signature in text


@pytest.mark.parametrize(
    "name", large_at_night(["vit_tiny_patch16_224", "resnet50", "densenet121"])
)
def test_globs_of_the_text_can_be_used_as_rules(name):
    with torch.device("meta"):
        model = ZOO[name].make()
    inventory = npas_fx.inspect(model)
    roles = {site.name: site.role for site in inventory.sites}
    globs_of = {row[1]: row[5].split() for row in cells(str(inventory)) if row[1] in roles.values()}
    for role, globs in globs_of.items():
        matched = {n for n in inventory.names() for glob in globs if fnmatchcase(n, glob)}
        assert matched == {site for site in roles if roles[site] == role}
    plan = npas_fx.plan(model, 0.9, keep_private=globs_of["residual_writer"], solver="greedy")
    private = {n for bank in plan.banks if bank.generator == "dedicated" for n in bank.sites}
    assert {site for site in roles if roles[site] == "residual_writer"} <= private


@given(spec=networks())
def test_any_model_is_accounted_for(spec):
    model = spec.build()
    inventory = npas_fx.inspect(model)
    listed = [name for item in inventory for name in (item.name, *item.aliases)]
    assert sorted(listed) == sorted(n for n, _ in model.named_parameters(remove_duplicate=False))
    assert 0 <= inventory.coverage <= 1
    text = str(inventory)
    for item in inventory.sites:
        assert item.role in text
    for item in inventory.kept:
        assert all(word in text for word in re.findall(r"\w+", item.reason))


def test_nothing_is_changed():
    model = MODELS["wrn"].make()
    before = snapshot(model)
    npas_fx.inspect(model, example_inputs=MODELS["wrn"].inputs(2))
    assert snapshot(model) == before


def test_on_the_meta_device():
    with torch.device("meta"):
        model = ZOO["resnet50"].make()
    on_meta, real = npas_fx.inspect(model), npas_fx.inspect(ZOO["resnet50"].make())
    assert str(on_meta) == str(real)


def test_arguments_of_the_example_show():
    idx, targets = MODELS["gpt"].inputs(2)
    model = MODELS["gpt"].make()
    assert npas_fx.inspect(
        model, example_kwargs={"idx": idx, "targets": targets}
    ) == npas_fx.inspect(model, example_inputs=(idx, targets))


def test_a_model_without_weights_and_one_without_sites():
    assert "0 trainable parameters, 0.0% of them in 0 sites" in str(npas_fx.inspect(nn.ReLU()))
    norm = npas_fx.inspect(nn.Sequential(nn.LayerNorm(4)))
    assert norm.coverage == 0
    assert "norm (LayerNorm)" in str(norm)


def test_frozen_parameters_are_listed_but_not_counted():
    model = MODELS["mlp"].make()
    model.stem.requires_grad_(False)
    inventory = npas_fx.inspect(model)
    (row,) = [row for row in cells(str(inventory)) if row[0] == "frozen"]
    assert row[1:4] == ["2", f"{12 * 24 + 24:,}", "not counted"]
    assert inventory.num_parameters == count_trainable(model)


def test_an_emitted_module_is_refused():
    shared = npas_fx.transform(MODELS["mlp"].make(), 0.5)
    with pytest.raises(npas_fx.NPASError, match="already transformed"):
        npas_fx.inspect(shared)


def test_what_is_not_traced_is_listed_with_the_line():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    inventory = npas_fx.inspect(nn.Sequential(nn.Linear(2, 2), Branches(), copy.deepcopy(Held())))
    (opaque,) = inventory.opaque  # the other one owns nothing
    assert (opaque.path, opaque.kind, opaque.numel) == ("2", "Held", 6)
    assert re.search(r"branches on a value.*\[.*test_inspect.py:\d+\]", opaque.reason)
    assert "2.fc.weight" in {site.name for site in inventory.sites}
    text = str(inventory)
    (row,) = (row for row in cells(text) if len(row) == 4 and row[0] == "2 (Held)")
    assert row[1:3] == ["6", "50.0%"]


class Held(nn.Module):
    """Has a weight and branches on its input."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else x
