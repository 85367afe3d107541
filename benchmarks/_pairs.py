"""Cases' vocabulary: how much to measure, what comes out, and medians with their intervals."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmjax.core.config import Block

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Effort:
    """The number of rounds and repeats of a measurement.

    Attributes:
      block: the config as plain data.
      pairs: interleaved pairs.
      steps: timed steps of a task, or periods of a schedule, in one half of a pair.
      extra: folders of further modules, see `--extra` of `mmjax train`.
    """

    block: Block
    pairs: int
    steps: int
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Quantity:
    """A median over pairs.

    Attributes:
      name: what it is.
      unit: of the numbers; empty for a ratio.
      wanted: in words, what the project claims of it; empty for nothing.
      median, low, high: with its interval.
      values: of each pair.
    """

    name: str
    unit: str
    wanted: str
    median: float
    low: float
    high: float
    values: tuple[float, ...]


def quantity(name: str, values: Sequence[float], unit: str = "", wanted: str = "") -> Quantity:
    """Return the median of values with its 95 % interval."""
    low, high = interval(values)
    return Quantity(name, unit, wanted, statistics.median(values), low, high, tuple(values))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return an interval that holds the median of independent values with 95 % at least, whatever their law.

    Between the k-th smallest and the k-th largest, by the binomial law of how many lie below the
    median; all values where there are fewer than six, which is less than 95 %.
    """
    ordered, n = sorted(values), len(values)
    k, outside = 1, 2 * 0.5**n  # P(median below the k-th smallest, or above the k-th largest)
    while True:
        more = outside + 2 * math.comb(n, k) * 0.5**n
        if more > 1 - CONFIDENCE:
            return ordered[k - 1], ordered[n - k]
        k, outside = k + 1, more


def rounds(
    calls: Mapping[str, Callable[[], Any]], pairs: int, repeats: int = 1
) -> dict[str, list[float]]:
    """Return seconds of a call of each, in every round: all of them in turn, beginning with another one each time.

    Each waits for what it calls. The first call of each, which takes longer, is not counted.

    Args:
      repeats: calls in a row, of which the mean counts.
    """
    names = list(calls)
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in names}
    for pair in range(pairs):
        at = pair % len(names)
        for name in names[at:] + names[:at]:
            begin = time.perf_counter()
            for _ in range(repeats):
                calls[name]()
            times[name].append((time.perf_counter() - begin) / repeats)
    return times


def ratios(
    times: Mapping[str, Sequence[float]], one: str, other: str, wanted: str = "", name: str = ""
) -> Quantity:
    """Return the seconds of one by those of the other, round by round."""
    values = [a / b for a, b in zip(times[one], times[other], strict=True)]
    return quantity(name or f"{one} to {other}", values, wanted=wanted)


def millis(times: Mapping[str, Sequence[float]], prefix: str = "") -> list[Quantity]:
    """Return the milliseconds themselves."""
    return [
        quantity(f"{prefix}{name}", [1000 * t for t in each], "ms") for name, each in times.items()
    ]
