"""Solvers: from a ``PlanningProblem`` of plain numbers to a ``Selection`` with its certificate."""

from __future__ import annotations

from typing import Protocol

from npas_fx.solvers import cp_sat, greedy, highs, lagrange
from npas_fx.solvers.cp_sat import select_frontier
from npas_fx.solvers.frontier import select_each
from npas_fx.solvers.problem import PlanningProblem, PlanningProblemError
from npas_fx.solvers.selection import Obstacle, Selection


class Solver(Protocol):
    """Whatever answers a planning problem; pass your own wherever a name of ``SOLVERS`` goes."""

    def __call__(self, problem: PlanningProblem) -> Selection:
        """Choose candidates; that there is no plan is a status, not an exception."""
        ...


SOLVERS: dict[str, Solver] = {
    "cp_sat": cp_sat.select,
    "greedy": greedy.select,
    "highs": highs.select,
    "lagrange": lagrange.select,
}

__all__ = [
    "SOLVERS",
    "Obstacle",
    "PlanningProblem",
    "PlanningProblemError",
    "Selection",
    "Solver",
    "select_each",
    "select_frontier",
]
