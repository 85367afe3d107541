"""The rule `random`: each cycle holds each task's share in an order of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmjax.data.order import fold, stream
from mmjax.schedule.rules.base import Rule


@dataclass(frozen=True)
class Random(Rule):
    """Each task as often as its weight, shuffled (Fisher and Yates) by the seed and the cycle's first step."""

    varies = True

    def counts(self, weights: Sequence[int]) -> list[int]:
        return list(weights)

    def order(self, weights: Sequence[int], seed: int, first: int) -> list[int]:
        order = [i for i, weight in enumerate(weights) for _ in range(weight)]
        draws = stream(fold(seed, first), len(order)) % np.arange(
            1, len(order) + 1, dtype=np.uint64
        )
        for last, chosen in reversed(list(enumerate(draws.tolist()))):
            order[last], order[chosen] = order[chosen], order[last]
        return order
