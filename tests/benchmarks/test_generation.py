from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import generation
from generation_cases import banks, turns
from generation_cases.banks import Case, largest_classes, make_model, mixed_cases
from generation_cases.reference import (
    InBanks,
    SiteBySite,
    Window,
    shapes_of,
    windows_of_classes,
    windows_of_reference,
)
from generation_cases.turns import Ratio, compare, take_turns
from npas_fx.examples.wide_resnet import WideResNet
from npas_fx.generators import GENERATORS
from npas_fx.ir import Size

SHAPES = [(3, 2), (4, 3), (2, 2, 3), *[(4, 3)] * 8, (3, 2)]


def test_site_by_site_generates_what_banks_do() -> None:
    ours, theirs = InBanks(SHAPES), SiteBySite(SHAPES, windows_of_classes(SHAPES))
    sizes = {(3, 2): 2, (4, 3): 8, (2, 2, 3): 1}
    assert [len(bank.templates) for bank in ours.banks] == list(sizes.values())
    copy_values(ours, theirs)
    weights, others = ours(), theirs()
    assert [tuple(weight.shape) for weight in weights] == SHAPES
    gradients = [torch.randn(shape) for shape in SHAPES]
    torch.autograd.backward(weights, gradients)
    torch.autograd.backward(others, gradients)
    for weight, other in zip(weights, others, strict=True):
        torch.testing.assert_close(weight, other)
    start = 0
    for bank in ours.banks:
        for template in bank.templates.grad:
            if len(bank.templates) > 1:  # others have no coefficient in the reference
                torch.testing.assert_close(template, theirs.bank.grad[start:][: len(template)])
            start += len(template)


def copy_values(ours: InBanks, theirs: SiteBySite) -> None:
    """Give the flat bank the values of ours."""
    with torch.no_grad():
        rows = {}
        start = 0
        for bank, shape in zip(ours.banks, dict.fromkeys(SHAPES), strict=True):
            bank.offset_sites = ()
            scaled = bank.gain[:, None] * bank.coefficients
            templates = scaled @ bank.templates if len(scaled) == 1 else bank.templates
            theirs.bank[start:][: templates.numel()] = templates.flatten()
            start += templates.numel()
            rows[shape] = iter(scaled)
        for shape, coefficients in zip(SHAPES, theirs.coefficients, strict=True):
            coefficients.copy_(next(rows[shape]))


def test_windows_of_one_length_follow_one_another_until_the_bank_ends() -> None:
    shapes = [(30,), (10,), (10,), (5,)]  # a bank of 55
    assert windows_of_reference(shapes) == [
        Window(0, 1),  # after one of 50, but there is no second one of 30
        Window(0, 5),
        Window(0, 5),
        Window(0, 8),
    ]
    assert windows_of_reference([(1,)] * 10 + [(6,)]) == [
        *(Window(8 * (k % 2), 8) for k in range(10)),
        Window(0, 2),
    ]


def test_windows_of_another_length_start_where_others_end() -> None:
    assert windows_of_reference([(12,), (9,), (2,), (1,)]) == [  # a bank of 24
        Window(0, 2),
        Window(0, 2),  # 18 after 24 would end beyond the bank: everything starts again
        Window(0, 8),
        Window(16, 8),
    ]


@pytest.mark.parametrize(
    ("depth", "width", "unread"), [(28, 2, 0.003), (16, 4, 0.149), (28, 10, 0.193)]
)
def test_as_much_is_never_read_as_of_the_reference(depth: int, width: int, unread: float) -> None:
    """Its code left these shares without any gradient, at 100 % of the parameters."""
    with torch.device("meta"):
        shapes = shapes_of(WideResNet(depth, width, num_classes=100))
    is_read = torch.zeros(sum(map(math.prod, shapes)), dtype=torch.bool)
    for shape, window in zip(shapes, windows_of_reference(shapes), strict=True):
        end = window.start + window.num_templates * math.prod(shape)
        assert end <= len(is_read)
        is_read[window.start : end] = True
    assert 1 - is_read.float().mean().item() == pytest.approx(unread, abs=0.003)


def test_backward_of_a_slice_is_as_large_as_the_bank() -> None:
    theirs = SiteBySite(SHAPES, windows_of_reference(SHAPES))
    first = theirs()[0]
    (gradient,) = torch.autograd.grad(first.sum(), [theirs.bank])
    assert gradient.shape == theirs.bank.shape
    assert gradient.count_nonzero() == first.numel() * theirs.windows[0].num_templates


def test_largest_classes_are_those_of_most_elements() -> None:
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(9, 9), nn.Linear(2, 3)])
    model.extend([nn.Linear(2, 3) for _ in range(9)])
    assert largest_classes(model, 5) == [((3, 2),) * 10, ((4, 4),) * 2]
    assert largest_classes(model, 1) == [((3, 2),) * 10]


def test_real_models_are_known() -> None:
    (largest,) = largest_classes(make_model("wrn_28_10"), 1)
    assert largest == ((640, 640, 3, 3),) * 7


def test_banks_are_of_whole_weights_and_of_tiles_and_large() -> None:
    numel = 640 * 640 * 9
    cases = list(mixed_cases("a", ((640, 640, 3, 3),) * 9))
    assert [case.generator for case in cases] == ["tied", *["wavg"] * 4]
    tied, half, tiles, eight, nine = (case.size for case in cases)
    assert tied == Size(num_templates=1, template_size=numel)
    assert (half.template_size, half.num_templates) in {(numel, 4), (numel, 5)}
    assert tiles.template_size < numel
    assert (eight.num_templates, nine.num_templates) == (8, 9)
    assert [case.is_large for case in cases] == [False, half.num_templates > 4, False, True, True]
    rows = 9 * math.ceil(numel / tiles.template_size)
    assert cases[2].operands == (rows, tiles.num_templates, tiles.template_size)
    assert cases[4].operands == (9, 9, numel)
    assert cases[4].bytes_written == 4 * 9 * numel
    assert cases[4].bytes_owned == 4 * (9 * numel + 81)


def test_others_are_compared_with_as_many_bytes() -> None:
    shapes = ((20, 30),) * 6
    for case in banks.cases_at_half("a", shapes):
        if case.generator not in ("tied", "wavg"):
            rows, templates, numel = case.operands
            assert (rows, numel) == (6, 600)
            assert 4 * templates * numel == pytest.approx(case.bytes_owned, abs=2 * numel)


def test_calls_take_turns() -> None:
    order = []
    clock = iter(range(1000))  # CPU seconds

    def call(name: str) -> Callable[[], None]:
        return lambda: order.append(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns.time, "process_time", lambda: float(next(clock)))
        seconds = take_turns({"a": call("a"), "b": call("b")}, 3)
    assert "".join(order) == "aabb" + "ab" * 3
    assert seconds == {"a": [1.0] * 3, "b": [1.0] * 3}


def test_quick_calls_are_repeated_within_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []  # each takes a millisecond
    monkeypatch.setattr(turns.time, "process_time", lambda: len(calls) / 1024)
    seconds = take_turns({"a": lambda: calls.append(1)}, 2)
    assert seconds == {"a": [1 / 1024] * 2}
    assert len(calls) == 2 + 2 * int(turns.SHORTEST * 1024)


def test_ratio_is_the_median_of_pairs() -> None:
    assert compare([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]) == Ratio(3.0, 2.0, 4.0)
    many = compare([float(k) for k in range(1, 102)], [1.0] * 101)
    assert many.middle == 51
    assert 38 <= many.low <= 42
    assert 60 <= many.high <= 64


@pytest.fixture
def benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Call the script for small models with the words given; return what it prints."""
    monkeypatch.setattr(turns, "SHORTEST", 0.0)
    # They would hold for the tests that follow.
    monkeypatch.setattr(generation, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)

    def benchmark(*words: str) -> str:
        given = ["--models", "wrn_16_1", "--whole", "wrn_10_1", "--repeats", "2", *words]
        monkeypatch.setattr(sys, "argv", ["generation.py", *given])
        generation.main()
        return capsys.readouterr().out

    return benchmark


def read_table(text: str, head: str) -> list[list[str]]:
    """Cells of the rows of the table below a heading."""
    lines = text.partition(f"## {head}")[2].partition("\n## ")[0].splitlines()
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|")
    ][2:]


def test_page_has_all_tables(benchmark: Callable[..., str]) -> None:
    page = benchmark()
    shapes = [((64, 64, 3, 3),) * 3, ((32, 32, 3, 3),) * 3]
    mixed = read_table(page, "Banks that mix templates")
    assert [row[2].split(",")[0] for row in mixed] == ["tied", "wavg", "wavg"] * 2
    assert {row[1] for row in mixed} == {"3 x 64x64x3x3", "3 x 32x32x3x3"}
    assert {row[-1] for row in mixed} <= {"met", "missed"}
    ways = read_table(page, "All weights of wrn_10_1")
    assert [row[0] for row in ways] == ["banks", "site by site", "windows of the reference"]
    assert ways[0][2] == ways[0][4] == "1.00 (1.00 to 1.00)"
    expected = [
        (name, shape)
        for shape in ("3 x 64x64x3x3", "3 x 32x32x3x3")
        for name, generator in GENERATORS.items()
        if any(generator.propose(shapes[0], above=False))
    ]
    at_half = read_table(page, "Every generator at half of all elements")
    assert [(row[2].split(",")[0], row[1]) for row in at_half] == expected
    assert "dedicated" not in dict(expected)
    assert {"tied", "wavg"} < dict(expected).keys()


def test_verdicts_are_those_of_the_targets(
    benchmark: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "MAX_BY_PRODUCT", 1e9)
    monkeypatch.setattr(generation, "MAX_BY_CLONE", 0.0)
    monkeypatch.setattr(generation, "MIN_SPEEDUP", 0.0)
    monkeypatch.setattr(banks, "LARGE_BYTES", 150_000)
    page = benchmark("--classes", "1")
    rows = read_table(page, "Banks that mix templates")
    large = ["wavg, 2 x 36,864", "wavg, 3 x 36,864"]
    assert {row[2]: row[-1] for row in rows} == {
        row[2]: "missed" if row[2] in large else "met" for row in rows
    }
    assert f"met by 0 of {len(large)}." in page
    assert f"met by {len(rows) - len(large)} of {len(rows) - len(large)}." in page
    assert "with backward: met." in page


def test_page_is_written_where_asked(benchmark: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "generation.md"
    shown = benchmark("--classes", "1", "--write", str(path))
    assert path.read_text(encoding="utf-8") == shown
    assert "python benchmarks/generation.py --models wrn_16_1 --whole wrn_10_1" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--write", "no/generation.md"], "there is no folder no"),
        (["--repeats", "0"], "at least one repetition"),
    ],
)
def test_what_cannot_be_run_is_said_first(
    benchmark: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit):
        benchmark(*words)
    assert message in capsys.readouterr().err


def test_operands_make_the_weights_of_a_bank_that_mixes() -> None:
    case = Case(
        model="",
        shapes=((3, 5),) * 4,
        generator="wavg",
        size=Size(num_templates=2, template_size=4),
    )
    rows, middle, columns = case.operands
    bank = banks.make_bank(case)
    assert bank.coefficients.shape == (rows, middle)
    assert bank.templates.shape == (middle, columns)
