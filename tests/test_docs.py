"""What README and docs show is what happens: their code runs, their output and links are true."""

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from npas_fx import generators

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
# A block of code, and the block of text behind it, if there is one: what the code prints.
BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?:\s*^```text\n(?P<printed>.*?)^```\n)?", re.M | re.S
)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> Iterator[tuple[int, str, str | None]]:
    """Line, code and expected output of each block of Python."""
    text = page.read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        yield text.count("\n", 0, block.start("code")), block["code"], block["printed"]


def stripped(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


@pytest.fixture(autouse=True)
def _same_generators() -> Iterator[None]:
    before = dict(generators._registered)
    yield
    generators._registered.clear()
    generators._registered.update(before)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page))], ids=name_of)
def test_code_runs_and_prints_what_the_page_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"__name__": "__main__"}
    for line, code, expected in blocks(page):
        # Empty lines in front make tracebacks name the line of the page.
        compiled = compile("\n" * line + code, str(page), "exec", dont_inherit=True)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compiled, scope)
        if expected is not None:
            found = printed.getvalue()
            assert stripped(found) == stripped(expected), f"{name_of(page)}:{line} prints\n{found}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path):
    links = LINK.findall(page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_commands_of_the_readme_are_the_two_that_are_promised():
    commands = re.findall(r"^\d\. `(.*)`$", (ROOT / "README.md").read_text(), re.M)
    assert commands == [
        'pip install -c constraints.txt -e ".[demo]" && npas-fx demo',
        'pip install -c constraints.txt -e ".[test]" && pytest',
    ]
