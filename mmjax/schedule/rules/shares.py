"""The rule `shares`: each task gets its share of the steps, spread as evenly as can be."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from mmjax.schedule.rules.base import Rule


@dataclass(frozen=True)
class Shares(Rule):
    """Tijdeman's rule for the chairman assignment problem (R. Tijdeman, Discrete Math. 32, 1980).

    With k tasks of fractions f, x_i the visits of task i so far, the n-th step goes to the task with the nearest
    deadline among those with n f_i - x_i >= 1 / (2k - 2); the deadline of task i is the first n with
    n f_i - x_i > 1 - 1 / (2k - 2). Then |x_i - n f_i| <= 1 - 1 / (2k - 2) after every step, and no rule can promise
    less. Ties go by config order.
    """

    def counts(self, weights: Sequence[int]) -> list[int]:
        divisor = math.gcd(*weights)
        return [weight // divisor for weight in weights]

    def order(self, weights: Sequence[int], seed: int, first: int) -> list[int]:
        counts = self.counts(weights)
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
    """Return the first n with n * count / total - visits >= 1 / d."""
    return -(-(total + d * visits * total) // (d * count))


def _deadline(visits: int, count: int, total: int, d: int) -> int:
    """Return the first n with n * count / total - visits > 1 - 1 / d."""
    return ((d - 1) * total + d * visits * total) // (d * count) + 1
