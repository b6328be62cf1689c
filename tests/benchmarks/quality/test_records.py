from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finished_runs import make_row
from quality.records import (
    COLUMNS,
    Result,
    Row,
    Run,
    append_row,
    mend,
    read_rows,
    unfinished,
    write_options,
)

texts = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=12)
numbers = st.floats(allow_nan=False)
counts = st.integers(min_value=0)
runs = st.builds(
    Run,
    study=texts,
    task=texts,
    setting=texts,
    method=texts,
    budget=numbers,
    seed=counts,
    steps=counts,
    lr=numbers,
    weight_decay=numbers,
    options=texts,
    reads_test=st.booleans(),
)
results = st.builds(
    Result,
    parameters=counts,
    valid_loss=numbers,
    valid_accuracy=numbers,
    test_loss=st.none() | numbers,
    test_accuracy=st.none() | numbers,
    generation_flops=counts,
    step_time=numbers,
    plan=texts,
    machine=texts,
    seconds=numbers,
)
rows_of_any_kind = st.builds(Row, run=runs, result=results)


def make_rows() -> list[Row]:
    """Rows with all that needs care in a CSV file: commas, quotes, letters of two bytes, None."""
    rows = [
        make_row("ours", 0.25, 0, 1.5, options=write_options(by="role", gain=2.0)),
        make_row("narrower", 0.1, 1, 1 / 3, has_test=False, machine="Überrechner, torch 2"),
        make_row("ssn", 0.5, 2, 2e-7),
    ]
    plan = '[[[0,1],"wavg",2,64,0]]'
    return [replace(row, result=replace(row.result, plan=plan)) for row in rows]


def write_rows(path: Path, rows: list[Row]) -> bytes:
    for row in rows:
        append_row(path, row)
    return path.read_bytes()


@given(st.lists(rows_of_any_kind, max_size=3))
def test_rows_are_read_as_they_were_written(rows: list[Row]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "rows.csv")
        for row in rows:
            append_row(path, row)
        assert read_rows(path) == rows


def test_file_has_one_header(tmp_path: Path) -> None:
    lines = write_rows(tmp_path / "rows.csv", make_rows()).decode().split("\n")
    assert lines[0].split(",") == list(COLUMNS)
    assert len(lines) == 5
    assert lines[-1] == ""


def test_row_is_added_to_an_empty_file_with_a_header(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.touch()
    (row, *_) = make_rows()
    assert read_rows(path) == []
    append_row(path, row)
    assert read_rows(path) == [row]


def test_kill_at_any_byte_costs_the_unfinished_run_alone(tmp_path: Path) -> None:
    path, rows = tmp_path / "rows.csv", make_rows()
    content = write_rows(path, rows)
    ends = [place + k for place, byte in enumerate(content) if byte == ord("\n") for k in (0, 1, 2)]
    for size in {*range(0, len(content), 4), *ends}:
        path.write_bytes(content[:size])
        mend(path)
        num_whole = max(0, content[:size].count(b"\n") - 1)
        assert read_rows(path) == rows[:num_whole]
        left = unfinished([row.run for row in rows], read_rows(path))
        assert left == [row.run for row in rows[num_whole:]]


def test_file_that_was_mended_and_continued_is_the_one_without_a_kill(tmp_path: Path) -> None:
    path, rows = tmp_path / "rows.csv", make_rows()
    content = write_rows(path, rows)
    for size in (0, 5, content.index(b"\n"), content.index(b"\n") + 1, len(content) - 3):
        path.write_bytes(content[:size])
        mend(path)
        assert write_rows(path, rows[len(read_rows(path)) :]) == content


def test_mending_leaves_whole_files_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    mend(path)
    assert not path.exists()
    content = write_rows(path, make_rows())
    mend(path)
    assert path.read_bytes() == content


def test_absent_file_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "rows.csv") == []


@pytest.mark.parametrize("change", [("budget", "share"), ("study,task", "task,study"), (",lr", "")])
def test_other_columns_are_named(tmp_path: Path, change: tuple[str, str]) -> None:
    path = tmp_path / "rows.csv"
    text = write_rows(path, make_rows()).decode()
    header = text.split("\n")[0].replace(*change)
    path.write_text(header + text[text.index("\n") :], encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.csv has the columns") as caught:
        read_rows(path)
    assert str(header.split(",")) in str(caught.value)
    assert str(list(COLUMNS)) in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line.replace("narrower,0.1", "narrower,"),
        lambda line: line.replace("False", "no"),
        lambda line: line[: len(line) // 2],
        lambda line: line.rpartition(",")[0],
        lambda line: line + "," + line,
    ],
    ids=["no number", "no truth value", "half", "one cell less", "two in one"],
)
def test_line_that_is_no_row_is_named(tmp_path: Path, damage) -> None:
    path = tmp_path / "rows.csv"
    lines = write_rows(path, make_rows()).decode().split("\n")
    assert damage(lines[2]) != lines[2]
    lines[2] = damage(lines[2])
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.csv, line 3 is not a row of results"):
        read_rows(path)


@given(st.data())
def test_unfinished_runs_keep_their_order_and_come_once(data: st.DataObject) -> None:
    several = [make_row("ours", 0.5, seed, 1.0) for seed in range(5)]
    asked = data.draw(st.lists(st.sampled_from(several), max_size=12))
    done = data.draw(st.lists(st.sampled_from(several), max_size=4))
    left = unfinished((row.run for row in asked), done)
    assert len(set(left)) == len(left)
    assert set(left) == {row.run for row in asked} - {row.run for row in done}
    first_places = [[row.run for row in asked].index(run) for run in left]
    assert first_places == sorted(first_places)


@pytest.mark.parametrize(
    "change", [{"steps": 7}, {"lr": 0.3}, {"options": '{"by": "role"}'}, {"study": "trials"}]
)
def test_run_with_another_field_is_another_run(change: dict[str, object]) -> None:
    row = make_row("ours", 0.5, 0, 1.0)
    other = replace(row.run, **change)
    assert unfinished([other], [row]) == [other]


def test_options_do_not_depend_on_their_order() -> None:
    run = replace(make_rows()[0].run, options=write_options(gain=2.0, by="role"))
    assert run == make_rows()[0].run
    assert run.option == {"by": "role", "gain": 2.0}
