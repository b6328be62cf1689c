"""What is installed is what lies in the repository, and nothing shadows a public function."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PUBLIC_FUNCTIONS = {
    "adaptive_width",
    "apply",
    "inspect",
    "load",
    "materialize",
    "param_groups",
    "plan",
    "plan_frontier",
    "plan_of",
    "save",
    "search",
    "share",
    "transform",
}


def setuptools_table() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["tool"]["setuptools"]


def source_folders() -> dict[str, str]:
    """Package -> its folder, for each package whose place does not follow from its parent's."""
    return {"npas_fx": "npas_fx", **setuptools_table()["package-dir"]}


def sources() -> Iterator[tuple[str, str]]:
    """All source files as (package, file name). Links are not followed: a clone may lack them."""
    for root_package, folder in source_folders().items():
        for path, _, files in os.walk(ROOT / folder):
            inner = Path(path).relative_to(ROOT / folder).parts
            for file in files:
                if file.endswith(".py"):
                    yield ".".join((root_package, *inner)), file


def test_packages_are_the_folders_with_an_init():
    packages = setuptools_table()["packages"]
    assert len(packages) == len(set(packages))
    assert set(packages) == {package for package, file in sources() if file == "__init__.py"}


def test_every_source_file_lies_in_a_package():
    assert {package for package, _ in sources()} <= set(setuptools_table()["packages"])


def test_links_point_at_the_folders_that_are_installed():
    for package, folder in setuptools_table()["package-dir"].items():
        link = ROOT.joinpath(*package.split("."))
        # Without link support git checks a link out as a file that holds its target.
        target = os.readlink(link) if link.is_symlink() else link.read_text()
        assert target == f"../{folder}"


def test_only_one_name_is_installed_at_the_top():
    assert distribution("npas_fx").read_text("top_level.txt") == "npas_fx\n"


def test_no_module_bears_the_name_of_a_public_function():
    modules = {file.removesuffix(".py") for _, file in sources()}
    packages = {name for package in setuptools_table()["packages"] for name in package.split(".")}
    assert not (modules | packages) & PUBLIC_FUNCTIONS


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The files of the wheel that is built from the source distribution.

    Built from a copy: an egg-info folder or an old build/ would bring deleted files back.
    """
    copy = tmp_path_factory.mktemp("source")
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    for folder in source_folders().values():
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignore)
    command = [sys.executable, "-m", "build", "--no-isolation", str(copy)]
    built = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert built.returncode == 0, built.stdout
    (wheel,) = (copy / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_every_module_and_no_other(wheel_names: set[str]):
    modules = {name for name in wheel_names if name.endswith(".py")}
    assert modules == {f"{package.replace('.', '/')}/{file}" for package, file in sources()}


def test_wheel_says_that_it_is_typed(wheel_names: set[str]):
    assert "npas_fx/py.typed" in wheel_names
