"""Which task runs at which step: a pure function of integers.

A schedule is a list of segments. A segment starts at a step, repeats periods made by a rule from
integer weights, and records how often each task ran before it, so that every question (which task
runs at step s, for the how manieth time, how often did each run) costs the same at step 10**9 as
at step 0. The segments are all there is to save. Everything is keyed by the task's name.
"""

from __future__ import annotations

import bisect
import functools
import heapq
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmjax.data.order import fold, stream
from mmjax.errors import UserError, nearest

MAX_PERIOD = 1_000_000  # steps; a table of this many is built in seconds and held in megabytes
BUDGET = "budget"  # a rule of configs only: it becomes `shares` when step times are known
_PHASE_KEYS = (
    "start",
    "weights",
    "rule",
    "tasks",
    "rules",
    "learning_rate",
)  # the last three: mmjax.settings


# Rules: how often each task runs in a period, and in what order. A rule sees the weights above
# zero, in the order of the config, and names a task by its place among them.


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
def _period(rule: str, weights: tuple[int, ...], seed: int, first: int) -> Period:
    order = np.array(RULES[rule].order(weights, seed, first), dtype=np.int32)
    ends = np.cumsum(np.bincount(order, minlength=len(weights)))
    return Period(order, np.split(np.argsort(order, kind="stable"), ends[:-1]))


def turns(shares: tuple[int, ...]) -> Period:
    """A period of the rule `shares`."""
    return _period("shares", shares, 0, 0)


# Segments and schedules.


@dataclass(frozen=True, eq=False)
class Segment:
    """A stretch of the schedule under one rule.

    Attributes:
      start: its first step.
      rule: a name in `RULES`.
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
        _check_rule(self.rule)
        object.__setattr__(self, "start", _integer(self.start, "A schedule's start"))
        object.__setattr__(self, "seed", _integer(self.seed, "The schedule's seed", low=None))
        object.__setattr__(self, "weights", _check_weights(self.rule, self.weights))
        names = list(dict.fromkeys([*self.base, *self.weights]))
        base = {t: _integer(self.base.get(t, 0), f"Task '{t}': base visits") for t in names}
        object.__setattr__(self, "base", base)
        if sum(base.values()) != self.start:
            raise UserError(
                f"The schedule segment at step {self.start} is damaged: the visits before it "
                f"({base}) do not sum to its start."
            )

    def to_json(self) -> dict[str, Any]:
        """Plain lists and dicts. Weights are pairs, for their order matters."""
        return {
            "start": self.start,
            "rule": self.rule,
            "weights": [[task, weight] for task, weight in self.weights.items()],
            "base": dict(self.base),
            "seed": self.seed,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Segment:
        """The inverse of `to_json`."""
        return cls(**{**data, "weights": dict(data["weights"]), "base": dict(data["base"])})

    def _key(self) -> tuple[Any, ...]:
        weights = tuple(self.weights.items())
        return self.start, self.rule, weights, tuple(sorted(self.base.items())), self.seed

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Segment) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    @functools.cached_property
    def _running(self) -> dict[str, int]:
        return {task: weight for task, weight in self.weights.items() if weight}

    @functools.cached_property
    def _tasks(self) -> tuple[str, ...]:
        return tuple(self._running)

    @functools.cached_property
    def _counts(self) -> list[int]:
        return RULES[self.rule].counts(tuple(self._running.values()))

    @functools.cached_property
    def _length(self) -> int:
        return sum(self._counts)

    def _at(self, step: int) -> tuple[Period, int, int]:
        """The period that holds `step`, how many whole ones came before, the place in it."""
        turn, offset = divmod(step - self.start, self._length)
        first, seed = (step - offset, self.seed) if RULES[self.rule].varies else (0, 0)
        period = self._last.get(first)
        if period is None:
            period = _period(self.rule, tuple(self._running.values()), seed, first)
            self._last.clear()
            self._last[first] = period
        return period, turn, offset

    @functools.cached_property
    def _last(self) -> dict[int, Period]:
        """The last period asked for, by its first step; to look it up by weights takes them all."""
        return {}

    def task(self, step: int) -> str:
        """The task that runs at `step`."""
        period, _, offset = self._at(step)
        return self._tasks[period.order[offset]]

    def visit(self, step: int) -> int:
        """How often the task that runs at `step` ran before it."""
        period, turn, offset = self._at(step)
        i = int(period.order[offset])
        return self.base[self._tasks[i]] + turn * self._counts[i] + period.visits(i, offset)

    def visits(self, step: int) -> dict[str, int]:
        """How often each task runs in steps [0, step)."""
        period, turn, offset = self._at(step)
        visits = dict(self.base)
        for i, (task, count) in enumerate(zip(self._tasks, self._counts, strict=True)):
            visits[task] += turn * count + period.visits(i, offset)
        return visits

    def strip(self, start: int, stop: int) -> list[str]:
        """The tasks of steps [start, stop)."""
        tasks: list[str] = []
        while start < stop:
            period, _, offset = self._at(start)
            part = period.order[offset : offset + stop - start]
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
        """The segment that `step` falls in."""
        if step < 0:
            raise ValueError(f"There is no step {step}.")
        return self.segments[bisect.bisect_right(self._starts, step) - 1]

    def task(self, step: int) -> str:
        """The task that runs at `step`."""
        return self.segment(step).task(int(step))

    def visit(self, step: int) -> int:
        """How often the task that runs at `step` ran before it, from step 0 on."""
        return self.segment(step).visit(int(step))

    def visits(self, step: int) -> dict[str, int]:
        """How often each task runs in steps [0, step); all of `tasks`, in that order."""
        visits = self.segment(step).visits(int(step))
        return {task: visits.get(task, 0) for task in self.tasks}

    def between(self, start: int, stop: int) -> dict[str, int]:
        """How often each task runs in steps [start, stop)."""
        if stop < start:
            raise ValueError(f"There are no steps {start} to {stop}.")
        before, after = self.visits(start), self.visits(stop)
        return {task: after[task] - before[task] for task in self.tasks}

    def running(self, start: int, stop: int) -> set[str]:
        """The tasks with a weight above zero in any segment that has steps in [start, stop)."""
        ends = [segment.start for segment in self.segments[1:]] + [stop]
        return {
            task
            for segment, end in zip(self.segments, ends, strict=True)
            if segment.start < stop and end > start
            for task, weight in segment.weights.items()
            if weight
        }

    def shares(self, start: int, stop: int) -> dict[str, float]:
        """The realised share of steps [start, stop) of each task; they sum to 1."""
        if stop <= start:
            raise ValueError(f"There are no steps {start} to {stop}.")
        return {task: n / (stop - start) for task, n in self.between(start, stop).items()}

    def strip(self, start: int, stop: int) -> list[str]:
        """The tasks of steps [start, stop), in order."""
        tasks: list[str] = []
        while start < stop:
            segment = self.segment(start)
            later = self._starts[bisect.bisect_right(self._starts, start) :]
            end = min([stop, *later[:1]])
            tasks += segment.strip(int(start), int(end))
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
        """This schedule up to `start`, and from there on a new segment.

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
        start = _integer(start, "A schedule's start")
        if start < now:
            raise UserError(
                f"A schedule cannot change from step {start} on: steps before {now} have run. "
                f"Start the change at step {now} or later."
            )
        kept = tuple(segment for segment in self.segments if segment.start < start)
        last = kept[-1] if kept else self.segments[0]
        base = Schedule(kept).visits(start) if kept else {}
        rule = last.rule if rule is None else rule
        seed = last.seed if seed is None else seed
        return Schedule((*kept, Segment(start, rule, dict(weights), base, seed)))

    def replace(
        self,
        start: int,
        weights: Mapping[str, int],
        *,
        rule: str | None = None,
        now: int = 0,
        keep: Collection[int] | None = None,
    ) -> Schedule:
        """As `append`, but segments that begin after `start` stay: those that begin in `keep`, all if None."""
        made = self.append(start, weights, rule=rule, now=now)
        for later in self.segments:
            if later.start > start and (keep is None or later.start in keep):
                made = made.append(later.start, later.weights, rule=later.rule, seed=later.seed)
        return made

    def to_json(self) -> list[dict[str, Any]]:
        """Plain lists and dicts: all that a checkpoint needs to hold."""
        return [segment.to_json() for segment in self.segments]

    @classmethod
    def from_json(cls, data: Iterable[Mapping[str, Any]]) -> Schedule:
        """The inverse of `to_json`."""
        return cls(tuple(Segment.from_json(segment) for segment in data))


# From a config.


@dataclass(frozen=True)
class Stretch:
    """A stretch as a config describes it; `budget` among the rules.

    Attributes:
      start: its first step.
      rule: a name in `RULES`, or `budget`.
      weights: per task, its share of the steps, its interval, or its share of the time.
    """

    start: int
    rule: str
    weights: dict[str, int]


def stretches(
    rule: str, weights: Mapping[str, int], phases: Sequence[Mapping[str, Any]] = ()
) -> list[Stretch]:
    """What a config asks for, from step 0 on; the arguments and errors are those of `from_config`."""
    found = [_stretch(0, rule, weights)]
    for number, phase in enumerate(phases, 1):
        for key in phase:
            if key not in _PHASE_KEYS:
                raise UserError(f"Phase {number}: no key '{key}'.{nearest(key, _PHASE_KEYS)}")
        if "start" not in phase:
            raise UserError(f"Phase {number} has no 'start'. Give it the step at which it begins.")
        start = _integer(phase["start"], f"Phase {number}: start")
        if start <= found[-1].start:
            raise UserError(
                f"Phase {number} starts at step {start}, not after the stretch before it "
                f"(step {found[-1].start}). Put phases in ascending order, above 0."
            )
        before = found[-1]
        found.append(
            _stretch(start, phase.get("rule") or before.rule, phase.get("weights", before.weights))
        )
    return found


def stretch_at(planned: Sequence[Stretch], step: int) -> Stretch:
    """The stretch that `step` falls in."""
    return planned[bisect.bisect_right([each.start for each in planned], step) - 1]


def _stretch(start: int, rule: str, weights: Mapping[str, int]) -> Stretch:
    known = (*RULES, BUDGET)
    if rule not in known:
        raise UserError(f"There is no schedule rule '{rule}'.{nearest(str(rule), known)}")
    return Stretch(start, rule, _check_weights(rule, weights))


def from_config(
    rule: str,
    weights: Mapping[str, int],
    seed: int,
    phases: Sequence[Mapping[str, Any]] = (),
    seconds: Callable[[int], Mapping[str, float]] = lambda start: {},
) -> Schedule:
    """The schedule that a config describes.

    Args:
      rule: a name in `RULES`, or `budget`.
      weights: task name -> share of the steps (`shares`, `random`), interval in passes
        (`interval`), or share of the time (`budget`), in the order in which tasks take turns.
        0: the task does not run.
      seed: for `random`.
      phases: later stretches, each `{"start": step}` with `"weights"` and `"rule"` where they differ
        from those before; by ascending start.
      seconds: start of a stretch -> seconds of a step of each task then, or anything in proportion
        to them; for `budget`.

    Raises:
      UserError: an unknown rule or key; a weight that is not an integer from 0 up; no task with a
        weight above 0; a period above `MAX_PERIOD`; phases out of order; `budget` and a task
        without a step time.
    """
    segments: tuple[Segment, ...] = ()
    for each in stretches(rule, weights, phases):
        base = Schedule(segments).visits(each.start) if segments else {}
        segments = (*segments, _frozen(each, seconds, base, seed))
    return Schedule(segments)


def _frozen(
    each: Stretch,
    seconds: Callable[[int], Mapping[str, float]],
    base: Mapping[str, int],
    seed: int,
) -> Segment:
    """A stretch in integers."""
    if each.rule != BUDGET:
        return Segment(each.start, each.rule, each.weights, dict(base), seed)
    shares = budget_weights(seconds(each.start), each.weights)
    return Segment(each.start, "shares", shares, dict(base), seed)


def _integer(value: Any, what: str, *, low: int | None = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UserError(f"{what} must be an integer; found {value!r}.")
    if low is not None and value < low:
        raise UserError(f"{what} must be {low} or more; found {value}.")
    return int(value)


def _check_rule(rule: str) -> None:
    if rule not in RULES:
        raise UserError(f"There is no schedule rule '{rule}'.{nearest(str(rule), RULES)}")


def _check_weights(rule: str, weights: Mapping[str, int]) -> dict[str, int]:
    word = "interval" if rule == "interval" else "share"
    checked = {t: _integer(w, f"Task '{t}': its {word}") for t, w in weights.items()}
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


def budget_weights(
    seconds: Mapping[str, float], fractions: Mapping[str, float], total: int = 1000
) -> dict[str, int]:
    """Integer shares of steps that give each task its share of the time.

    A task wanted for the fraction f of the time, at s seconds a step, gets steps in proportion to
    f / s; these are rounded by largest remainder, and no wanted task gets less than 1. Computed in
    exact fractions of the inputs, so every machine finds the same integers.

    Args:
      seconds: seconds per step, per task.
      fractions: wanted share of the time per task; they need not sum to 1. 0: does not run.
      total: the sum of the shares.

    Raises:
      UserError: a number that is negative or not finite; a wanted task without a step time above
        0; nothing wanted; more wanted tasks than `total`.
    """
    rates = {}
    for task, fraction in fractions.items():
        if not (math.isfinite(fraction) and fraction >= 0):
            raise UserError(
                f"Task '{task}': its share of time must be 0 or more; {fraction} is not."
            )
        rates[task] = Fraction(fraction) / _seconds(seconds, task) if fraction else Fraction(0)
    wanted = {task: rate for task, rate in rates.items() if rate}
    if not wanted:
        raise UserError("No task has a share of the time above 0. Give at least one.")
    if len(wanted) > total:
        raise UserError(f"{len(wanted)} tasks cannot share {total} steps. Raise the total.")
    return dict.fromkeys(rates, 0) | _apportion(wanted, total)


def _seconds(seconds: Mapping[str, float], task: str) -> Fraction:
    value = seconds.get(task)
    if value is None:
        raise UserError(
            f"Task '{task}' has no step time.{nearest(task, seconds)} Measure it first."
        )
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"Task '{task}': its step time must be above 0 seconds; {value} is not.")
    return Fraction(value)


def _apportion(rates: Mapping[str, Fraction], total: int) -> dict[str, int]:
    """Integers of at least 1 that sum to `total`, near proportion to `rates`."""
    quota = {task: rate * total / sum(rates.values()) for task, rate in rates.items()}
    small = [task for task in quota if quota[task] < 1]
    if small:
        rest = {task: rate for task, rate in rates.items() if task not in small}
        return dict.fromkeys(rates, 1) | _apportion(rest, total - len(small))
    shares = {task: math.floor(q) for task, q in quota.items()}
    by_remainder = sorted(quota, key=lambda task: shares[task] - quota[task])
    for task in by_remainder[: total - sum(shares.values())]:
        shares[task] += 1
    return shares
