"""Say why a module could not be traced."""

from __future__ import annotations

from traceback import walk_tb

from npas_fx.passes.guards import STEPPED_OVER


def say_why(err: BaseException) -> str:
    """What went wrong, and in which line of the user's code."""
    said = str(err) or type(err).__name__
    line = _source_line(err)
    return f"{said} [{line}]" if line else said


def _source_line(err: BaseException) -> str:
    """Name the last line outside torch and npas_fx that an error passed through."""
    found = ""
    for frame, line in walk_tb(err.__traceback__):
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] not in STEPPED_OVER:
            found = f"{frame.f_code.co_filename}:{line}"
    return found
