"""The rule `interval`, of IMP: each task runs once per interval of passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mmjax.schedule.rules.base import Rule


@dataclass(frozen=True)
class Interval(Rule):
    """Each pass p = 0, 1, 2 ... each task whose interval divides p runs, in config order (IMP).

    The published loop counts passes from 1. From 0, the first pass runs every task once.
    """

    key = "interval"

    def counts(self, weights: Sequence[int]) -> list[int]:
        passes = math.lcm(*weights)
        return [passes // weight for weight in weights]

    def order(self, weights: Sequence[int], seed: int, first: int) -> list[int]:
        counts = self.counts(weights)
        fires = ((j * weights[i], i) for i, count in enumerate(counts) for j in range(count))
        return [i for _, i in sorted(fires)]
