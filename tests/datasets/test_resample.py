"""Decimation: what stays, what goes, and that nothing is late."""

from __future__ import annotations

import numpy as np
import pytest

from mmjax.datasets.resample import _ONE, _taps, decimate

RATE = 8000


def _sine(hertz, rate, seconds=1.0):
    return np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("hertz", [50, 1000, 3000])
def test_what_fits_stays_and_is_not_late(factor, hertz):
    found = decimate(_sine(hertz, factor * RATE), factor)
    expected = _sine(hertz, RATE)
    assert found.shape == expected.shape
    assert np.abs(found - expected)[50:-50].max() < 0.01


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("above", [1.1, 1.3, 1.9])
def test_what_does_not_fit_goes(factor, above):
    found = decimate(_sine(above * RATE / 2, factor * RATE), factor)
    assert np.abs(found)[50:-50].max() < 10 ** (-50 / 20)


@pytest.mark.parametrize("length", [1, 2, 99, 100, 101])
def test_length(length):
    assert decimate(np.ones(length), 4).shape == (-(-length // 4),)


def test_integers_add_up_exactly():
    """Against sums of Python's integers."""
    sound = np.random.default_rng(0).integers(-(2**15), 2**15, 301, dtype=np.int16)
    taps = [int(tap) for tap in _taps(2)]
    assert sum(taps) == _ONE and taps == taps[::-1]
    half, samples = len(taps) // 2, sound.tolist()
    for place, value in enumerate(decimate(sound, 2)):
        window = range(max(0, 2 * place - half), min(len(samples), 2 * place + half + 1))
        assert value * _ONE == sum(samples[i] * taps[2 * place + half - i] for i in window)
