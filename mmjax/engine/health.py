"""The health of each task, and the schedule after one has failed.

All of it is a pure function of the losses that a run has seen, which its clock holds: a run that was
killed and resumed finds the same at the same step.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from mmjax.schedule.schedule import Schedule


@dataclass(frozen=True)
class HealthLimits:
    """Limits beyond which a task is unhealthy.

    Attributes:
      non_finite: visits in a row with a non-finite loss or gradient.
      divergence: how many times its first losses the last ones may be; 0: any.
      visits: how many first and last losses are compared.
    """

    non_finite: int
    divergence: float
    visits: int


@dataclass(frozen=True)
class Health:
    """The recent history of a task.

    Attributes:
      consecutive_non_finite: visits in a row, up to the last one, with a non-finite loss or gradient.
      first: its first finite losses.
      last: its last finite losses, in order.
    """

    consecutive_non_finite: int = 0
    first: tuple[float, ...] = ()
    last: tuple[float, ...] = ()

    def after(self, loss: float, finite: bool, bounds: HealthLimits) -> Health:
        """Return the health after one more visit."""
        if not finite:
            return Health(self.consecutive_non_finite + 1, self.first, self.last)
        first = self.first if len(self.first) >= bounds.visits else (*self.first, loss)
        return Health(0, first, (*self.last, loss)[-bounds.visits :])

    def has_diverged(self, bounds: HealthLimits) -> bool:
        """Return whether the median of the last losses is above what its first ones allow."""
        limit = self._limit(bounds)
        full = len(self.last) >= bounds.visits
        return limit is not None and full and statistics.median(self.last) > limit

    def may_diverge(self, bounds: HealthLimits) -> bool:
        """Return whether any of the last losses is so high that a divergence may have begun."""
        limit = self._limit(bounds)
        return limit is not None and any(loss > limit for loss in self.last)

    def _limit(self, bounds: HealthLimits) -> float | None:
        if not bounds.divergence or len(self.first) < bounds.visits:
            return None
        first = statistics.median(self.first)
        return bounds.divergence * first if first > 0 else None  # a ratio to zero means nothing

    def to_json(self) -> dict[str, Any]:
        return {
            "bad": self.consecutive_non_finite,
            "first": list(self.first),
            "last": list(self.last),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Health:
        return cls(data["bad"], tuple(data["first"]), tuple(data["last"]))


class Diverged(Exception):
    """A task's losses have left all bounds; the run goes back to where it was well.

    Attributes:
      task: which.
      quarantined: the tasks that were in quarantine before.
      before: the last step at which the parameters were certainly whole; None if that is not known.
    """

    def __init__(
        self,
        task: str,
        step: int,
        quarantined: Collection[str],
        words: str,
        before: int | None = None,
    ):
        super().__init__(f"Task '{task}' has diverged by step {step}: {words}")
        self.task, self.quarantined, self.before = task, tuple(quarantined), before


def broken_at(schedule: Schedule, health: Mapping[str, Health], step: int) -> int | None:
    """Return the step whose update has broken the parameters: no task has had a finite step since.

    Args:
      schedule: of the steps up to `step`.
      health: of each task, after `step`.
      step: the last complete one.

    Returns:
      The last finite step, -1 if there was none; None if a task has not been tried since, or if only one runs.
    """
    bad = {task: record.consecutive_non_finite for task, record in health.items()}
    active, tried = schedule.active(step, step + 1), set[str]()
    while step >= 0 and bad.get(task := schedule.task(step), 0) > 0:
        bad[task] -= 1
        tried.add(task)
        step -= 1
    return step if len(active) > 1 and active <= tried else None


def quarantine(schedule: Schedule, tasks: Collection[str], start: int, now: int) -> Schedule | None:
    """Return the schedule with `tasks` at weight 0 from step `start` on; None where no task would be left there.

    A later segment that would have no task left falls away: the shares before it stay in force.

    Args:
      schedule: its later segments keep their starts and rules.
      tasks: those to exclude.
      start: the first step of the new segment.
      now: the first step not yet run.
    """
    segments = {start: schedule.segment(start)}
    segments |= {s.start: s for s in schedule.segments if s.start > start}
    for at, segment in segments.items():
        weights = {task: 0 if task in tasks else w for task, w in segment.weights.items()}
        if any(weights.values()):
            schedule = schedule.append(at, weights, rule=segment.rule, seed=segment.seed, now=now)
        elif at == start:
            return None
    return schedule
