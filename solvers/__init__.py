"""Solvers: from a ``PlanningProblem`` of plain numbers to a ``Selection`` with its certificate."""

from __future__ import annotations

from typing import Protocol

from npas_fx.solvers import cp_sat, greedy
from npas_fx.solvers.problem import PlanningProblem, PlanningProblemError, Selection


class Solver(Protocol):
    """Whatever answers a planning problem; pass your own wherever a name of ``SOLVERS`` goes."""

    def __call__(self, problem: PlanningProblem) -> Selection:
        """Choose candidates; that there is no plan is a status, not an exception."""
        ...


SOLVERS: dict[str, Solver] = {"cp_sat": cp_sat.select, "greedy": greedy.select}

__all__ = ["SOLVERS", "PlanningProblem", "PlanningProblemError", "Selection", "Solver"]
