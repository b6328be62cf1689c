"""Globs for many names match these names and no others."""

from __future__ import annotations

from fnmatch import fnmatchcase

from hypothesis import given
from hypothesis import strategies as st

from npas_fx.ir.globs import find_globs

parts = st.text("a1*[.", min_size=1, max_size=4) | st.sampled_from(["0", "1", "10", "fc", "conv1"])
names = st.lists(parts, min_size=1, max_size=4).map(".".join)


@given(names=st.lists(names, min_size=1, max_size=12, unique=True), data=st.data())
def test_globs_match_these_names_and_no_others(names, data):
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    globs = find_globs(chosen, {name: name for name in names})
    assert len(globs) <= len(chosen)
    matched = {n for n in names for glob in globs if n == glob or matches(n, glob, names)}
    assert matched == set(chosen)


def matches(name, glob, names):
    """As a rule would: a name first, since it may hold the characters of a glob."""
    return name == glob if glob in names else fnmatchcase(name, glob)


def test_stars_stand_for_numbers():
    blocks = [f"blocks.{k}.{name}.weight" for k in range(12) for name in ("fc1", "fc2", "norm")]
    name_of = {name: name for name in (*blocks, "head.weight", "stem.0.weight")}
    assert find_globs(blocks, name_of) == ["blocks.*.fc*.weight", "blocks.*.norm.weight"]
    first = [name for name in blocks if "fc1" in name]
    assert find_globs(first, name_of) == ["blocks.*.fc1.weight"]
    assert find_globs(first[1:], name_of) == first[1:]
    assert find_globs(["stem.0.weight"], name_of) == ["stem.0.weight"]


def test_an_alias_counts_as_the_name_it_stands_for():
    name_of = {"h.0.fc.weight": "h.0.fc.weight", "h.1.fc.weight": "h.0.fc.weight"}
    assert find_globs(["h.0.fc.weight"], name_of) == ["h.0.fc.weight"]
