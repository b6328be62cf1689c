"""All architectures of the zoo, as ``library/architecture``; a library is imported when needed."""

from __future__ import annotations

from importlib import import_module

from zoo_case import Case

TABLES = {
    "papers": ("zoo_papers", "PAPERS"),
    "transformers": ("zoo_hugging_face", "HUGGING_FACE"),
    "torchvision": ("zoo_torchvision", "TORCHVISION"),
    "timm": ("zoo_timm", "TIMM"),
}


def cases_of(library: str) -> dict[str, Case]:
    """Name of each architecture of a library -> how to make it."""
    module, table = TABLES[library]
    return getattr(import_module(module), table)


def list_names() -> list[str]:
    """Names of all architectures."""
    return [f"{library}/{name}" for library in TABLES for name in cases_of(library)]


def find(name: str) -> Case:
    """How to make the architecture of this name."""
    library, _, architecture = name.partition("/")
    return cases_of(library)[architecture]
