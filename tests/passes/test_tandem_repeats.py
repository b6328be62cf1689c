"""Stretches that are the same again, against every stretch there is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from npas_fx.passes.tandem_repeats import Tandem, find_tandem_repeats

sequences = st.lists(st.sampled_from("abc"), max_size=14)
repeated = st.builds(
    lambda before, block, count, after: [*before, *(block * count), *after],
    st.lists(st.sampled_from("xyz"), max_size=3),
    st.lists(st.sampled_from("abc"), min_size=1, max_size=4),
    st.integers(2, 5),
    st.lists(st.sampled_from("xyz"), max_size=3),
)


def every_tandem(items):
    """All stretches that repeat with some period and cannot be made longer."""
    for period in range(1, len(items)):
        for start in range(len(items)):
            for stop in range(start + 2 * period, len(items) + 1):
                same = all(items[k] == items[k + period] for k in range(start, stop - period))
                before = start > 0 and items[start - 1] == items[start - 1 + period]
                after = stop < len(items) and items[stop] == items[stop - period]
                if same and not before and not after:
                    yield Tandem(start=start, stop=stop, period=period)


@given(items=sequences | repeated)
def test_what_is_found_repeats_and_does_not_overlap(items):
    found = find_tandem_repeats(items)
    assert {(t.start, t.stop, t.period) for t in found} <= {
        (t.start, t.stop, t.period) for t in every_tandem(items)
    }
    places = [k for tandem in found for k in range(tandem.start, tandem.stop)]
    assert len(set(places)) == len(places)


@given(items=sequences | repeated)
def test_the_largest_is_found_first_and_nothing_is_left(items):
    found, every = find_tandem_repeats(items), list(every_tandem(items))
    assert bool(found) == bool(every)
    if every:
        assert found[0].count * found[0].period == max(t.count * t.period for t in every)
    covered = {k for tandem in found for k in range(tandem.start, tandem.stop)}
    for tandem in every:
        assert not covered.isdisjoint(range(tandem.start, tandem.stop))


@given(
    block=st.lists(st.integers(0, 9), min_size=1, max_size=5, unique=True),
    count=st.integers(2, 6),
)
def test_the_period_is_the_shortest(block, count):
    (tandem,) = find_tandem_repeats([-1, *(block * count), -2])
    assert (tandem.start, tandem.period, tandem.count) == (1, len(block), count)
