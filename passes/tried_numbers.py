"""Numbers that torch asks for before it hands a call over to the tracer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from torch import fx

from npas_fx.errors import CaptureError

if TYPE_CHECKING:
    from npas_fx.passes.tracer import Tracer


@dataclass(slots=True, kw_only=True)
class _Tried:
    """What one instruction has asked for, one number behind the other.

    Attributes:
        caller: the code that it is in.
        instruction: where it is there.
        before: last node before it.
        refusal: the first one of the trace before it.
        after: last node behind it; those between are guards.
    """

    caller: FrameType
    instruction: int
    before: fx.Node
    refusal: CaptureError | None
    after: fx.Node


class TriedNumbers:
    """Takes Python numbers of traced values back that turn out not to be wanted.

    A function of torch, called as ``torch.reshape(x, [n, -1])``, asks whether ``n`` is a number,
    forgets the answer or the error, and hands the call over with ``n`` as it was.

    Args:
        tracer: of the trace.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._tried: _Tried | None = None

    def ask(self, caller: FrameType, make: Callable[[], int]) -> int:
        """Make a number.

        Args:
            caller: the code that runs.
            make: gives the number, and may add guards.
        """
        tried, last = self._tried, self._tracer.last_node()
        if tried is None or not self._is_behind(tried, caller):
            tried = self._tried = _Tried(
                caller=caller,
                instruction=caller.f_lasti,
                before=last,
                refusal=self._tracer.first_refusal,
                after=last,
            )
        try:
            return make()
        finally:
            tried.after = self._tracer.last_node()

    def forget(self, caller: FrameType) -> None:
        """Take back the numbers that the instruction which is running has asked for."""
        tried, self._tried = self._tried, None
        if tried is not None and self._is_behind(tried, caller):
            self._tracer.first_refusal = tried.refusal
            self._tracer.erase_behind(tried.before)

    def _is_behind(self, tried: _Tried, caller: FrameType) -> bool:
        """Whether the same instruction is still running, and nothing was traced since."""
        is_same = tried.caller is caller and tried.instruction == caller.f_lasti
        return is_same and tried.after is self._tracer.last_node()
