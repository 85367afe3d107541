"""Fewer samples per second of a sound, with what the lower rate cannot hold filtered out."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import signal

_TAPS_PER_PHASE = 24
_BETA = 5.0  # of the Kaiser window: the stop band lies 54 dB down
_EDGE = 0.9  # middle of the filter's slope, of the new Nyquist frequency
_ONE = 2**15


def decimate(sound: NDArray, factor: int) -> NDArray[np.float64]:
    """Reduce the rate, `[N] -> [ceil(N / factor)]`, in the same unit; frequencies up to 0.75 of the new band stay.

    The filter's taps are integers over 2^15, so that integers in give the same numbers out on
    every machine, whatever the order in which it adds them.
    """
    taps = _taps(factor)
    padded = np.concatenate([sound.astype(np.float64), np.zeros(len(taps) // 2)])
    filtered = signal.upfirdn(taps, padded, down=factor)
    # The filter is symmetric: its middle tap is a whole number of new samples late.
    late = len(taps) // 2 // factor
    return filtered[late : late + -(-len(sound) // factor)] / _ONE


@lru_cache(maxsize=4)
def _taps(factor: int) -> NDArray[np.float64]:
    length = _TAPS_PER_PHASE * factor + 1
    taps = np.round(_ONE * signal.firwin(length, _EDGE / factor, window=("kaiser", _BETA)))
    taps[length // 2] += _ONE - taps.sum()
    return taps
