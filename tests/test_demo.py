"""The demo compares four networks that are what it says, and checks what it saves."""

import io
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import npas_fx
from npas_fx import demo
from npas_fx.demo import Check, Row
from npas_fx.examples.residual_cnn import ResidualCNN

Outcome = tuple[tuple[Row, ...], tuple[Check, ...], str, Path]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("demo") / "new"
    state = torch.get_rng_state()
    with io.StringIO() as text, pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "TIMED_ROUNDS", 3)
        console = Console(file=text, width=80)
        rows, checks = demo.run_demo(folder, steps=4, seed=0, console=console)
        printed = text.getvalue()
    assert torch.equal(torch.get_rng_state(), state)
    return rows, checks, printed, folder


def test_budgets_are_met_to_the_last_parameter(outcome: Outcome):
    plain, small, large, narrow = outcome[0]
    assert plain.budget is None
    assert small.parameters == small.budget == plain.parameters // 4
    assert large.parameters == large.budget == plain.parameters * 3 // 2
    assert narrow.budget == small.budget


def test_narrower_network_is_the_widest_that_fits(outcome: Outcome):
    *_, narrow = outcome[0]
    assert narrow.budget is not None
    width = demo.find_width(narrow.budget)
    assert demo.count_parameters(ResidualCNN(width)) == narrow.parameters <= narrow.budget
    assert demo.count_parameters(ResidualCNN(width + 1)) > narrow.budget


def test_rows_are_measured(outcome: Outcome):
    rows = outcome[0]
    assert rows[0].step_time == 1
    for row in rows:
        assert 0 <= row.accuracy <= 1
        assert row.step_time > 0


def test_all_that_was_found_out_is_printed(outcome: Outcome):
    rows, checks, printed, _ = outcome
    for row in rows:
        line = next(line for line in printed.splitlines() if line.startswith(f"│ {row.name} "))
        assert f"{row.parameters:,}" in line
        assert f"{row.accuracy:.2%}" in line
        assert f"x {row.step_time:.2f}" in line
    assert str(rows[1].plan) in printed
    for check in checks:
        assert str(check) in printed


def test_saved_networks_materialize_and_load_back(outcome: Outcome):
    rows, checks, _, folder = outcome
    assert [check.name for check in checks] == [row.name for row in rows if row.plan]
    digits = demo.load_digits()
    for check, row in zip(checks, [row for row in rows if row.plan], strict=True):
        assert check.is_passed
        assert check.folder.parent == folder
        shared = npas_fx.load(check.folder, ResidualCNN())
        assert npas_fx.plan_of(shared) == row.plan
        assert demo.measure_accuracy(shared, digits) == row.accuracy
        assert demo.measure_accuracy(npas_fx.materialize(shared), digits) == row.accuracy


def test_failed_check_says_so():
    passed = Check(
        name="shared",
        folder=Path("folder"),
        has_same_predictions=True,
        difference=0.0,
        is_reloaded_equal=True,
    )
    assert passed.is_passed
    for change in (
        {"has_same_predictions": False},
        {"difference": 1e-3},
        {"is_reloaded_equal": False},
    ):
        fields = {name: getattr(passed, name) for name in Check.__slots__}
        failed = Check(**{**fields, **change})
        assert not failed.is_passed
        assert str(failed) != str(passed)


def test_split_is_fixed_and_holds_every_picture_once():
    first, second = demo.load_digits(), demo.load_digits()
    assert torch.equal(first.train_pictures, second.train_pictures)
    assert torch.equal(first.test_labels, second.test_labels)
    assert len(first.train_labels) + len(first.test_labels) == 1797
    assert first.train_pictures.shape[1:] == (1, 8, 8)


def test_training_is_reproducible():
    digits = demo.load_digits()
    twice = []
    for _ in range(2):
        network = demo.make_network(8, seed=3)
        assert sum(1 for _ in demo.train(network, digits, steps=15, seed=3)) == 15
        twice.append(demo.predict(network, digits))
    assert torch.equal(*twice)


def test_timing_leaves_the_networks_as_they_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "TIMED_ROUNDS", 2)
    digits = demo.load_digits()
    network = demo.make_network(8, seed=0).eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert demo.compare_step_times([network, network], digits)[0] == 1
    assert not network.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_without_scikit_learn_nothing_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("sklearn", "sklearn.datasets", "sklearn.model_selection"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match="sklearn"):
        demo.run_demo(tmp_path, steps=10**6, seed=0, console=Console(file=io.StringIO()))
