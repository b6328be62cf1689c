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
