"""The command line says what there is, runs the demo, and reports failure by its exit code."""

import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import npas_fx
from npas_fx import cli, demo
from npas_fx.demo import Check

runner = CliRunner()


def make_check(folder: Path, *, is_passed: bool) -> Check:
    return Check(
        name="shared",
        folder=folder,
        has_same_predictions=is_passed,
        difference=0.0,
        is_reloaded_equal=True,
    )


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_help_names_the_commands(arguments: list[str]):
    assert "demo" in runner.invoke(cli.app, arguments).output


def test_version_is_that_of_the_package():
    result = runner.invoke(cli.app, ["--version"])
    assert result.exit_code == 0
    assert result.output == f"npas_fx {npas_fx.__version__}\n"


def test_demo_hands_its_options_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[Path, dict[str, Any]]] = []

    def run_demo(folder: Path, **options: Any) -> tuple[tuple[()], tuple[Check, ...]]:
        calls.append((folder, options))
        return (), (make_check(folder, is_passed=True),)

    monkeypatch.setattr(demo, "run_demo", run_demo)
    arguments = ["demo", "--folder", str(tmp_path), "--steps", "7", "--seed", "3"]
    assert runner.invoke(cli.app, arguments).exit_code == 0
    assert calls == [(tmp_path, {"steps": 7, "seed": 3})]


def test_demo_fails_when_a_check_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    failed = make_check(tmp_path, is_passed=False)
    monkeypatch.setattr(demo, "run_demo", lambda *_, **__: ((), (failed,)))
    assert runner.invoke(cli.app, ["demo"]).exit_code == 1


def test_demo_without_scikit_learn_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("sklearn", "sklearn.datasets", "sklearn.model_selection"):
        monkeypatch.setitem(sys.modules, name, None)
    result = runner.invoke(cli.app, ["demo", "--folder", str(tmp_path)])
    assert result.exit_code == 1
    (line,) = result.output.splitlines()
    assert 'pip install -c constraints.txt -e ".[demo]"' in line


def test_demo_lets_other_missing_modules_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def run_demo(*_: Any, **__: Any) -> None:
        raise ModuleNotFoundError("no module 'other'", name="other")

    monkeypatch.setattr(demo, "run_demo", run_demo)
    result = runner.invoke(cli.app, ["demo", "--folder", str(tmp_path)])
    assert isinstance(result.exception, ModuleNotFoundError)


def test_folder_that_cannot_be_made_is_reported_in_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    result = runner.invoke(cli.app, ["demo", "--folder", str(tmp_path / "file" / "inside")])
    assert result.exit_code == 1
    assert len(result.output.splitlines()) == 1


MODELS = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

def with_inputs():
    return model(), torch.zeros(2, 3)

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.scale = nn.Linear(4, 4)

    def forward(self, x, scale=None):
        return self.fc(x) if scale is None else self.fc(x) * self.scale(scale)

def with_keywords():
    return Scaled(), {"x": torch.zeros(2, 4), "scale": torch.zeros(2, 4)}

def huge():
    return nn.Sequential(*(nn.Linear(100_000, 100_000) for _ in range(100)))

class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.LazyLinear(2)

    def forward(self, x):
        return self.fc(x)

def number():
    return 3

def broken():
    raise OSError("no such checkpoint")

class Names:
    model = staticmethod(model)

made = model()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "some_models").mkdir()
    (tmp_path / "some_models" / "nets.py").write_text(MODELS, encoding="utf-8")
    (tmp_path / "some_models" / "bad.py").write_text("1 / 0\n", encoding="utf-8")
    return tmp_path


def test_inspect_prints_the_inventory(folder: Path):
    for target in ("model", "with_inputs", "Names.model"):
        result = runner.invoke(cli.app, ["inspect", f"some_models.nets:{target}"])
        assert result.exit_code == 0, result.output
        assert "26 trainable parameters, 76.9% of them in 2 sites" in result.output
        assert "stem" in result.output
        assert "bias" in result.output


def test_inspect_takes_example_inputs(folder: Path):
    one = runner.invoke(cli.app, ["inspect", "some_models.nets:Scaled"])
    assert "not used in forward" in one.output
    other = runner.invoke(cli.app, ["inspect", "some_models.nets:with_keywords"])
    assert other.exit_code == 0, other.output
    assert "not used in forward" not in other.output


def test_inspect_on_the_meta_device_takes_no_memory(folder: Path):
    result = runner.invoke(cli.app, ["inspect", "--meta", "some_models.nets:huge"])
    assert result.exit_code == 0, result.output
    assert "1,000,010,000,000 trainable parameters" in result.output


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("some_models.nets", "package.module:callable"),
        ("some_models.nets:", "package.module:callable"),
        ("no_such_package.nets:model", "no_such_package"),
        ("some_models.bad:model", "ZeroDivisionError"),
        ("some_models.nets:missing", "missing"),
        ("some_models.nets:made", "name a function or class"),
        ("some_models.nets:number", "returned no model, but int"),
        ("some_models.nets:broken", "no such checkpoint"),
        ("some_models.nets:Lazy", "CaptureError"),
    ],
)
def test_inspect_says_what_is_wrong(folder: Path, target: str, message: str):
    result = runner.invoke(cli.app, ["inspect", target])
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
