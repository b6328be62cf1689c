"""Some of each library of the zoo, put through all checks; ``run_zoo.py`` runs all of them."""

import json
import subprocess
import sys

import pytest
import torch

import npas_fx
import run_zoo
from npas_fx.banks import Bank
from zoo_all import find
from zoo_check import check

pytestmark = pytest.mark.zoo

# Name -> the share of its parameters that may be in opaque calls, in train and in eval mode.
SOME = {
    "papers/bi_gru_retriever": (0, 0),
    "papers/gin": (0, 0),
    "papers/tabular_mlp": (0, 0),
    "papers/wrn_16_4": (0, 0),
    "transformers/albert": (0, 0),
    "transformers/bert": (0, 0),
    "transformers/clip": (0, 0),
    "transformers/deberta_v2": (0, 0),
    "transformers/gpt2": (0, 0),
    "transformers/levit": (0, 0),
    "transformers/llama": (0, 0),
    "transformers/mamba": (0, 0),
    "transformers/mixtral": (0, 0),
    "transformers/opt": (0, 0),
    "transformers/perceiver": (0, 0),
    "transformers/swin": (0, 0),
    "transformers/t5": (0, 0),
    "transformers/vit": (0, 0),
    "transformers/wav2vec2": (0.96, 0),
    "torchvision/googlenet": (0, 0),
    "torchvision/shufflenet_v2_x0_5": (0, 0),
    "timm/levit_128s": (0, 0),
    "timm/resnet10t": (0, 0),
    "timm/test_vit": (0, 0),
    "timm/tf_mobilenetv3_small_075": (0, 0),
}


@pytest.mark.parametrize("name", SOME)
def test_all_checks_hold(name):
    row = check(find(name))
    train, evaluate = SOME[name]
    assert row["opaque_train"] <= train
    assert row["opaque_eval"] <= evaluate
    assert row["generated"] > 0.5


def test_a_language_model_of_its_own_class_generates_text(monkeypatch):
    torch.manual_seed(0)
    case = find("transformers/gpt2")
    model = case.make()
    args, kwargs = case.draw(2)
    own = npas_fx.transform(
        model, 0.5, example_inputs=args, example_kwargs=kwargs, emit="module"
    ).eval()
    words = torch.randint(3, 20, (2, 5))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = npas_fx.materialize(own).generate(words, **options)
    seen = []
    run = Bank.forward
    monkeypatch.setattr(Bank, "forward", lambda bank: (seen.append(bank), run(bank))[1])
    assert torch.equal(own.generate(words, **options), expected)
    banks = [part for part in own.modules() if isinstance(part, Bank)]
    assert len(banks) > 1
    assert len(seen) == len(banks)


def test_a_failed_row_is_kept_and_the_next_run_goes_on(tmp_path):
    rows = tmp_path / "zoo.jsonl"
    command = [sys.executable, run_zoo.__file__, "--rows", str(rows)]
    command += ["--only", "papers/gin", "papers/tabular_mlp", "--write", str(tmp_path / "page.md")]
    broken = {"name": "papers/gin", "error": "took more than 5 s"}
    broken |= {"commit": "abc1234", "date": "2026-01-31"}
    rows.write_text(json.dumps(broken) + '\n{"name": "papers/tab')  # and one that was cut short
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["1/1 papers/tabular_mlp: ok"]
    assert run_zoo.read_rows(rows).keys() == {"papers/gin", "papers/tabular_mlp"}
    page = (tmp_path / "page.md").read_text()
    assert "| papers | 2 | 1 | 1, 1 | 0.000, 0.000 |" in page
    assert "| gin | | | | | | abc1234 | fails: took more than 5 s |" in page
    assert f"abc1234 (2026-01-31), {run_zoo.current_commit()} (" in page


def test_what_crashes_or_takes_too_long_has_a_row():
    assert run_zoo.run_apart("papers/gin", 0, 12)["error"] == "took more than 0 s"
    assert "KeyError" in run_zoo.run_apart("papers/nothing", 100, 12)["error"]
