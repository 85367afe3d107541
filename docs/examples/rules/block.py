"""A rule of the schedule: each task runs all its visits of a cycle in one block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmjax.schedule.rules.base import Rule


@dataclass(frozen=True)
class Block(Rule):
    """A pure function of the weights: a cycle is all that a rule describes."""

    def counts(self, weights: Sequence[int]) -> list[int]:
        """Return how often each task runs in a cycle."""
        return list(weights)

    def order(self, weights: Sequence[int], seed: int, first: int) -> list[int]:
        """Return the index of the task of each step of a cycle."""
        return [index for index, weight in enumerate(weights) for _ in range(weight)]
