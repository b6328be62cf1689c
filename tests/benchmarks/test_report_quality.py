from __future__ import annotations

import sys
from pathlib import Path

import pytest

import report_quality
from finished_runs import make_cell
from quality.records import append_row


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with results of two studies."""
    monkeypatch.chdir(tmp_path)
    rows = make_cell("plain", 1.0, [1.0, 1.1]) + make_cell("ours", 0.1, [1.4, 1.5])
    rows += make_cell("ours", 0.1, [1.9, 2.0], study="coefficients", options='{"rate": 5}')
    rows += make_cell("random_plan", 0.1, [1.9, 2.0], study="prices")
    for row in rows:
        append_row(Path("results.csv"), row)
    return tmp_path


def report(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["report_quality.py", *words])
    report_quality.main()


def test_page_has_the_results_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report(monkeypatch, "results.csv")
    page = capsys.readouterr().out
    assert page.splitlines()[2] == "`python benchmarks/report_quality.py results.csv`"
    assert "- a machine, torch 2.13.0: 4 runs" in page
    assert "1.450" in page
    assert "1.950" not in page


def test_page_links_the_pictures_from_where_it_lies(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    pytest.importorskip("matplotlib")
    words = ["--write", "docs/quality.md", "--plot", "docs/pictures"]
    report(monkeypatch, str(folder / "results.csv"), *words)
    page = Path("docs/quality.md").read_text(encoding="utf-8")
    command = f"python benchmarks/report_quality.py results.csv {' '.join(words)}"
    assert f"`{command}`" in page
    assert "](pictures/char-mixer-small.svg)" in page
    assert Path("docs/pictures/char-mixer-small.svg").exists()


def test_command_does_not_tell_where_the_results_lay(
    monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    report(monkeypatch, "../results.csv")
    assert "report_quality.py results.csv`" in capsys.readouterr().out


def test_another_study_is_a_list_of_configurations(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report(monkeypatch, "results.csv", "--study", "coefficients")
    page = capsys.readouterr().out
    assert "report_quality.py results.csv --study coefficients`" in page
    assert '| ours | `{"rate": 5}` | 0.1 | 0 | 1,200 | **1.950 ± 0.635** | 2 |' in page
    assert "1.450" not in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--study", "trials"],
            "no run of study 'trials'; its studies: ['coefficients', 'prices', 'results']",
        ),
        (["--study", "coefficients", "--plot", "x"], "--plot draws the study 'results' only"),
        (["--study", "prices"], "the study of prices needs --data-dir"),
    ],
)
def test_what_cannot_be_reported_is_said(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit):
        report(monkeypatch, "results.csv", *words)
    assert message in capsys.readouterr().err
