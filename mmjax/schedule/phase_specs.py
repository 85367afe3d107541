"""Phases of a schedule as a config describes them, and their weights under a budget of time."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from mmjax.core.errors import UserError, nearest
from mmjax.schedule.config import PhaseConfig
from mmjax.schedule.rules.base import Rule, check_weights, names, rule_of
from mmjax.schedule.schedule import Schedule, Segment

BUDGET = "budget"  # a rule of configs only: it becomes `shares` when step times are known


@dataclass(frozen=True)
class PhaseSpec:
    """A phase as a config describes it; `budget` is among its rules.

    Attributes:
      start: its first step.
      rule: the name of a rule (`mmjax/schedule/rules/`), or `budget`.
      weights: per task, its share of the steps, its interval, or its share of the time.
    """

    start: int
    rule: str
    weights: dict[str, int]


def phase_specs(
    rule: str,
    weights: Mapping[str, int],
    phases: Sequence[PhaseConfig] = (),
    intervals: Mapping[str, int] | None = None,
) -> list[PhaseSpec]:
    """Return what a config asks for, from step 0 on; the arguments and errors are those of `from_config`."""
    numbers = {"weight": weights, "interval": weights if intervals is None else intervals}
    planned = [_phase_spec(0, rule, numbers, "schedule")]
    for index, phase in enumerate(phases):
        where, before = f"schedule.phases[{index}]", planned[-1]
        if phase.start <= before.start:
            raise UserError(
                f"{where}.start is {phase.start}, not after the phase before it "
                f"(step {before.start}). Put phases in ascending order, above 0."
            )
        changed = {"weight": phase.weights, "interval": phase.intervals}
        numbers |= {key: value for key, value in changed.items() if value is not None}
        planned.append(_phase_spec(phase.start, phase.rule or before.rule, numbers, where))
    return planned


def key_of(rule: str) -> str:
    """Return the key of a task that a rule reads: `weight` or `interval`."""
    return Rule.key if rule == BUDGET else rule_of(rule).key


def phase_spec_at(planned: Sequence[PhaseSpec], step: int) -> PhaseSpec:
    """Return the phase that `step` falls in."""
    return planned[bisect.bisect_right([spec.start for spec in planned], step) - 1]


def _phase_spec(
    start: int, rule: str, numbers: Mapping[str, Mapping[str, int]], where: str
) -> PhaseSpec:
    known = (*names(), BUDGET)
    if rule not in known:
        raise UserError(f"{where}.rule: unknown schedule rule '{rule}'.{nearest(str(rule), known)}")
    weights = numbers[key_of(rule)]
    return PhaseSpec(
        start, rule, check_weights(None if rule == BUDGET else rule_of(rule), weights, rule)
    )


def from_config(
    rule: str,
    weights: Mapping[str, int],
    seed: int,
    phases: Sequence[PhaseConfig] = (),
    seconds: Callable[[int], Mapping[str, float]] = lambda start: {},
    intervals: Mapping[str, int] | None = None,
) -> Schedule:
    """Return the schedule that a config describes.

    Args:
      rule: the name of a rule (`mmjax/schedule/rules/`), or `budget`.
      weights: task name -> weight in the steps (`shares`, `random`) or in the time (`budget`), in the order in
        which tasks take turns. 0: the task does not run.
      seed: for `random`.
      phases: later phases, by ascending start.
      seconds: start of a phase -> seconds of a step of each task then, or anything in proportion
        to them; for `budget`.
      intervals: task name -> passes from one visit to the next, for `interval`; `weights` if None.

    Raises:
      UserError: an unknown rule; a weight that is not an integer from 0 up; no task with a
        weight above 0; a cycle above `MAX_CYCLE`; phases out of order; `budget` and a task
        without a step time.
    """
    segments: tuple[Segment, ...] = ()
    for spec in phase_specs(rule, weights, phases, intervals):
        base = Schedule(segments).visits(spec.start) if segments else {}
        segments = (*segments, _frozen(spec, seconds, base, seed))
    return Schedule(segments)


def _frozen(
    spec: PhaseSpec,
    seconds: Callable[[int], Mapping[str, float]],
    base: Mapping[str, int],
    seed: int,
) -> Segment:
    """Return the segment of a phase: its weights in integers."""
    if spec.rule != BUDGET:
        return Segment(spec.start, spec.rule, spec.weights, dict(base), seed)
    shares = budget_weights(seconds(spec.start), spec.weights)
    return Segment(spec.start, "shares", shares, dict(base), seed)


def budget_weights(
    seconds: Mapping[str, float], fractions: Mapping[str, float], total: int = 1000
) -> dict[str, int]:
    """Return integer shares of steps that give each task its share of the time.

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
    positive = {task: rate for task, rate in rates.items() if rate}
    if not positive:
        raise UserError("No task has a share of the time above 0. Give at least one.")
    if len(positive) > total:
        raise UserError(f"{len(positive)} tasks cannot share {total} steps. Raise the total.")
    return dict.fromkeys(rates, 0) | _apportion(positive, total)


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
    """Return integers of at least 1 that sum to `total`, near proportion to `rates`."""
    quota = {task: rate * total / sum(rates.values()) for task, rate in rates.items()}
    small = [task for task in quota if quota[task] < 1]
    if small:
        others = {task: rate for task, rate in rates.items() if task not in small}
        return dict.fromkeys(rates, 1) | _apportion(others, total - len(small))
    shares = {task: math.floor(q) for task, q in quota.items()}
    by_remainder = sorted(quota, key=lambda task: shares[task] - quota[task])
    for task in by_remainder[: total - sum(shares.values())]:
        shares[task] += 1
    return shares
