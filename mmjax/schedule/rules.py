"""Rules of a schedule: how often each task runs in a period, and in which order."""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmjax.core.errors import UserError, nearest
from mmjax.data.order import fold, stream

MAX_PERIOD = 1_000_000  # steps; a table of this many is built in seconds and held in megabytes


def _shares_counts(weights: Sequence[int]) -> list[int]:
    divisor = math.gcd(*weights)
    return [weight // divisor for weight in weights]


def _shares_order(weights: Sequence[int], seed: int, first: int) -> list[int]:
    """Tijdeman's rule for the chairman assignment problem (R. Tijdeman, Discrete Math. 32, 1980).

    With k tasks of fractions f, x_i the visits of task i so far, the n-th step goes to the task
    with the nearest deadline among those with n f_i - x_i >= 1 / (2k - 2); the deadline of task i
    is the first n with n f_i - x_i > 1 - 1 / (2k - 2). Then |x_i - n f_i| <= 1 - 1 / (2k - 2)
    after every step, and no rule can promise less. All in integers; ties go by config order.
    """
    counts = _shares_counts(weights)
    total, d = sum(counts), max(1, 2 * len(counts) - 2)
    visits = [0] * len(counts)
    waiting = [(_release(0, c, total, d), i) for i, c in enumerate(counts)]
    heapq.heapify(waiting)
    ready: list[tuple[int, int]] = []
    order = []
    for n in range(1, total + 1):
        while waiting and waiting[0][0] <= n:
            i = heapq.heappop(waiting)[1]
            heapq.heappush(ready, (_deadline(visits[i], counts[i], total, d), i))
        i = heapq.heappop(ready)[1]
        order.append(i)
        visits[i] += 1
        heapq.heappush(waiting, (_release(visits[i], counts[i], total, d), i))
    return order


def _release(visits: int, count: int, total: int, d: int) -> int:
    """The first n with n * count / total - visits >= 1 / d."""
    return -(-(total + d * visits * total) // (d * count))


def _deadline(visits: int, count: int, total: int, d: int) -> int:
    """The first n with n * count / total - visits > 1 - 1 / d."""
    return ((d - 1) * total + d * visits * total) // (d * count) + 1


def _interval_counts(weights: Sequence[int]) -> list[int]:
    passes = math.lcm(*weights)
    return [passes // weight for weight in weights]


def _interval_order(weights: Sequence[int], seed: int, first: int) -> list[int]:
    """IMP: in pass p = 0, 1, 2 ... each task whose interval divides p runs, in config order.

    The published loop counts passes from 1. From 0, the first pass runs every task once.
    """
    counts = _interval_counts(weights)
    fires = ((j * weights[i], i) for i, count in enumerate(counts) for j in range(count))
    return [i for _, i in sorted(fires)]


def _random_order(weights: Sequence[int], seed: int, first: int) -> list[int]:
    """Each task as often as its weight, shuffled (Fisher and Yates) by (seed, first step)."""
    order = [i for i, weight in enumerate(weights) for _ in range(weight)]
    draws = stream(fold(seed, first), len(order)) % np.arange(1, len(order) + 1, dtype=np.uint64)
    for last, chosen in reversed(list(enumerate(draws.tolist()))):
        order[last], order[chosen] = order[chosen], order[last]
    return order


@dataclass(frozen=True)
class Rule:
    """How weights become periods.

    Attributes:
      counts: weights -> the visits of each task in a period; their sum is its length.
      order: (weights, seed, first step of the period) -> the task of each of its steps.
      varies: whether periods differ from one another.
    """

    counts: Callable[[Sequence[int]], list[int]]
    order: Callable[[Sequence[int], int, int], list[int]]
    varies: bool = False


RULES = {
    "shares": Rule(_shares_counts, _shares_order),
    "interval": Rule(_interval_counts, _interval_order),
    "random": Rule(list, _random_order, varies=True),
}


@dataclass(frozen=True)
class Period:
    """The order of a period's steps, and where each task's are."""

    order: NDArray[np.int32]  # [length], the task of each step
    where: list[NDArray[np.int64]]  # per task, the steps at which it runs, ascending

    def visits(self, task: int, offset: int) -> int:
        """How often a task runs in the first `offset` steps."""
        return int(np.searchsorted(self.where[task], offset))


@functools.lru_cache(maxsize=16)
def make_period(rule: str, weights: tuple[int, ...], seed: int, first: int) -> Period:
    order = np.array(RULES[rule].order(weights, seed, first), dtype=np.int32)
    ends = np.cumsum(np.bincount(order, minlength=len(weights)))
    return Period(order, np.split(np.argsort(order, kind="stable"), ends[:-1]))


def turns(shares: tuple[int, ...]) -> Period:
    """A period of the rule `shares`."""
    return make_period("shares", shares, 0, 0)


def exact_integer(value: Any, what: str, *, low: int | None = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UserError(f"{what} must be an integer; found {value!r}.")
    if low is not None and value < low:
        raise UserError(f"{what} must be {low} or more; found {value}.")
    return int(value)


def check_rule(rule: str) -> None:
    if rule not in RULES:
        raise UserError(f"There is no schedule rule '{rule}'.{nearest(str(rule), RULES)}")


def check_weights(rule: str, weights: Mapping[str, int]) -> dict[str, int]:
    word = "interval" if rule == "interval" else "share"
    checked = {t: exact_integer(w, f"Task '{t}': its {word}") for t, w in weights.items()}
    if not checked:
        raise UserError("The schedule has no tasks. Give at least one.")
    running = {task: weight for task, weight in checked.items() if weight}
    if not running:
        names = ", ".join(f"'{task}'" for task in checked)
        raise UserError(f"No task would ever run: the {word} of each of {names} is 0.")
    length = sum(RULES[rule].counts(tuple(running.values()))) if rule in RULES else 0
    if length > MAX_PERIOD:
        raise UserError(
            f"The schedule {rule} {running} repeats only after {length} steps, more than "
            f"{MAX_PERIOD}. Use {word}s with smaller numbers or more common factors."
        )
    return checked
