"""Check what the panels of held-out examples have in common."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mmjax.report.panel import spread


@given(st.integers(0, 300), st.integers(1, 40))
def test_spread_is_even_and_takes_both_ends(count: int, most: int) -> None:
    chosen = spread(count, most)
    assert len(chosen) == min(count, most) and chosen == sorted(set(chosen))
    if most > 1 and count:
        assert chosen[0] == 0 and chosen[-1] == count - 1
        gaps = np.diff(chosen)
        assert not len(gaps) or gaps.max() - gaps.min() <= 1
