"""The benchmark of exponents, by times that are known."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import scaling


def test_the_slope_of_a_power_is_its_exponent() -> None:
    sizes = (8, 16, 32, 64)
    for exponent in (0.0, 0.5, 1.0, 2.0):
        assert scaling.slope(sizes, [3 * n**exponent for n in sizes]) == pytest.approx(exponent)
    # Half of it fixed: less than linear.
    assert 0 < scaling.slope(sizes, [64 + n for n in sizes]) < 0.5


def test_exponents_are_those_of_each_round() -> None:
    first, *shown = scaling._exponents("x", (1, 2, 4), [[1, 1], [2, 4], [4, 16]], 1.0)
    assert first.values == pytest.approx((1.0, 2.0)) and first.wanted == "1.00 by theory"
    assert [each.values for each in shown] == [(1000, 1000), (2000, 4000), (4000, 16000)]


def test_theory_is_that_of_the_steps() -> None:
    """Depth and batch: linear. Tokens: more than that, by attention. Experts: none, but for the router."""
    base = {"tokens": 64, "batch": 2, "depth": 1, "experts": 0}

    def of(name: str, *sizes: int) -> float:
        return scaling.slope(sizes, [scaling.step({**base, name: n}, 0)[1] for n in sizes])

    assert of("batch", 2, 4, 8) == pytest.approx(1) and of("depth", 1, 2, 4) == pytest.approx(1)
    assert 1.01 < of("tokens", 64, 128, 256) < 2
    assert 0 <= of("experts", 2, 4, 8) < 0.05
    assert np.isfinite(scaling.step(base, 0)[0]()[0])
