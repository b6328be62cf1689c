"""Hypothesis: reproducible and short by default, HYPOTHESIS_PROFILE=nightly for ten times more."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings

# Before torch is imported: the tests' tensors are small, and workers (pytest -n) share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

BENCHMARKS = Path(__file__).parent / "benchmarks"
EXAMPLES = 20
PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)  # explaining takes minutes
QUIET = (HealthCheck.too_slow, HealthCheck.data_too_large)

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=EXAMPLES,
    phases=PHASES,
    suppress_health_check=QUIET,
)
settings.register_profile(
    "nightly",
    deadline=None,
    max_examples=10 * EXAMPLES,
    phases=PHASES,
    suppress_health_check=QUIET,
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what tests the programs in benchmarks/."""
    for item in items:
        if BENCHMARKS in item.path.parents:
            item.add_marker("benchmarks")
