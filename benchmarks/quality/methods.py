"""All methods by name: each makes a network of at most the budget's parameters."""

from __future__ import annotations

from collections.abc import Mapping

from quality.by_hand import (
    make_low_rank,
    make_narrower,
    make_overparameterized,
    make_plain,
    make_shallower,
    make_ssn,
)
from quality.contestant import Method
from quality.sharing import (
    make_groups,
    make_one_bank,
    make_ours,
    make_random_groups,
    make_random_plan,
    make_tied_by_role,
    make_tied_runs,
)

METHODS: Mapping[str, Method] = {
    "ours": make_ours,
    "plain": make_plain,
    "narrower": make_narrower,
    "shallower": make_shallower,
    "tied_by_role": make_tied_by_role,
    "tied_runs": make_tied_runs,
    "low_rank": make_low_rank,
    "one_bank": make_one_bank,
    "random_groups": make_random_groups,
    "ssn": make_ssn,
    "overparameterized": make_overparameterized,
    "groups": make_groups,
    "random_plan": make_random_plan,
}
