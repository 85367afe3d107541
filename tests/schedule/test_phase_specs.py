"""Phases of a config, and shares under a budget of time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedules import NAMES, weights

from mmjax.core.errors import UserError
from mmjax.schedule.config import PhaseConfig
from mmjax.schedule.phase_specs import (
    BUDGET,
    budget_weights,
    from_config,
    phase_spec_at,
    phase_specs,
)
from mmjax.schedule.schedule import Segment


def test_budget_of_time_by_hand():
    """Half the time each, at 1 s and 4 s a step: four steps to one."""
    found = budget_weights({"fast": 1.0, "slow": 4.0}, {"fast": 0.5, "slow": 0.5, "off": 0}, 10)
    assert found == {"fast": 8, "slow": 2, "off": 0}
    assert list(found) == ["fast", "slow", "off"]


def test_budget_by_largest_remainder():
    """Quotas of 10 are 4.7, 3.2 and 2.1: the spare step goes to the first."""
    found = budget_weights(dict.fromkeys("abc", 1.0), {"a": 47, "b": 32, "c": 21}, 10)
    assert found == {"a": 5, "b": 3, "c": 2}


def test_budget_gives_every_wanted_task_a_step():
    found = budget_weights({"a": 1, "b": 1000, "c": 1000}, {"a": 0.8, "b": 0.1, "c": 0.1}, 100)
    assert found == {"a": 98, "b": 1, "c": 1}


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.01, 50), st.floats(0.001, 1)), min_size=1, max_size=8),
    st.integers(8, 2000),
)
def test_budget(tasks, total):
    seconds = {NAMES[i]: s for i, (s, _) in enumerate(tasks)}
    wanted = {NAMES[i]: f for i, (_, f) in enumerate(tasks)}
    found = budget_weights(seconds, wanted, total)
    assert sum(found.values()) == total
    assert min(found.values()) >= 1
    rate = {task: wanted[task] / seconds[task] for task in wanted}
    quota = {task: total * rate[task] / sum(rate.values()) for task in rate}
    if min(quota.values()) >= 1:
        assert all(abs(found[task] - quota[task]) < 1 + 1e-6 for task in found)
    realised = from_config("shares", found, 0).between(0, total)
    assert realised == found


@pytest.mark.parametrize(
    ("seconds", "fractions", "message"),
    [
        ({"a": 1}, {"a": 1, "b": 1}, "'b' has no step time"),
        ({"a": 1, "b": 0}, {"a": 1, "b": 1}, "'b': its step time must be above 0"),
        ({"a": 1, "b": float("nan")}, {"a": 1, "b": 1}, "'b': its step time must be above 0"),
        ({"a": 1, "b": 1}, {"a": 1, "b": -1}, "'b': its share of time must be 0 or more"),
        ({"a": 1, "b": 1}, {"a": 1, "b": float("inf")}, "'b': its share of time"),
        ({"a": 1, "b": 1}, {"a": 0, "b": 0}, "No task has a share"),
        ({}, {}, "No task has a share"),
        (dict.fromkeys("abcdef", 1), dict.fromkeys("abcdef", 1), "6 tasks cannot share 5 steps"),
    ],
)
def test_bad_budgets(seconds, fractions, message):
    with pytest.raises(UserError, match=message):
        budget_weights(seconds, fractions, 5)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_a_budget_becomes_shares_of_steps(data):
    """Its tasks' times over a period are as its weights, as near as integers come."""
    wanted = data.draw(weights("shares"))
    seconds = {task: data.draw(st.floats(0.1, 10)) for task in wanted}
    start, plan = data.draw(st.integers(1, 99)), data.draw(weights("random"))
    phase = PhaseConfig(start, wanted, rule=BUDGET)
    schedule = from_config("random", plan, 0, [phase], lambda _: seconds)
    [_, segment] = schedule.segments
    assert segment == Segment(
        start, "shares", budget_weights(seconds, wanted), schedule.visits(start)
    )
    counts = schedule.between(start, start + 1000)
    times = {task: counts[task] * seconds[task] for task in wanted}
    for task in wanted:
        asked = wanted[task] / sum(wanted.values())
        rounding = 2 * max(seconds.values()) * len(wanted)  # each task a visit or two
        assert abs(times[task] - asked * sum(times.values())) <= rounding
    assert schedule.sequence(0, start) == from_config("random", plan, 0).sequence(0, start)


def test_stretches_keep_what_the_config_says():
    planned = phase_specs(BUDGET, {"a": 1}, [PhaseConfig(5, {"a": 2})])
    assert [(s.start, s.rule, s.weights) for s in planned] == [
        (0, BUDGET, {"a": 1}), (5, BUDGET, {"a": 2}),
    ]  # fmt: skip
    assert [phase_spec_at(planned, step).start for step in (0, 4, 5, 10**9)] == [0, 0, 5, 5]


def test_a_budget_without_step_times():
    with pytest.raises(UserError, match="'a' has no step time"):
        from_config(BUDGET, {"a": 1}, 0)
