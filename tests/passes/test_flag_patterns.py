"""Patterns of flags tell modules apart, and a module from a pair of modules."""

from itertools import combinations
from operator import and_, or_, xor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npas_fx.passes.flag_patterns import is_inside, mode_patterns, number_each, number_rivals

PATHS = st.lists(st.sampled_from("abc"), max_size=4).map(".".join)


def codes_of(number_of):
    patterns = mode_patterns(number_of)
    return {path: tuple(pattern[path] for pattern in patterns) for path in number_of}


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 9])
def test_patterns_name_each_path_and_no_pair_of_paths(count):
    codes = codes_of(number_each(f"m{k}" for k in range(count)))
    assert len(set(codes.values())) == count
    for p, q in combinations(codes, 2):
        for combine in (and_, or_, xor):
            assert tuple(map(combine, codes[p], codes[q])) not in codes.values()


@given(st.sets(PATHS, min_size=1), st.data())
def test_rivals_and_nested_modules_have_other_numbers(asked, data):
    groups = data.draw(st.lists(st.sets(st.sampled_from(sorted(asked)))))
    number_of = number_rivals(asked, groups)
    assert number_of.keys() == asked
    for p, q in combinations(asked, 2):
        if is_inside(p, q) or is_inside(q, p) or any({p, q} <= group for group in groups):
            assert number_of[p] != number_of[q]


@given(st.integers(1, 200))
def test_two_numbers_do_for_any_number_of_siblings_below_one_parent(count):
    assert len(mode_patterns(number_rivals(["", *(f"m{k}" for k in range(count))], []))) == 2


def test_neighbours_differ():
    number_of = number_rivals([f"m{k}" for k in range(8)], [])
    assert all(number_of[f"m{k}"] != number_of[f"m{k + 1}"] for k in range(7))
