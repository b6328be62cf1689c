from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest

from npas_fx.solvers import SOLVERS, Obstacle, PlanningProblem, PlanningProblemError


def problem_with(**changes: Any) -> PlanningProblem:
    arguments: dict[str, Any] = {
        "num_sites": 2,
        "members": ((0,), (1,), (0, 1)),
        "price": (0.0, 0.0, 1.0),
        "cost": {"parameters": (4, 4, 5)},
        "budget": {"parameters": 6},
    }
    return PlanningProblem(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_sites": -1}, "num_sites=-1 is negative"),
        ({"price": (0.0, 0.0)}, "price has 2 entries for 3 candidates"),
        ({"cost": {"parameters": (4, 4)}}, r"cost\['parameters'\] has 2 entries for 3 candidates"),
        ({"budget": {"bytes": 6}}, r"cost has the resources \['parameters'\], budget has"),
        ({"budget": {}}, r"budget has \[\]"),
        ({"members": ((0,), (), (0, 1))}, "candidate 1 has no sites"),
        ({"members": ((0,), (1,), (1, 0))}, "candidate 2: site 0 follows site 1"),
        ({"members": ((0,), (1,), (1, 1))}, "candidate 2: site 1 follows site 1"),
        ({"members": ((0,), (1,), (1, 2))}, "candidate 2 has the sites 1 to 2, out of range"),
        ({"members": ((0,), (1,), (-1, 1))}, "candidate 2 has the sites -1 to 1, out of range"),
        ({"members": ((0,), (0,), (0,))}, "site 1 is in no candidate"),
        ({"price": (0.0, math.nan, 1.0)}, "candidate 1 has price=nan"),
        ({"price": (0.0, 0.0, math.inf)}, "candidate 2 has price=inf"),
        ({"price": (1e308, -1.5e308, 1e308)}, "candidate 1 has the largest, -1.5e\\+308"),
        ({"cost": {"parameters": (4, 4.0, 5)}}, r"candidate 1 has cost\['parameters'\]=4.0"),
        ({"cost": {"parameters": (4, 4, -5)}}, r"candidate 2 has cost\['parameters'\]=-5"),
        ({"cost": {"parameters": (2**61, 0, 2**61)}}, "2\\*\\*62 or more; candidate 0"),
        ({"budget": {"parameters": 6.5}}, r"budget\['parameters'\]=6.5 is a float"),
        ({"budget": {"parameters": -6}}, r"budget\['parameters'\]=-6"),
        ({"private": frozenset({2})}, "private names site 2, out of range"),
        ({"same_bank": ((0, 1), (0, 5))}, "same_bank names site 5, out of range"),
        ({"different_bank": ((-1, 1),)}, "different_bank names site -1, out of range"),
        ({"pin": (3,)}, "pin names candidate 3, but there are 3 candidates"),
        ({"max_banks": -1}, "max_banks=-1"),
    ],
)
def test_contradictions_are_named(changes: dict[str, Any], message: str) -> None:
    problem_with()
    with pytest.raises(PlanningProblemError, match=message) as caught:
        problem_with(**changes)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_problem_without_sites_has_the_empty_plan(name: str) -> None:
    problem = PlanningProblem(
        num_sites=0, members=(), price=(), cost={"parameters": ()}, budget={"parameters": 0}
    )
    selection = SOLVERS[name](problem)
    assert selection.status == "optimal"
    assert (selection.chosen, selection.objective, selection.gap) == ((), 0.0, 0.0)


@pytest.mark.parametrize("name", SOLVERS)
def test_no_exact_cover_is_infeasible_at_any_budget(name: str) -> None:
    problem = problem_with(
        num_sites=3,
        members=((0, 1), (1, 2), (0, 2)),
        budget={"parameters": 100},
    )
    selection = SOLVERS[name](problem)
    assert selection.status == "infeasible"
    assert selection.obstacle == Obstacle(smallest={})


def test_ortools_is_imported_only_to_solve() -> None:
    code = "import sys, npas_fx.solvers; assert 'ortools' not in sys.modules, 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
