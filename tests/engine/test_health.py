"""Check when a task is not well, by a statement of its own; and schedules without it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.engine.health import Health, HealthLimits, broken_at, quarantine
from mmjax.schedule.config import PhaseConfig
from mmjax.schedule.phase_specs import from_config
from mmjax.schedule.schedule import Schedule, Segment

LOSSES = st.lists(st.one_of(st.floats(0.125, 100.0, width=32), st.none()), max_size=40)
BOUNDS = st.builds(
    HealthLimits,
    non_finite=st.integers(1, 5),
    divergence=st.sampled_from([0.0, 1.5, 3.0, 10.0]),
    visits=st.integers(1, 6),
)


def seen(losses: list[float | None], bounds: HealthLimits) -> Health:
    """Return the health after losses; None is a step whose loss or gradient was not finite."""
    health = Health()
    for loss in losses:
        health = health.after(float("nan") if loss is None else loss, loss is not None, bounds)
    return health


@given(losses=LOSSES, bounds=BOUNDS)
def test_it_is_what_the_whole_history_says(
    losses: list[float | None], bounds: HealthLimits
) -> None:
    health = seen(losses, bounds)
    finite = np.array([x for x in losses if x is not None])
    bad = next((i for i, x in enumerate(reversed(losses)) if x is not None), len(losses))
    assert health.consecutive_non_finite == bad
    n, is_long = bounds.visits, len(finite) >= bounds.visits
    limit = bounds.divergence * np.median(finite[:n]) if is_long and bounds.divergence else np.inf
    assert health.has_diverged(bounds) == bool(is_long and np.median(finite[-n:]) > limit)
    assert health.may_diverge(bounds) == bool((finite[-n:] > limit).any())
    # A divergence shows signs first.
    assert health.may_diverge(bounds) or not health.has_diverged(bounds)


@given(losses=LOSSES, bounds=BOUNDS, cut=st.integers(0, 40))
def test_it_goes_on_from_what_a_checkpoint_holds(
    losses: list[float | None], bounds: HealthLimits, cut: int
) -> None:
    health = Health.from_json(json.loads(json.dumps(seen(losses[:cut], bounds).to_json())))
    for loss in losses[cut:]:
        health = health.after(float("nan") if loss is None else loss, loss is not None, bounds)
    assert health == seen(losses, bounds)


def test_losses_below_zero_have_no_ratio() -> None:
    bounds = HealthLimits(3, 2.0, 2)
    assert not seen([-1.0, -1.0, 50.0, 50.0], bounds).has_diverged(bounds)
    assert seen([1.0, 1.0, 50.0, 50.0], bounds).has_diverged(bounds)


WEIGHTS = st.dictionaries(st.sampled_from("abcd"), st.integers(0, 4), min_size=1).filter(
    lambda w: any(w.values())
)


@given(
    rule=st.sampled_from(["shares", "random", "interval"]),
    weights=WEIGHTS,
    later=st.lists(WEIGHTS, max_size=2),
    out=st.sets(st.sampled_from("abcd"), min_size=1),
    start=st.integers(0, 60),
)
@settings(deadline=None)
def test_a_schedule_without_some_tasks(
    rule: str, weights: dict[str, int], later: list[dict[str, int]], out: set[str], start: int
) -> None:
    phases = [PhaseConfig(20 * (i + 1), w) for i, w in enumerate(later)]
    before = from_config(rule, weights, 3, phases)
    after = quarantine(before, out, start, start)
    if not _running(before.segment(start)) - out:
        assert after is None
        return
    assert after is not None
    sequence, rest = before.sequence(0, start), after.sequence(start, start + 60)
    assert after.sequence(0, start) == sequence and not set(rest) & out
    # A later phase of which no task is left is passed over: the shares before it stay.
    assert [s.start for s in after.segments if s.start > start] == [
        s.start for s in before.segments if s.start > start and _running(s) - out
    ]
    # Integers, and nothing else, decide it.
    assert Schedule.from_json(json.loads(json.dumps(after.to_json()))) == after
    assert after.visits(start + 60) == {
        t: (sequence + rest).count(t) for t in after.visits(start + 60)
    }


def _running(segment: Segment) -> set[str]:
    return {task for task, weight in segment.weights.items() if weight}


def test_a_phase_whose_only_task_is_left_out_is_passed_over() -> None:
    phases = [PhaseConfig(10, {"c": 1}), PhaseConfig(20, {"b": 1, "c": 1})]
    after = quarantine(from_config("shares", {"a": 1, "b": 1, "c": 1}, 0, phases), ["c"], 4, 4)
    assert after is not None
    assert set(after.sequence(4, 20)) == {"a", "b"} and set(after.sequence(20, 30)) == {"b"}


def test_a_segment_of_one_task_cannot_lose_it() -> None:
    schedule = Schedule((Segment(0, "shares", {"a": 1, "b": 0}, {}),))
    assert quarantine(schedule, ["a"], 5, 5) is None
    assert quarantine(schedule, ["b"], 5, 5) is not None
    with pytest.raises(Exception, match="steps before 5 have run"):
        quarantine(schedule, ["b"], 4, 5)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.booleans(), min_size=1, max_size=40), st.sampled_from([(1, 1), (2, 1), (5, 2, 1)])
)
def test_parameters_are_broken_where_all_tasks_are_non_finite_since(
    finite: list[bool], weights: tuple[int, ...]
) -> None:
    """By the steps themselves: after the last finite one, every task has been tried."""
    shares = {name: weight for name, weight in zip("abc", weights, strict=False)}
    schedule = Schedule((Segment(0, "shares", shares, {}),))
    bounds, health = HealthLimits(10, 0.0, 3), dict[str, Health]()
    for step, is_finite in enumerate(finite):
        task = schedule.task(step)
        loss = 1.0 if is_finite else float("nan")
        health[task] = health.get(task, Health()).after(loss, is_finite, bounds)
    last = max((step for step, is_finite in enumerate(finite) if is_finite), default=-1)
    tried = {schedule.task(step) for step in range(last + 1, len(finite))}
    expected = last if tried == set(shares) else None
    assert broken_at(schedule, health, len(finite) - 1) == expected


def test_one_task_alone_is_at_fault_itself() -> None:
    schedule = Schedule((Segment(0, "shares", {"a": 1, "b": 0}, {}),))
    assert broken_at(schedule, {"a": Health(consecutive_non_finite=3)}, 2) is None
