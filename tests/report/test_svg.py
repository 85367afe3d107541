"""Charts."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mmjax.report.svg import Line, log_ticks, smoothed, thinned, ticks


@given(
    st.lists(st.floats(-1e3, 1e3) | st.sampled_from([np.nan, np.inf]), min_size=1, max_size=80),
    st.floats(1, 20),
)
def test_smoothed_is_the_mean_of_its_window(values: list[float], span: float) -> None:
    line = smoothed(Line(np.arange(len(values)) * 3, np.array(values), "raw"), span, "smooth")
    assert line.x.tolist() == [3 * i for i in range(len(values))] and line.style == "smooth"
    for i, mean in enumerate(line.y):
        reach = min(i, int(span // 2))
        near = [v for v in values[i - reach : i + reach + 1] if np.isfinite(v)]
        assert mean == pytest.approx(sum(near) / len(near), abs=1e-9) if near else np.isnan(mean)


def test_long_lines_keep_their_extremes() -> None:
    y = np.sin(np.arange(100_000) / 500.0)
    y[33_333], y[44_444], y[50_000] = 50.0, -50.0, np.nan
    line = thinned(Line(np.arange(100_000), y, "raw"))
    assert 2_000 < len(line.x) <= 5_002
    assert {0, 33_333, 44_444, 99_999} <= set(line.x.tolist())
    assert line.y.tolist() == y[line.x].tolist()
    assert (np.diff(line.x) > 0).all()
    assert len(smoothed(line, 10, "smooth").x) == 1000


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_round_even_and_inside(low: float, width: float) -> None:
    assume(width > 1e-9 * abs(low))
    found = ticks(low, low + width)
    assert 2 <= len(found) <= 8
    assert min(found) >= low - 1e-6 * width and max(found) <= low + width + 1e-6 * width
    gap = found[1] - found[0]
    assert np.diff(found) == pytest.approx(gap, rel=1e-3)
    assert float(f"{gap:.0e}") == pytest.approx(gap, rel=1e-3)  # one digit


@given(st.floats(1e-9, 1e9), st.floats(50, 1e12))
def test_log_ticks_are_inside(low: float, factor: float) -> None:
    found = log_ticks(low, low * factor)
    assert 1 <= len(found) <= 8 and found == sorted(found)
    assert found[0] >= low * 0.99 and found[-1] <= low * factor * 1.01
