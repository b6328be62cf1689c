"""What a benchmark ran on, for the page with its figures."""

from __future__ import annotations

import platform
from pathlib import Path


def describe_cpu() -> str:
    """Name the architecture, and the model of the processor where Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return f"{platform.machine()} ({named[0]})" if named else platform.machine()
