"""Schedules, orders and how far they drift."""

from hypothesis import strategies as st

NAMES = list("abcdefgh")


SEEDS = st.integers(-(2**63), 2**64)


SHARES = st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any)


INTERVALS = st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 8, 12]), min_size=1, max_size=8)


@st.composite
def weights(draw, rule):
    values = draw(INTERVALS.filter(any) if rule == "interval" else SHARES)
    names = draw(st.permutations(NAMES))
    return dict(zip(names, values, strict=False))
