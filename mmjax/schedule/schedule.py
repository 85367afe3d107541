"""The schedule of a run: a pure function of integers.

A schedule is a list of segments. A segment starts at a step, repeats cycles made by a rule from
integer weights, and records how often each task ran before it, so that every query (which task
runs at step s, how many times it has run, how often each task has run) takes constant time.
The segments are all there is to save. Everything is keyed by the task's name.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mmjax.core.errors import UserError
from mmjax.schedule.rules.base import (
    Cycle,
    Rule,
    check_weights,
    exact_integer,
    is_known,
    make_cycle,
    rule_of,
)


@dataclass(frozen=True, eq=False)
class Segment:
    """A part of the schedule under one rule.

    Attributes:
      start: its first step.
      rule: the name of a rule (`mmjax/schedule/rules/`).
      weights: per task, in the order of the config, its share (or interval); 0 means never.
      base: visits of every task in the steps before `start`, also of tasks not in `weights`.
      seed: only `random` uses it.
    """

    start: int
    rule: str
    weights: dict[str, int]
    base: dict[str, int]
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.rule, str):
            raise UserError(f"A schedule's rule is {self.rule!r}; it must be a name.")
        # A checkpoint can be looked at without the folder (`--extra`) that holds its rule.
        rule = rule_of(self.rule) if is_known(self.rule) else None
        object.__setattr__(self, "start", exact_integer(self.start, "A schedule's start"))
        object.__setattr__(self, "seed", exact_integer(self.seed, "The schedule's seed", low=None))
        object.__setattr__(self, "weights", check_weights(rule, self.weights, self.rule))
        names = list(dict.fromkeys([*self.base, *self.weights]))
        base = {t: exact_integer(self.base.get(t, 0), f"Task '{t}': base visits") for t in names}
        object.__setattr__(self, "base", base)
        if sum(base.values()) != self.start:
            raise UserError(
                f"The schedule segment at step {self.start} is damaged: the visits before it "
                f"({base}) do not sum to its start."
            )

    def to_json(self) -> dict[str, Any]:
        """Convert to plain lists and dicts. Weights are pairs, for their order matters."""
        return {
            "start": self.start,
            "rule": self.rule,
            "weights": [[task, weight] for task, weight in self.weights.items()],
            "base": dict(self.base),
            "seed": self.seed,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Segment:
        """Return the inverse of `to_json`."""
        return cls(**{**data, "weights": dict(data["weights"]), "base": dict(data["base"])})

    def _key(self) -> tuple[Any, ...]:
        weights = tuple(self.weights.items())
        return self.start, self.rule, weights, tuple(sorted(self.base.items())), self.seed

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Segment) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    @functools.cached_property
    def _active(self) -> dict[str, int]:
        return {task: weight for task, weight in self.weights.items() if weight}

    @functools.cached_property
    def _tasks(self) -> tuple[str, ...]:
        return tuple(self._active)

    @functools.cached_property
    def _counts(self) -> list[int]:
        return rule_of(self.rule).counts(tuple(self._active.values()))

    @functools.cached_property
    def _length(self) -> int:
        return sum(self._counts)

    def _at(self, step: int) -> tuple[Cycle, int, int]:
        """Return the cycle that holds `step`, how many whole ones came before, the place in it."""
        turn, offset = divmod(step - self.start, self._length)
        first, seed = (step - offset, self.seed) if rule_of(self.rule).varies else (0, 0)
        cycle = self._last.get(first)
        if cycle is None:
            cycle = make_cycle(self.rule, tuple(self._active.values()), seed, first)
            self._last.clear()
            self._last[first] = cycle
        return cycle, turn, offset

    @functools.cached_property
    def _last(self) -> dict[int, Cycle]:
        """The last cycle asked for, by its first step; to look it up by weights takes them all."""
        return {}

    def task(self, step: int) -> str:
        """Return the task that runs at `step`."""
        cycle, _, offset = self._at(step)
        return self._tasks[cycle.order[offset]]

    def visit(self, step: int) -> int:
        """Return how often the task that runs at `step` ran before it."""
        cycle, turn, offset = self._at(step)
        i = int(cycle.order[offset])
        return self.base[self._tasks[i]] + turn * self._counts[i] + cycle.visits(i, offset)

    def visits(self, step: int) -> dict[str, int]:
        """Return how often each task runs in steps [0, step)."""
        cycle, turn, offset = self._at(step)
        visits = dict(self.base)
        for i, (task, count) in enumerate(zip(self._tasks, self._counts, strict=True)):
            visits[task] += turn * count + cycle.visits(i, offset)
        return visits

    def sequence(self, start: int, stop: int) -> list[str]:
        """Return the tasks of steps [start, stop)."""
        tasks: list[str] = []
        while start < stop:
            cycle, _, offset = self._at(start)
            part = cycle.order[offset : offset + stop - start]
            tasks.extend(self._tasks[i] for i in part.tolist())
            start += len(part)
        return tasks


@dataclass(frozen=True)
class Schedule:
    """Segments in order, the first at step 0. Steps are integers from 0, without end."""

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", tuple(self.segments))
        starts = self._starts
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise UserError(f"Schedule segments must start at 0 and then later; found {starts}.")

    @functools.cached_property
    def _starts(self) -> list[int]:
        return [segment.start for segment in self.segments]

    @functools.cached_property
    def tasks(self) -> tuple[str, ...]:
        """The names of all tasks of all segments, also of those with weight 0."""
        names = (name for s in self.segments for name in (*s.weights, *s.base))
        return tuple(dict.fromkeys(names))

    def segment(self, step: int) -> Segment:
        """Return the segment that `step` falls in."""
        if step < 0:
            raise ValueError(f"There is no step {step}.")
        return self.segments[bisect.bisect_right(self._starts, step) - 1]

    def task(self, step: int) -> str:
        """Return the task that runs at `step`."""
        return self.segment(step).task(int(step))

    def visit(self, step: int) -> int:
        """Return how often the task that runs at `step` ran before it, from step 0 on."""
        return self.segment(step).visit(int(step))

    def visits(self, step: int) -> dict[str, int]:
        """Return how often each task runs in steps [0, step); all of `tasks`, in that order."""
        visits = self.segment(step).visits(int(step))
        return {task: visits.get(task, 0) for task in self.tasks}

    def between(self, start: int, stop: int) -> dict[str, int]:
        """Return how often each task runs in steps [start, stop)."""
        if stop < start:
            raise ValueError(f"There are no steps {start} to {stop}.")
        before, after = self.visits(start), self.visits(stop)
        return {task: after[task] - before[task] for task in self.tasks}

    def active(self, start: int, stop: int) -> set[str]:
        """Return the tasks with a weight above zero in any segment that has steps in [start, stop)."""
        ends = [segment.start for segment in self.segments[1:]] + [stop]
        return {
            task
            for segment, end in zip(self.segments, ends, strict=True)
            if segment.start < stop and end > start
            for task, weight in segment.weights.items()
            if weight
        }

    def realised_shares(self, start: int, stop: int) -> dict[str, float]:
        """Return the realised share of steps [start, stop) of each task; they sum to 1."""
        if stop <= start:
            raise ValueError(f"There are no steps {start} to {stop}.")
        return {task: n / (stop - start) for task, n in self.between(start, stop).items()}

    def sequence(self, start: int, stop: int) -> list[str]:
        """Return the tasks of steps [start, stop), in order."""
        tasks: list[str] = []
        while start < stop:
            segment = self.segment(start)
            later = self._starts[bisect.bisect_right(self._starts, start) :]
            end = min([stop, *later[:1]])
            tasks += segment.sequence(int(start), int(end))
            start = end
        return tasks

    def append(
        self,
        start: int,
        weights: Mapping[str, int],
        *,
        rule: str | None = None,
        seed: int | None = None,
        now: int = 0,
    ) -> Schedule:
        """Return this schedule up to `start`, and from there on a new segment.

        Steps before `start` keep their tasks. Segments that would have begun at `start` or later
        are replaced.

        Args:
          start: the first step of the new segment; at 0 it replaces everything.
          weights: task name -> share (or interval), as in `Segment`.
          rule: the rule in force just before `start`, if None.
          seed: the seed in force just before `start`, if None.
          now: the first step not yet run. A start before it is refused: what ran has run.

        Raises:
          UserError: a start before `now`; a bad rule or weight.
        """
        start = exact_integer(start, "A schedule's start")
        if start < now:
            raise UserError(
                f"A schedule cannot change from step {start} on: steps before {now} have run. "
                f"Start the change at step {now} or later."
            )
        before = tuple(segment for segment in self.segments if segment.start < start)
        last = before[-1] if before else self.segments[0]
        base = Schedule(before).visits(start) if before else {}
        rule = last.rule if rule is None else rule
        seed = last.seed if seed is None else seed
        return Schedule((*before, Segment(start, rule, dict(weights), base, seed)))

    def replace(
        self,
        start: int,
        weights: Mapping[str, int],
        *,
        rule: str | None = None,
        now: int = 0,
        keep: Collection[int] | None = None,
    ) -> Schedule:
        """Return the schedule with a segment appended as `append` does, but keep segments that begin after `start`:
        those that begin in `keep`, all if None.
        """
        result = self.append(start, weights, rule=rule, now=now)
        for later in self.segments:
            if later.start > start and (keep is None or later.start in keep):
                result = result.append(later.start, later.weights, rule=later.rule, seed=later.seed)
        return result

    def to_json(self) -> list[dict[str, Any]]:
        """Convert to plain lists and dicts: all that a checkpoint needs to hold."""
        return [segment.to_json() for segment in self.segments]

    @classmethod
    def from_json(cls, data: Iterable[Mapping[str, Any]]) -> Schedule:
        """Return the inverse of `to_json`."""
        return cls(tuple(Segment.from_json(segment) for segment in data))


# From a config.


def numbers_of(schedule: Schedule) -> str:
    """Return what the numbers of a schedule's segments are, for the head of a table: `weights`, `intervals` or both."""
    rules = [segment.rule for segment in schedule.segments]
    keys = [rule_of(rule).key if is_known(rule) else Rule.key for rule in rules]
    return " or ".join(dict.fromkeys(f"{key}s" for key in keys))
