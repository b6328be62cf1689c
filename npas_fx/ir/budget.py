"""How much an emitted module may own: a number of trainable parameters, or of their bytes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from numbers import Integral, Real
from typing import Literal

from npas_fx.errors import BudgetError, BudgetTypeError

Resource = Literal["parameters", "bytes"]

_COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_BYTE_UNITS = {
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)},
}
_AMOUNT = re.compile(r"\s*(?P<number>[+-]?[0-9][0-9_]*(?:\.[0-9_]+)?)\s*(?P<unit>%|[a-zA-Z]*)\s*")
_FORMS = 'a share (0.25, 1.5, "25%"), a count (3_500_000, "3.5M", "7B") or bytes ("14MB", "14MiB")'


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A resolved budget; exactly one of the two fields is set.

    Attributes:
        parameters: trainable parameters that the emitted module may own.
        bytes: bytes of its trainable parameters, each at its own dtype.
    """

    parameters: int | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        if (self.parameters is None) == (self.bytes is None):
            raise BudgetError("a Budget has either parameters or bytes, and not both")
        if isinstance(self.amount, bool) or not isinstance(self.amount, int):
            raise BudgetTypeError(f"a budget in {self.resource} is an int, not {self.amount!r}")
        if self.amount < 1:
            raise BudgetError(f"the budget is {self.amount} {self.resource}; it must be at least 1")

    @property
    def resource(self) -> Resource:
        """What is counted: ``"parameters"`` or ``"bytes"``."""
        return "bytes" if self.parameters is None else "parameters"

    @property
    def amount(self) -> int:
        """How much of the resource there is."""
        amount = self.bytes if self.parameters is None else self.parameters
        assert amount is not None
        return amount

    def __str__(self) -> str:
        return f"{self.amount:,} {self.resource}"

    @classmethod
    def parse(cls, value: object, *, model_parameters: int) -> Budget:
        """Resolve what a user may write as a budget.

        Args:
            value: a float is a share of ``model_parameters``, rounded down; an int a number of
                parameters; a string either (``"25%"``, ``"3.5M"``, ``"3_500_000"``, ``"7B"``) or
                bytes (``"14MB"`` is 14·10⁶, ``"14MiB"`` is 14·2²⁰). A ``Budget`` is returned as is.
            model_parameters: trainable parameters of the model, each counted once.

        Raises:
            BudgetError: the amount is not a positive finite number, or the string has no meaning.
            BudgetTypeError: ``value`` is a bool or no number, string or ``Budget``.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, bool):
            raise BudgetTypeError(f"budget={value} is a bool; give {_FORMS}")
        if isinstance(value, str):
            return _parse_text(value, model_parameters)
        if isinstance(value, Integral):
            if value <= 0:
                raise BudgetError(f"budget={value} is not positive; give {_FORMS}")
            return cls(parameters=int(value))
        if isinstance(value, Real):
            share = float(value)
            if not math.isfinite(share):
                raise BudgetError(f"budget={value} is not finite; give {_FORMS}")
            if share <= 0:
                raise BudgetError(f"budget={value} is not positive; give {_FORMS}")
            # A float stands for the decimal that it prints as: 0.29 of 100 is 29, not 28.
            return _share(Decimal(repr(share)), model_parameters, shown=value)
        raise BudgetTypeError(f"budget={value!r} is a {type(value).__name__}; give {_FORMS}")


def _parse_text(text: str, model_parameters: int) -> Budget:
    match = _AMOUNT.fullmatch(text)
    if match is None:
        raise BudgetError(f"budget={text!r} cannot be read; give {_FORMS}")
    number, unit = Decimal(match["number"].replace("_", "")), match["unit"].lower()
    if number <= 0:
        raise BudgetError(f"budget={text!r} is not positive; give {_FORMS}")
    if unit == "%":
        return _share(number / 100, model_parameters, shown=text)
    if unit in _BYTE_UNITS:
        return Budget(bytes=_whole(number * _BYTE_UNITS[unit], text))
    if unit not in _COUNT_UNITS:
        raise BudgetError(f"budget={text!r} has the unknown unit {match['unit']!r}; give {_FORMS}")
    if unit == "" and number != int(number):
        hint = f'; for a share, write {text.strip()} (a float) or "{number * 100:f}%"'
        raise BudgetError(f"budget={text!r} is not a whole number of parameters{hint}")
    return Budget(parameters=_whole(number * _COUNT_UNITS[unit], text))


def _share(share: Decimal, model_parameters: int, *, shown: object) -> Budget:
    if not model_parameters:
        raise BudgetError(
            f"budget={shown!r} is a share of nothing: the model has no trainable parameters; "
            "unfreeze what shall train, or give a number of parameters"
        )
    amount = int(share * model_parameters)
    if amount < 1:
        raise BudgetError(
            f"budget={shown!r} of a model with {model_parameters:,} trainable parameters "
            "is less than one parameter; give a larger share"
        )
    return Budget(parameters=amount)


def _whole(amount: Decimal, text: str) -> int:
    if int(amount) < 1:
        raise BudgetError(f"budget={text!r} is less than one; give {_FORMS}")
    return int(amount)
