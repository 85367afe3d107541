"""Check which task runs at which step: counts, access and segments."""

import json
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedules import SEEDS, weights

from mmjax.core.errors import UserError
from mmjax.schedule.config import PhaseConfig
from mmjax.schedule.phase_specs import from_config
from mmjax.schedule.rules.base import names
from mmjax.schedule.schedule import Schedule, Segment, numbers_of

RULES = names()


@st.composite
def schedules(draw):
    """Return one to four segments of any rule, at most 300 steps apart."""
    rule = draw(st.sampled_from(RULES))
    schedule, start = from_config(rule, draw(weights(rule)), draw(SEEDS)), 0
    for _ in range(draw(st.integers(0, 3))):
        rule = draw(st.sampled_from(RULES))
        start += draw(st.integers(1, 300))
        schedule = schedule.append(start, draw(weights(rule)), rule=rule, seed=draw(SEEDS))
    return schedule


@settings(deadline=None, max_examples=100)
@given(schedules())
def test_random_access_equals_walking(schedule):
    stop = schedule.segments[-1].start + 150
    visits = dict.fromkeys(schedule.tasks, 0)
    walked = []
    for step in range(stop):
        assert schedule.visits(step) == visits
        task = schedule.task(step)
        assert schedule.visit(step) == visits[task]
        visits[task] += 1
        walked.append(task)
    assert schedule.visits(stop) == visits
    assert schedule.sequence(0, stop) == walked


@settings(deadline=None, max_examples=50)
@given(schedules(), st.integers(0, 10**12), st.integers(0, 60), st.integers(0, 60))
def test_counts_of_a_range_far_away(schedule, start, first, second):
    """No step is walked to: 10**12 steps would never end."""
    middle, stop = start + first, start + first + second
    order = schedule.sequence(start, stop)
    assert order == schedule.sequence(start, middle) + schedule.sequence(middle, stop)
    assert order == [schedule.task(step) for step in range(start, stop)]
    counts = Counter(order)
    assert schedule.between(start, stop) == {task: counts[task] for task in schedule.tasks}
    assert sum(schedule.visits(stop).values()) == stop
    if order:
        last = schedule.task(stop - 1)
        assert schedule.visit(stop - 1) == schedule.visits(stop)[last] - 1
        assert schedule.realised_shares(start, stop)[last] == pytest.approx(
            counts[last] / len(order)
        )


@settings(deadline=None, max_examples=50)
@given(schedules(), st.data())
def test_appending_leaves_the_past_alone(schedule, data):
    start = data.draw(st.integers(1, schedule.segments[-1].start + 200))
    rule = data.draw(st.sampled_from(RULES))
    longer = schedule.append(start, data.draw(weights(rule)), rule=rule)
    assert longer.sequence(0, start) == schedule.sequence(0, start)
    before = schedule.visits(start)
    assert {t: n for t, n in longer.visits(start).items() if n} == {
        task: n for task, n in before.items() if n
    }
    assert longer.segments[-1].start == start
    assert longer.sequence(start, start + 50) == longer.segments[-1].sequence(start, start + 50)


@settings(deadline=None, max_examples=50)
@given(schedules(), st.data())
def test_replacing_a_segment_leaves_past_and_plans_alone(schedule, data):
    """Up to the next segment the new weights hold; before it and after it all is as it was."""
    start = data.draw(st.integers(0, schedule.segments[-1].start + 50))
    rule = data.draw(st.sampled_from(RULES))
    new = data.draw(weights(rule))
    changed = schedule.replace(start, new, rule=rule)
    assert changed.sequence(0, start) == schedule.sequence(0, start)
    later = [s for s in schedule.segments if s.start > start]
    end = later[0].start if later else start + 100
    alone = schedule.append(start, new, rule=rule)
    assert changed.sequence(start, end) == alone.sequence(start, end)
    for before, after in zip(later, changed.segments[-len(later) :] if later else [], strict=True):
        assert (after.start, after.rule, after.weights, after.seed) == (
            before.start, before.rule, before.weights, before.seed,
        )  # fmt: skip
    visits = Counter(changed.sequence(0, end + 50))
    assert changed.visits(end + 50) == {task: visits[task] for task in changed.tasks}


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_shares_in_phases_are_never_a_whole_visit_off(data):
    """Segments compose: in each, what a task has run is within a visit of its share of the segment."""
    phases, start = [], 0
    for _ in range(3):
        start += data.draw(st.integers(1, 200))
        phases.append(PhaseConfig(start, data.draw(weights("shares"))))
    schedule = from_config("shares", data.draw(weights("shares")), 0, phases)
    step = data.draw(st.integers(0, start + 200))
    segment = schedule.segment(step)
    total = sum(segment.weights.values())
    for task, n in schedule.between(segment.start, step).items():
        share = Fraction(segment.weights.get(task, 0), total)
        assert abs(n - share * (step - segment.start)) < 1


def test_append_replaces_what_has_not_begun():
    schedule = from_config(
        "shares",
        {"a": 1},
        0,
        [PhaseConfig(10, {"b": 1}), PhaseConfig(20, {"c": 1})],
    )
    changed = schedule.append(15, {"d": 1}, now=12)
    assert [segment.start for segment in changed.segments] == [0, 10, 15]
    assert changed.visits(40) == {"a": 10, "b": 5, "d": 25}
    same_start = schedule.append(20, {"d": 1})
    assert same_start.visits(40) == {"a": 10, "b": 10, "d": 20}
    assert schedule.append(0, {"d": 1}).sequence(0, 2) == ["d", "d"]


def test_append_refuses_to_change_what_ran():
    schedule = from_config("shares", {"a": 1}, 0)
    with pytest.raises(UserError, match="steps before 12 have run.*step 12 or later"):
        schedule.append(11, {"b": 1}, now=12)


def test_a_task_that_stops_and_comes_back_counts_on():
    schedule = from_config(
        "shares",
        {"a": 1, "b": 1},
        0,
        [PhaseConfig(10, {"a": 1, "b": 0}), PhaseConfig(15, {"b": 1})],
    )
    assert schedule.tasks == ("a", "b")
    assert schedule.visits(15) == {"a": 10, "b": 5}
    assert (schedule.task(15), schedule.visit(15)) == ("b", 5)


def test_phases_keep_the_rule_unless_they_say_otherwise():
    schedule = from_config(
        "interval",
        {"a": 1, "b": 2},
        7,
        [
            PhaseConfig(6, intervals={"b": 1, "a": 2}),
            PhaseConfig(12, {"a": 3, "b": 1}, rule="shares"),
        ],
    )
    assert [segment.rule for segment in schedule.segments] == ["interval", "interval", "shares"]
    assert [segment.seed for segment in schedule.segments] == [7, 7, 7]
    assert "".join(schedule.sequence(0, 12)) == "abaabababbab"
    assert schedule.segments[2].base == {"a": 6, "b": 6}
    assert numbers_of(schedule) == "intervals or weights"
    assert numbers_of(from_config("interval", {"a": 1, "b": 2}, 7)) == "intervals"
    assert numbers_of(from_config("random", {"a": 1, "b": 2}, 7)) == "weights"


@settings(deadline=None, max_examples=50)
@given(schedules(), st.booleans())
def test_json_round_trip(schedule, sort_keys):
    """Also through a writer that sorts keys: the order of tasks must survive."""
    text = json.dumps(schedule.to_json(), sort_keys=sort_keys)
    again = Schedule.from_json(json.loads(text))
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert again.sequence(0, 400) == schedule.sequence(0, 400)
    assert Segment.from_json(schedule.segments[-1].to_json()) == schedule.segments[-1]


def test_order_of_tasks_is_part_of_a_segment():
    one, two = (
        from_config("shares", {"a": 1, "b": 1}, 0),
        from_config("shares", {"b": 1, "a": 1}, 0),
    )
    assert one != two
    assert one.sequence(0, 2) != two.sequence(0, 2)


def test_a_segment_is_its_own_copy():
    shares = {"a": 1}
    schedule = from_config("shares", shares, 0)
    shares["b"] = 1
    assert schedule.tasks == ("a",)


def test_a_damaged_list_is_refused():
    data = from_config("shares", {"a": 1}, 0, [PhaseConfig(5, {"b": 1})]).to_json()
    with pytest.raises(UserError, match="at step 5 is damaged"):
        Schedule.from_json([data[0], {**data[1], "base": {"a": 4}}])
    for starts in ([data[1]], [data[0], data[0]], []):
        with pytest.raises(UserError, match="must start at 0"):
            Schedule.from_json(starts)


def test_steps_below_zero_are_errors():
    schedule = from_config("shares", {"a": 1}, 0)
    for ask in (schedule.task, schedule.visit, schedule.visits):
        with pytest.raises(ValueError, match="no step -1"):
            ask(-1)
    for ask in (schedule.realised_shares, schedule.between):
        with pytest.raises(ValueError, match="no steps 5 to 4"):
            ask(5, 4)


def test_a_rule_that_is_not_here_can_be_looked_at_and_not_asked():
    """As of a checkpoint whose rule lies in a folder that was not given."""
    data = [{"start": 0, "rule": "own", "weights": [["a", 1]], "base": {}, "seed": 0}]
    schedule = Schedule.from_json(data)
    assert schedule.segment(7).rule == "own" and schedule.to_json()[0]["weights"] == [["a", 1]]
    with pytest.raises(UserError, match="nknown schedule rule 'own'"):
        schedule.task(7)
    with pytest.raises(UserError, match="rule is 3; it must be a name"):
        Schedule.from_json([{**data[0], "rule": 3}])


def test_a_seed_that_is_no_integer():
    with pytest.raises(UserError, match="seed must be an integer; found '1'"):
        from_config("random", {"a": 1}, "1")


def test_light_to_import():
    code = "import sys, mmjax.schedule.schedule, mmjax.data.order; print('jax' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert found.stdout.strip() == "False"
