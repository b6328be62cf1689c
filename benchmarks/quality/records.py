"""Runs and their results: a row of a CSV file each; a kill loses no finished run."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What is trained; two equal runs are the same training.

    Attributes:
        study: the list that it belongs to, such as ``"results"`` or ``"trials"``.
        task: name of a task.
        setting: name of one of the task's settings.
        method: name of a method.
        budget: trainable parameters, as a share of the plain network's.
        seed: of the network, of the batches and of the method's own choices.
        steps: of the optimizer.
        lr: largest learning rate of the schedule.
        weight_decay: of all but biases, norms and coefficients.
        options: of the method, as JSON with sorted keys.
        reads_test: whether the test set is read at the end; for lists whose table is committed.
    """

    study: str
    task: str
    setting: str
    method: str
    budget: float
    seed: int
    steps: int
    lr: float
    weight_decay: float
    options: str = "{}"
    reads_test: bool = False

    @property
    def option(self) -> dict[str, Any]:
        """The options, parsed."""
        parsed: dict[str, Any] = json.loads(self.options)
        return parsed


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came out of a run.

    Attributes:
        parameters: trainable ones, each counted once.
        valid_loss: mean cross entropy on the validation split, in nats.
        valid_accuracy: share of its characters or pictures that are predicted right.
        test_loss: the same on the test set; None where the run does not read it.
        test_accuracy: likewise.
        generation_flops: to make all weights once, a multiplication and an addition counting 2.
        step_time: of a training step, as a multiple of the plain network's, interleaved with it.
        plan: the banks, as ``describe_plan`` writes them; empty where there are none.
        machine: what it ran on, and the version of torch.
        seconds: wall-clock time of the run; other runs may have gone on beside it.
    """

    parameters: int
    valid_loss: float
    valid_accuracy: float
    test_loss: float | None
    test_accuracy: float | None
    generation_flops: int
    step_time: float
    plan: str
    machine: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A finished run."""

    run: Run
    result: Result


def write_options(**options: Any) -> str:
    """Write options as ``Run.options`` wants them."""
    return json.dumps(options, sort_keys=True)


COLUMNS = tuple(each.name for each in (*fields(Run), *fields(Result)))


def read_rows(path: Path) -> list[Row]:
    """Read the finished runs; none where there is no file.

    Raises:
        ValueError: the file has other columns, or a line that is no row.
    """
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames is not None and tuple(reader.fieldnames) != COLUMNS:
            raise ValueError(f"{path} has the columns {reader.fieldnames}, not {list(COLUMNS)}")
        return [_read_row(path, reader.line_num, line) for line in reader]


def append_row(path: Path, row: Row) -> None:
    """Add one line, or with a new file two; it is on disk when this returns."""
    is_new = not path.exists() or path.stat().st_size == 0
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow({**asdict(row.run), **asdict(row.result)})
        file.flush()
        os.fsync(file.fileno())


def mend(path: Path) -> None:
    """Cut off a last line that a kill left unfinished."""
    if path.exists():
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            path.write_bytes(whole)


def unfinished(runs: Iterable[Run], rows: Iterable[Row]) -> list[Run]:
    """Runs that have no row yet, each once, in their order."""
    done = {row.run for row in rows}
    return [run for run in dict.fromkeys(runs) if run not in done]


_PARSERS: Mapping[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": {"True": True, "False": False}.__getitem__,
    "float | None": lambda text: float(text) if text else None,
}


def _read_row(path: Path, number: int, line: Mapping[str, Any]) -> Row:
    try:
        if None in line:  # where DictReader puts what is beyond the last column
            raise ValueError("it has too many cells")
        return Row(run=Run(**_parse(Run, line)), result=Result(**_parse(Result, line)))
    except (KeyError, TypeError, ValueError) as err:
        raise ValueError(f"{path}, line {number} is not a row of results: {err!r}") from err


def _parse(kind: type, line: Mapping[str, Any]) -> dict[str, Any]:
    return {each.name: _PARSERS[str(each.type)](line[each.name]) for each in fields(kind)}
