"""Patterns: names, globs and regular expressions, and what is none of these."""

from __future__ import annotations

import re

import pytest
from torch import nn

import npas_fx
from mlp_rules import WEIGHTS, emit, plain
from npas_fx import RuleError, plan_of


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("hidden.0.weight", {"hidden.0.weight"}),
        ("hidden.*.weight", {"hidden.0.weight", "hidden.1.weight"}),
        ("hidden.?.weight", {"hidden.0.weight", "hidden.1.weight"}),
        ("hidden.[1-9].weight", {"hidden.1.weight"}),
        ("*", set(WEIGHTS)),
        (re.compile(r"^h"), {"hidden.0.weight", "hidden.1.weight", "head.weight"}),
        (re.compile(r"\.1\."), {"hidden.1.weight"}),
        (["stem.weight", re.compile("head")], {"stem.weight", "head.weight"}),
        (("stem.*",), {"stem.weight"}),
    ],
)
def test_patterns_are_names_globs_and_regular_expressions(pattern, names):
    shared = emit(1.0 if len(names) == 4 else 0.9, exclude=pattern)
    plan = plan_of(shared)
    excluded = {name for name, reason in plan.kept.items() if reason == "excluded"}
    assert excluded == names
    assert names <= plain(shared)
    assert not names & {name for bank in plan.banks for name in bank.sites}


def test_a_glob_is_over_the_whole_name():
    with pytest.raises(RuleError, match="matches no parameter"):
        emit(exclude="weight")
    with pytest.raises(RuleError, match="matches no parameter"):
        emit(exclude="HIDDEN.*")


def test_an_exact_name_is_no_glob():
    class Brackets(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleDict({"a[0]": nn.Linear(4, 4), "a0": nn.Linear(4, 4)})

        def forward(self, x):
            return self.layers["a0"](self.layers["a[0]"](x))

    plan = npas_fx.plan(Brackets(), 1.0, exclude="layers.a[0].weight")
    assert [n for n, reason in plan.kept.items() if reason == "excluded"] == ["layers.a[0].weight"]


@pytest.mark.parametrize("rule", ["include", "exclude", "keep_private"])
def test_an_unmatched_pattern_lists_near_names(rule):
    with pytest.raises(RuleError, match=f"{rule}: 'hiden.0.weight'.*'hidden.0.weight'"):
        emit(**{rule: ["stem.weight", "hiden.0.weight"]})
    with pytest.raises(RuleError, match=f"{rule}: .*zzz.*near names: '"):
        emit(**{rule: re.compile("zzz")})


@pytest.mark.parametrize("rule", ["same_bank", "different_bank"])
def test_an_unmatched_pattern_of_a_group_lists_near_names(rule):
    with pytest.raises(RuleError, match=rf"{rule}: 'hidden.9.weight'.*'hidden\.[01]\.weight'"):
        emit(**{rule: [["stem.weight", "hidden.9.weight"]]})


@pytest.mark.parametrize("rule", ["include", "exclude", "keep_private"])
@pytest.mark.parametrize("value", [3, [3], [["stem.weight"]], [None]])
def test_what_is_no_pattern_is_a_type_error(rule, value):
    with pytest.raises(TypeError, match=rule):
        emit(**{rule: value})


@pytest.mark.parametrize("rule", ["same_bank", "different_bank"])
@pytest.mark.parametrize(
    "value", ["stem.weight", ["stem.weight", "head.weight"], [3], 3, re.compile("a"), [[3, 4]]]
)
def test_what_is_no_list_of_groups_is_a_type_error(rule, value):
    with pytest.raises(TypeError, match=rule):
        emit(**{rule: value})
