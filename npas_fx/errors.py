"""All exceptions of npas_fx; each says what was wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Mapping


class NPASError(Exception):
    """Base of every error that npas_fx raises on purpose."""


class CaptureError(NPASError):
    """The model cannot be captured, or fails on the example; says why, and what to do."""


class BusyError(CaptureError):
    """Another capture is running: in another thread, or the model's own code began this one."""


class GuardError(NPASError, ValueError):
    """A captured module was called in a way that its graph does not cover.

    With an argument that the example did not have, or of a shape for which the model's code would
    go another way.
    """


class BudgetError(NPASError, ValueError):
    """The budget cannot be understood, or is not a positive finite amount."""


class BudgetTypeError(BudgetError, TypeError):
    """The budget is not a number or a string."""


class InfeasibleBudgetError(BudgetError):
    """No plan fits the budget, but one fits a larger one; where none would, it is a ``RuleError``.

    Attributes:
        smallest: the smallest budget that can be met, in parameters (in bytes for a byte budget).
    """

    def __init__(self, message: str, *, smallest: int) -> None:
        super().__init__(message)
        self.smallest = smallest

    def __reduce__(self) -> tuple[object, ...]:
        # An exception is pickled by its positional arguments; a worker process may raise this one.
        return _infeasible, (str(self), self.smallest)


def _infeasible(message: str, smallest: int) -> InfeasibleBudgetError:
    return InfeasibleBudgetError(message, smallest=smallest)


class RuleError(NPASError, ValueError):
    """A user's rule matches nothing, does not fit the model, or contradicts another.

    Also when only planning shows that no plan keeps all rules, whatever the budget.
    """


class PlanError(NPASError, ValueError):
    """A plan is malformed, contradicts itself, or does not fit the model it is applied to."""


class RewriteError(NPASError):
    """A pass met a graph that it cannot rewrite."""


class UntraceableError(CaptureError):
    """Parts of a model cannot be traced; capture makes calls of them and goes on.

    Attributes:
        reasons: path of each part, the root as ``""`` -> why.
    """

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"{path!r}: {why}" for path, why in reasons.items()))
        self.reasons = dict(reasons)


class VerificationError(NPASError):
    """The emitted module does not compute what the original computes with the same weights."""


class CaptureWarning(UserWarning):
    """A graph of the model computed something else, so that its own code is called instead."""


class StorageError(NPASError):
    """A folder cannot be written, or does not hold what ``load`` needs."""


class StorageWarning(UserWarning):
    """``save`` could not write an input of the capture; says what ``load`` has to be given."""


class SolverWarning(UserWarning):
    """A plan comes from another solver than the one that was asked for."""
