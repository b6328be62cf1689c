from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import train_quality
from finished_runs import make_row
from quality.data import FILE_OF
from quality.records import Row, Run, append_row, read_rows
from tiny_tasks import write_text

STUDY = "results"


def list_runs(task: str) -> Iterator[Run]:
    """Eight runs: two methods, two budgets, two seeds."""
    for seed in (0, 1):
        for budget in (0.5, 0.1):
            for method in ("ours", "ssn"):
                yield make_row(method, budget, seed, 0.0, task=task, steps=2).run


def list_other_runs(task: str) -> Iterator[Run]:
    yield make_row("ours", 0.25, 100, 0.0, task=task, study="trials", has_test=False).run


class Trained(list[Run]):
    """Runs in the order in which they were trained; those in ``fail`` cannot be."""

    def __init__(self) -> None:
        super().__init__()
        self.fail: dict[str, Exception] = {}
        self.folders: set[tuple[Path, Path]] = set()

    def execute(
        self, runs: Sequence[Run], data_dir: Path, cache_dir: Path, device: str | None
    ) -> list[Row | Exception]:
        self += runs
        self.folders.add((data_dir, cache_dir))
        return [self._try(run) for run in runs]

    def _try(self, run: Run) -> Row | Exception:
        try:
            if run.method in self.fail:
                raise self.fail[run.method]
        except Exception as err:
            return err
        return make_finished(run)


def make_finished(run: Run) -> Row:
    return Row(run=run, result=make_row("", 0.0, 0, 1.5 + run.seed).result)


def execute_here(runs: Sequence[Run], args: argparse.Namespace) -> Iterator[tuple[Run, Row | str]]:
    """Train in this process, the last run first: workers do not end in the order of the list."""
    for run in reversed(runs):
        (outcome,) = train_quality._try([run], args.data_dir, args.cache_dir, args.device)
        yield run, outcome


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    """Nothing is trained: rows are made up."""
    trained = Trained()
    lists = {STUDY: list_runs, "trials": list_other_runs}
    monkeypatch.setattr(train_quality, "LISTS", lists)
    monkeypatch.setattr(train_quality, "_execute_all", execute_here)
    monkeypatch.setattr(train_quality, "execute", trained.execute)
    return trained


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.csv"


@pytest.fixture
def train(path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Call the script with the words given, and return its exit status."""
    for name in FILE_OF.values():
        (path.parent / name).touch()

    def train(*words: str) -> int:
        folders = ["--data-dir", str(path.parent), "--csv", str(path)]
        monkeypatch.setattr(sys, "argv", ["train_quality.py", *folders, *words])
        with pytest.raises(SystemExit) as ended:
            train_quality.main()
        assert isinstance(ended.value.code, int)
        return ended.value.code

    return train


def runs_of(*tasks: str) -> list[Run]:
    return [run for task in tasks for run in list_runs(task)]


def test_all_runs_of_all_tasks_are_trained_and_written(train, trained: Trained, path: Path) -> None:
    assert train("--cache-dir", "decoded") == 0
    runs = runs_of("characters", "cifar")
    assert sorted(trained, key=str) == sorted(runs, key=str)
    assert {row.run: row for row in read_rows(path)} == {run: make_finished(run) for run in runs}
    assert trained.folders == {(path.parent, Path("decoded"))}


def test_what_is_trained_is_not_trained_again(train, trained: Trained, path: Path) -> None:
    assert train() == 0
    content = path.read_bytes()
    trained.clear()
    assert train() == 0
    assert trained == []
    assert path.read_bytes() == content


def test_interrupted_file_is_continued(train, trained: Trained, path: Path) -> None:
    runs = runs_of("cifar")
    for run in runs[:5]:
        append_row(path, make_finished(run))
    path.write_bytes(path.read_bytes()[:-20])
    assert train("--tasks", "cifar") == 0
    assert sorted(trained, key=str) == sorted(runs[4:], key=str)
    rows = read_rows(path)
    assert [row.run for row in rows[:4]] == runs[:4]
    assert sorted((row.run for row in rows), key=str) == sorted(runs, key=str)


@pytest.mark.parametrize(
    ("words", "is_asked"),
    [
        (["--methods", "ssn"], lambda run: run.method == "ssn"),
        (["--methods", "ssn", "ours"], lambda run: True),
        (["--budgets", "0.1"], lambda run: run.budget == 0.1),
        (["--seeds", "1"], lambda run: run.seed == 1),
        (
            ["--budgets", "0.5", "--seeds", "0", "--methods", "ours"],
            lambda run: (run.budget, run.seed, run.method) == (0.5, 0, "ours"),
        ),
        (["--seeds", "7"], lambda run: False),
    ],
)
def test_runs_are_selected(
    train, trained: Trained, words: list[str], is_asked: Callable[[Run], bool]
) -> None:
    assert train("--tasks", "characters", *words) == 0
    expected = [run for run in runs_of("characters") if is_asked(run)]
    assert sorted(trained, key=str) == sorted(expected, key=str)


def test_most_takes_the_first_that_are_left_and_asked_for(train, trained: Trained) -> None:
    seen = []
    for most in (3, 2):
        assert train("--tasks", "cifar", "--methods", "ours", "--most", str(most)) == 0
        seen.append(set(trained))
        trained.clear()
    ours = [run for run in runs_of("cifar") if run.method == "ours"]
    assert seen == [set(ours[:3]), set(ours[3:])]


def test_lists_are_trained_that_are_named(train, trained: Trained) -> None:
    assert train("--lists", "trials", "--tasks", "characters") == 0
    assert trained == list(list_other_runs("characters"))
    trained.clear()
    assert train("--lists", "trials", STUDY, "--tasks", "characters") == 0
    assert sorted(trained, key=str) == sorted(runs_of("characters"), key=str)


def test_failing_runs_are_reported_and_cost_no_other(
    train, trained: Trained, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # What looks like markup to the console is shown as it is.
    trained.fail["ssn"] = ValueError("no bank in [/data] fits")
    assert train("--tasks", "cifar") == 1
    shown = capsys.readouterr()
    assert [row.run.method for row in read_rows(path)] == ["ours"] * 4
    assert len(trained) == 8
    failed = [run for run in runs_of("cifar") if run.method == "ssn"]
    assert all(f"failed: {run}" in shown.err for run in failed)
    assert shown.err.count("Traceback") == 4
    assert "FAILED: ValueError: no bank in [/data] fits" in " ".join(shown.out.split())


def test_failing_runs_are_tried_again(train, trained: Trained, path: Path) -> None:
    trained.fail["ssn"] = ValueError("no bank fits")
    assert train("--tasks", "cifar") == 1
    trained.fail.clear()
    trained.clear()
    assert train("--tasks", "cifar") == 0
    assert {run.method for run in trained} == {"ssn"}
    assert len(read_rows(path)) == 8


def test_kill_loses_no_finished_run(train, trained: Trained, path: Path, monkeypatch) -> None:
    def execute_some(
        runs: Sequence[Run], args: argparse.Namespace
    ) -> Iterator[tuple[Run, Row | str]]:
        for run in runs[:3]:
            yield run, make_finished(run)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_quality, "_execute_all", execute_some)
    with pytest.raises(KeyboardInterrupt):
        train("--tasks", "cifar")
    assert [row.run for row in read_rows(path)] == runs_of("cifar")[:3]


def test_folder_that_is_not_there_is_said_before_training(
    trained: Trained, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data-dir", str(tmp_path), "--csv", str(tmp_path / "no" / "results.csv")]
    monkeypatch.setattr(sys, "argv", ["train_quality.py", *words])
    with pytest.raises(SystemExit) as ended:
        train_quality.main()
    assert ended.value.code == 2
    assert f"there is no folder {tmp_path / 'no'}" in capsys.readouterr().err
    assert trained == []


def test_data_that_is_not_there_is_said_before_training(
    train, trained: Trained, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path.parent / FILE_OF["cifar"]).unlink()
    assert train() == 2
    message = f"there is no file {FILE_OF['cifar']} in {path.parent}; pass its folder as --data-dir"
    assert message in capsys.readouterr().err
    assert trained == []
    assert train("--tasks", "characters") == 0


def test_file_of_something_else_is_not_written_to(train, trained: Trained, path: Path) -> None:
    path.write_text("name,value\na,1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"results\.csv has the columns \['name', 'value'\]"):
        train()
    assert path.read_text(encoding="utf-8") == "name,value\na,1\n"
    assert trained == []


def test_tasks_are_those_that_can_be_read() -> None:
    for task in train_quality.TASKS:
        for make in train_quality.LISTS.values():
            assert {run.task for run in make(task)} == {task}


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed() -> None:
    # The worker waits for an hour; its parent says which process it is, then both wait.
    code = (
        "import multiprocessing, os, sys, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "import train_quality\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    start = train_quality._start_worker\n"
        "    pool = ProcessPoolExecutor(1, context, initializer=start, initargs=(1,))\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    pool.submit(time.sleep, 3600).result()\n"
    )
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=found, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
        assert wait_for(lambda: not is_running(worker), seconds=30)


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def is_running(process: int) -> bool:
    """Whether it exists and is more than an entry that nobody has read yet."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
def test_workers_train_a_run_and_send_back_what_fails(
    train, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def list_short_runs(task: str) -> Iterator[Run]:
        yield make_row("narrower", 0.01, 0, 0.0, task=task, steps=1, lr=0.001).run
        yield make_row("narrower", 1e-6, 0, 0.0, task=task, steps=1, lr=0.001).run

    write_text(path.parent)
    monkeypatch.setattr(train_quality, "LISTS", {STUDY: list_short_runs})
    assert train("--tasks", "characters", "--workers", "1") == 1
    (row,) = read_rows(path)
    finished, failed = list_short_runs("characters")
    assert row.run == finished
    assert 0 < row.result.valid_loss < 6
    assert row.result.test_loss is not None
    error = capsys.readouterr().err
    assert f"failed: {failed}" in error
    assert "ValueError: no network of depth 8 has" in error
