"""Branches on data of which one way can only raise: the graph checks, and goes the other way."""

from __future__ import annotations

import builtins
import dis
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, fx

from npas_fx.passes.guards import QUESTIONS

_RAISES = ("RAISE_VARARGS", "RERAISE")
_LEAVES = ("RETURN", "YIELD", "SEND")
_ASKS_MANAGER = "WITH_EXCEPT_START"  # in the handler of a `with`: a jump behind it swallows
_JUMPS = frozenset([*dis.hasjrel, *dis.hasjabs])
# What may stand between conditions that have to hold together: it changes nothing.
_ONLY_READS = (
    *("LOAD_FAST", "LOAD_CONST", "LOAD_SMALL_INT", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF"),
    *("LOAD_ATTR", "COMPARE_OP", "IS_OP", "TO_BOOL", "NOP", "NOT_TAKEN", "CACHE", "EXTENDED_ARG"),
)
# Python itself may catch these around code of a model: in `hasattr`, or in a loop.
_CAUGHT_BY_PYTHON = (AttributeError, IndexError, StopIteration, StopAsyncIteration)


@dataclass(frozen=True, slots=True, kw_only=True)
class RaisingBranch:
    """A branch that code takes only to raise.

    Attributes:
        raises_if: the truth value for which it does.
        leads_on: whether further conditions have to hold as well.
        kind: name of the builtin exception that comes nearest to what it raises.
        line: file and line of the question.
        frame: what asks.
        place: offset of the question, and of where code goes on if it does not raise.
    """

    raises_if: bool
    leads_on: bool
    kind: str
    line: str
    frame: FrameType
    place: tuple[int, int]


class Conditions:
    """Conditions that have to hold together for code to raise, as far as it has asked."""

    def __init__(self) -> None:
        self._branch: RaisingBranch | None = None  # of the last question
        self._held: list[tuple[Any, bool]] = []

    def add(self, branch: RaisingBranch, value: Any) -> list[tuple[Any, bool]]:
        """Add what was asked now; gives each value, and the truth value to raise for."""
        before, self._branch = self._branch, branch
        if before is None or not _goes_on(before, branch):
            self._held = []
        self._held.append((value, branch.raises_if))
        return self._held


def _goes_on(before: RaisingBranch, branch: RaisingBranch) -> bool:
    """Whether a question belongs to the same `if` as the one before it."""
    (asked, away), (asked_before, away_before) = branch.place, before.place
    is_behind = branch.frame is before.frame and asked > asked_before
    return before.leads_on and is_behind and away == away_before


def check_branch(conditions: Sequence[tuple[Any, bool]], kind: str, what: str) -> None:
    """Raise for what the code of the model raises for.

    Args:
        conditions: values, and the truth value that all of them have together if it raises.
        kind: name of the builtin exception.
        what: the text of it.

    Raises:
        Exception: of that kind.
    """
    of_data = []
    for value, raises_if in conditions:
        if isinstance(value, Tensor) and torch.compiler.is_compiling():
            # Asked in Python it would break the graph; the model's own code may not, in an assert.
            of_data.append(value.bool().reshape(()) == raises_if)
        elif QUESTIONS["bool"](value) is not raises_if:
            return
    if not of_data:
        raise getattr(builtins, kind)(what)
    torch._assert_async(reduce(torch.logical_and, of_data).logical_not(), what)


def find_raising_branch(
    frame: FrameType, entered: Collection[FrameType | None]
) -> RaisingBranch | None:
    """Find out whether one answer to the question that ``frame`` asks makes the model raise.

    Further conditions may have to hold as well, as in ``if a and b: raise``. None where that cannot
    be proved: the truth value is not asked by a jump, neither way or both can only raise, or some
    code up to the root of the model may catch what is raised.

    Args:
        frame: asks for a truth value.
        entered: for each context manager of torch's that the code is in, the frame whose ``with``
            has entered it, or None; these let all exceptions pass.
    """
    code = _Code(frame.f_code)
    jump = code.find_jump(code.start_of(frame.f_lasti))
    if jump is None:
        return None
    if_jumps = "IF_TRUE" in jump.opname
    starts = {if_jumps: jump.argval, not if_jumps: code.next[jump.offset]}
    found = {answer: code.find_way_to_raise(start) for answer, start in starts.items()}
    raising = {answer: way for answer, way in found.items() if way is not None}
    leads_on = not raising
    if leads_on:
        for answer, start in starts.items():
            if (way := code.find_way_through(start, starts[not answer])) is not None:
                raising[answer] = way
    if len(raising) != 1:
        return None
    ((raises_if, way),) = raising.items()
    kind = _find_kind(frame, way)
    is_left = code.passes(_raises(way), _count(frame, entered))
    if issubclass(kind, _CAUGHT_BY_PYTHON) or not is_left or not _passes_callers(frame, entered):
        return None
    line = f"{frame.f_code.co_filename}:{frame.f_lineno}"
    return RaisingBranch(
        raises_if=raises_if,
        leads_on=leads_on,
        kind=kind.__name__,
        line=line,
        frame=frame,
        place=(jump.offset, code.settle(starts[not raises_if])),
    )


def is_with(frame: FrameType) -> bool:
    """Whether what ``frame`` does now is to enter a context manager by ``with``."""
    code = _Code(frame.f_code)
    return next(code.from_(code.start_of(frame.f_lasti))).opname in ("BEFORE_WITH", "SETUP_WITH")


def _count(frame: FrameType, entered: Collection[FrameType | None]) -> int:
    return sum(each is frame for each in entered)


def _passes_callers(frame: FrameType, entered: Collection[FrameType | None]) -> bool:
    """Whether an exception of ``frame`` leaves the model, whatever it is."""
    caller = frame.f_back
    while caller is not None and caller.f_code is not fx.Tracer.trace.__code__:
        name = caller.f_globals.get("__name__", "")
        if name.split(".")[0] != "npas_fx" and not name.startswith("torch.fx."):
            code = _Code(caller.f_code)
            if not code.passes([code.start_of(caller.f_lasti)], _count(caller, entered)):
                return False
        caller = caller.f_back
    return True


def _raises(way: Collection[dis.Instruction]) -> list[int]:
    return [each.offset for each in way if each.opname in _RAISES]


def _find_kind(frame: FrameType, found: Collection[dis.Instruction]) -> type[Exception]:
    """The builtin exception that comes nearest to the one that instructions name."""
    names = {each.argval for each in found if each.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    values = [frame.f_globals.get(name, getattr(builtins, name, None)) for name in sorted(names)]
    if any("ASSERTION_ERROR" in each.opname or each.argval is AssertionError for each in found):
        values.append(AssertionError)
    kinds = [each for each in values if isinstance(each, type) and issubclass(each, Exception)]
    if len(kinds) == 1:
        with suppress(TypeError):  # some, such as UnicodeDecodeError, take more than a text
            kind = next(each for each in kinds[0].__mro__ if each.__module__ == "builtins")
            kind("")
            return kind
    return RuntimeError


class _Code:
    """The instructions of a function, and where they lead.

    Args:
        code: of the function.

    Attributes:
        next: offset of an instruction -> that of the one behind it.
    """

    def __init__(self, code: CodeType) -> None:
        instructions = list(dis.get_instructions(code))
        self._at = {each.offset: each for each in instructions}
        self.next = dict(zip(list(self._at), list(self._at)[1:], strict=False))
        self._table = getattr(dis.Bytecode(code), "exception_entries", None)

    def handler_of(self, offset: int) -> int | None:
        """Where Python goes on if an instruction raises; None if the function is left."""
        if self._table is None:
            return self._find_set_up().get(offset)
        inside = (entry for entry in self._table if entry.start <= offset < entry.end)
        return next((int(entry.target) for entry in inside), None)

    def start_of(self, offset: int) -> int:
        """Where an instruction starts; a frame that calls may be at the end of it."""
        return max(each for each in self._at if each <= offset)

    def from_(self, offset: int) -> Iterator[dis.Instruction]:
        """The instructions from an offset on, without prefixes."""
        for each, instruction in self._at.items():
            if each >= offset and instruction.opname != "EXTENDED_ARG":
                yield instruction

    def find_jump(self, offset: int) -> dis.Instruction | None:
        """The conditional jump that has asked for a truth value; None if something else has."""
        coming = self.from_(offset)
        instruction = next(coming)
        if instruction.opname == "TO_BOOL" or self._compares_to_number(instruction):
            instruction = next(coming)
        is_jump = "IF_TRUE" in instruction.opname or "IF_FALSE" in instruction.opname
        return instruction if is_jump else None

    def _compares_to_number(self, instruction: dis.Instruction) -> bool:
        """Whether an instruction compares, and asks for the truth value as well (Python 3.13).

        If it compares tuples, it asks for that of their items, which is another question.
        """
        before = self.start_of(max(instruction.offset - 1, 0))
        return (
            instruction.opname == "COMPARE_OP"
            and instruction.argrepr.startswith("bool(")
            and self._at[before].opname.startswith(("LOAD_CONST", "LOAD_SMALL_INT"))
            and isinstance(self._at[before].argval, (int, float))
        )

    def find_way_to_raise(self, start: int) -> list[dis.Instruction] | None:
        """What may run from an offset on until it raises; None if it may do anything else."""
        found: dict[int, dis.Instruction] = {}
        waiting = [start]
        while waiting:
            offset = waiting.pop()
            if offset in found:
                continue
            found[offset] = instruction = self._at[offset]
            if instruction.opname.startswith(_LEAVES):
                return None
            waiting += self._successors(instruction)
        return list(found.values())

    def find_way_through(self, start: int, away: int) -> list[dis.Instruction] | None:
        """What may run until it raises, if all that happens before is to ask whether to go away.

        Args:
            start: offset where it starts.
            away: where code goes on if it does not raise; None is given where it may do anything
                else.
        """
        offset: int | None = start
        while offset is not None:
            instruction = self._at[offset]
            behind = self.next.get(offset)
            if instruction.opname.startswith("POP_JUMP") and behind is not None:
                goals = {self.settle(goal): goal for goal in (instruction.argval, behind)}
                goals.pop(self.settle(away), None)
                if len(goals) != 1:
                    return None
                (goal,) = goals.values()
                return self.find_way_to_raise(goal) or self.find_way_through(goal, away)
            if not instruction.opname.startswith(_ONLY_READS):
                return None
            offset = behind
        return None

    def settle(self, offset: int) -> int:
        """Where jumps without a condition lead from an offset."""
        seen: set[int] = set()
        while offset not in seen:
            seen.add(offset)
            instruction = self._at[offset]
            if instruction.opname.startswith("JUMP") and "IF" not in instruction.opname:
                offset = instruction.argval
            elif instruction.opname in ("NOP", "NOT_TAKEN", "CACHE"):
                offset = self.next[offset]
        return offset

    def passes(self, raises: Collection[int], num_known: int) -> bool:
        """Whether an exception leaves the function.

        Args:
            raises: offsets of the instructions that may raise it.
            num_known: how many of the ``with`` blocks around them let all exceptions pass.
        """
        seen: set[int] = set()
        managers: set[int] = set()
        waiting = [*raises]
        while waiting:
            handler = self.handler_of(waiting.pop())
            if handler is None or handler in seen:
                continue
            seen.add(handler)
            way = self.find_way_to_raise(handler)
            if way is None:
                return False
            managers.update(each.offset for each in way if each.opname == _ASKS_MANAGER)
            waiting += _raises(way)
        return len(managers) == num_known

    def _successors(self, instruction: dis.Instruction) -> list[int]:
        name, behind = instruction.opname, self.next.get(instruction.offset)
        following = [] if behind is None else [behind]
        if name in _RAISES:
            return []
        if name == _ASKS_MANAGER and (jump := self.find_jump(following[0])) is not None:
            return [self.next[jump.offset]]  # it does not swallow, or is not one of the known ones
        if instruction.opcode not in _JUMPS or name.startswith("SETUP_"):
            return following
        if name.startswith("JUMP") and "IF" not in name:
            return [instruction.argval]
        return [instruction.argval, *following]

    def _find_set_up(self) -> dict[int, int]:
        """Find all handlers in Python 3.10, where instructions set them up."""
        handlers_at: dict[int, tuple[int, ...]] = {}
        waiting: list[tuple[int, tuple[int, ...]]] = [(0, ())]
        while waiting:
            offset, handlers = waiting.pop()
            if offset in handlers_at:
                continue
            handlers_at[offset] = handlers
            instruction = self._at[offset]
            inside = handlers
            if instruction.opname.startswith("SETUP_"):
                waiting.append((instruction.argval, handlers))
                inside = (*handlers, instruction.argval)
            elif instruction.opname == "POP_BLOCK":
                inside = handlers[:-1]
            if not instruction.opname.startswith("RETURN"):
                waiting += [(each, inside) for each in self._successors(instruction)]
        return {offset: handlers[-1] for offset, handlers in handlers_at.items() if handlers}
