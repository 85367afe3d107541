"""The schedule: against counting step by step, the published rules, and literal values."""

import json
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.core import config as configs
from mmjax.core.errors import UserError
from mmjax.optim.rules import RuleConfig
from mmjax.run_config import ScheduleConfig
from mmjax.schedule import schedule as scheduling
from mmjax.schedule.config import PhaseConfig
from mmjax.schedule.schedule import Schedule, Segment
from mmjax.schedule.stretches import BUDGET, budget_weights, from_config, stretch_at, stretches

RULES = sorted(scheduling.RULES)
NAMES = list("abcdefgh")

SEEDS = st.integers(-(2**63), 2**64)
SHARES = st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any)
INTERVALS = st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 8, 12]), min_size=1, max_size=8)


@st.composite
def weights(draw, rule):
    values = draw(INTERVALS.filter(any) if rule == "interval" else SHARES)
    names = draw(st.permutations(NAMES))
    return dict(zip(names, values, strict=False))


@st.composite
def schedules(draw):
    """One to four segments of any rule, at most 300 steps apart."""
    rule = draw(st.sampled_from(RULES))
    schedule, start = from_config(rule, draw(weights(rule)), draw(SEEDS)), 0
    for _ in range(draw(st.integers(0, 3))):
        rule = draw(st.sampled_from(RULES))
        start += draw(st.integers(1, 300))
        schedule = schedule.append(start, draw(weights(rule)), rule=rule, seed=draw(SEEDS))
    return schedule


def drift(order, shares):
    """The largest |n * share / total - visits| over all tasks and all n, exactly."""
    total, visits, worst = sum(shares), [0] * len(shares), Fraction(0)
    for n, task in enumerate(order, 1):
        visits[task] += 1
        off = max(abs(n * s - v * total) for s, v in zip(shares, visits, strict=True))
        worst = max(worst, Fraction(off, total))
    return worst


def one_period(rule, values, seed=0):
    """The first sum(values) steps, tasks by number."""
    names = [str(i) for i in range(len(values))]
    schedule = from_config(rule, dict(zip(names, values, strict=True)), seed)
    return [int(task) for task in schedule.strip(0, sum(values))]


def smooth_weighted_round_robin(shares):
    """What load balancers do: all gain their share, the richest runs and pays the total."""
    wealth, order = [0] * len(shares), []
    for _ in range(sum(shares)):
        wealth = [w + s for w, s in zip(wealth, shares, strict=True)]
        richest = wealth.index(max(wealth))
        wealth[richest] -= sum(shares)
        order.append(richest)
    return order


# Shares.


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=14))
def test_shares_stay_within_tijdemans_bound(shares):
    bound = 1 - Fraction(1, max(1, 2 * len(shares) - 2))
    assert drift(one_period("shares", shares), shares) <= bound


@pytest.mark.parametrize(
    "shares",
    [[1], [1, 1], [1] * 40, [1000, 1], [1, 1000], [50] + [1] * 20, [1, 1, 15, 1, 1, 15, 1, 5, 1]],
)
def test_shares_stay_within_tijdemans_bound_in_hard_cases(shares):
    bound = 1 - Fraction(1, max(1, 2 * len(shares) - 2))
    assert drift(one_period("shares", shares), shares) <= bound


def test_smooth_round_robin_drifts_by_more_than_a_visit():
    """Positive control: the bound is one that a common rule breaks."""
    shares = [1, 1, 15, 1, 1, 15, 1, 5, 1]
    assert drift(smooth_weighted_round_robin(shares), shares) > 1
    assert drift(one_period("shares", shares), shares) < 1


@settings(deadline=None)
@given(SHARES, st.integers(1, 9))
def test_only_the_proportion_of_shares_matters(shares, factor):
    scaled = [share * factor for share in shares]
    assert one_period("shares", shares) * factor == one_period("shares", scaled)


def test_large_shares_with_a_common_factor_are_a_short_period():
    assert "".join(from_config("shares", {"a": 10**9, "b": 2 * 10**9}, 0).strip(0, 3)) == "bab"


def test_golden_shares():
    assert (
        "".join(from_config("shares", {"a": 5, "b": 2, "c": 1}, 0).strip(0, 16))
        == "aabacaabaabacaab"
    )
    assert "".join(from_config("shares", {"a": 1, "b": 1, "c": 1}, 0).strip(0, 7)) == "abcabca"
    assert "".join(from_config("shares", {"a": 3, "z": 0, "b": 7}, 0).strip(0, 10)) == "babbabbbab"


# Interval.

IMP = {
    "image_text": 1,
    "image_classes": 1,
    "video_text": 12,
    "video_classes": 5,
    "video_audio_text": 12,
    "audio_classes": 8,
}


def published_loop(intervals, steps, counter_of=lambda task: task, first=1):
    """IMP's loop: a counter per key goes up at each turn; the interval that divides it fires."""
    counters, order = {counter_of(task): first - 1 for task in intervals}, []
    while len(order) < steps:
        for task, interval in intervals.items():
            counters[counter_of(task)] += 1
            if counters[counter_of(task)] % interval == 0:
                order.append(task)
    return order[:steps]


def test_imp_is_the_published_loop_with_a_counter_per_task():
    """Theirs counts passes from 1, ours from 0: one more pass, in which every task runs."""
    order = from_config("interval", IMP, 0).strip(0, 2006)
    assert order[:6] == list(IMP)
    assert order[6:] == published_loop(IMP, 2000)


def test_imp_shares():
    """What the published intervals intend: 40.1, 40.1, 3.3, 8.0, 3.3 and 5.0 %."""
    schedule = from_config("interval", IMP, 0)
    for start in (0, 10**9):
        shares = schedule.shares(start, start + 299)  # 120 passes
        assert [round(100 * shares[t], 1) for t in IMP] == [40.1, 40.1, 3.3, 8.0, 3.3, 5.0]


def test_imp_with_the_published_shared_counter_starves_a_task():
    """Positive control: two tasks counted under one name give the shares that were published."""
    shared = {"video_text": "video_audio_text"}
    counts = Counter(published_loop(IMP, 299 * 40, lambda task: shared.get(task, task)))
    shares = [round(100 * counts[task] / (299 * 40), 1) for task in IMP]
    assert shares == [40.1, 40.1, 0, 8.0, 6.7, 5.0]


@settings(deadline=None)
@given(INTERVALS.filter(all).filter(bool))
def test_interval_is_the_published_loop(intervals):
    named = dict(zip(NAMES, intervals, strict=False))
    order = from_config("interval", named, 0).strip(0, 500)
    assert order == published_loop(named, 500, first=0)


def test_interval_of_enormous_passes():
    """Empty passes cost nothing."""
    assert from_config("interval", {"a": 10**30}, 0).strip(0, 3) == ["a", "a", "a"]
    schedule = from_config("interval", {"a": 10**30, "b": 3 * 10**30}, 0)
    assert "".join(schedule.strip(0, 8)) == "abaaabaa"


def test_interval_refuses_an_endless_period():
    with pytest.raises(UserError, match="interval.*'b': 1000003.*repeats only after 1999986 steps"):
        from_config("interval", {"a": 999983, "b": 1000003}, 0)


# Random.


def test_golden_random():
    schedule = from_config("random", {"a": 5, "b": 2, "c": 1}, 42)
    assert "".join(schedule.strip(0, 24)) == "caaaaabbaacbaaabbaacaaba"
    later = schedule.append(16, {"a": 5, "b": 2, "c": 1})
    assert (
        "".join(later.strip(0, 24)) == "caaaaabbaacbaaabbaacaaba"
    )  # a period is known by its first step
    assert "".join(later.append(16, {"a": 5, "b": 2, "c": 1}, seed=43).strip(16, 24)) == "caababaa"


@settings(deadline=None)
@given(SHARES, SEEDS, st.integers(0, 10**9))
def test_each_period_of_random_holds_each_share(shares, seed, turn):
    named = {NAMES[i]: share for i, share in enumerate(shares)}
    schedule, total = from_config("random", named, seed), sum(shares)
    period = Counter(schedule.strip(turn * total, (turn + 1) * total))
    assert period == Counter({task: share for task, share in named.items() if share})


def test_random_orders_are_equally_likely():
    """Chi-square of the 24 orders of four tasks over 24,000 periods, and a seed matters."""
    order = "".join(from_config("random", dict.fromkeys("abcd", 1), 0).strip(0, 4 * 24_000))
    counts = Counter(order[i : i + 4] for i in range(0, len(order), 4))
    chi_square = sum((count - 1000) ** 2 / 1000 for count in counts.values())
    assert len(counts) == 24
    assert chi_square < 23 + 4 * 46**0.5
    assert "".join(from_config("random", dict.fromkeys("abcd", 1), 1).strip(0, 400)) != order[:400]


# All rules: any step alone, against walking from step 0.


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
    assert schedule.strip(0, stop) == walked


@settings(deadline=None, max_examples=50)
@given(schedules(), st.integers(0, 10**12), st.integers(0, 60), st.integers(0, 60))
def test_counts_of_a_range_far_away(schedule, start, first, second):
    """No step is walked to: 10**12 steps would never end."""
    middle, stop = start + first, start + first + second
    order = schedule.strip(start, stop)
    assert order == schedule.strip(start, middle) + schedule.strip(middle, stop)
    assert order == [schedule.task(step) for step in range(start, stop)]
    counts = Counter(order)
    assert schedule.between(start, stop) == {task: counts[task] for task in schedule.tasks}
    assert sum(schedule.visits(stop).values()) == stop
    if order:
        last = schedule.task(stop - 1)
        assert schedule.visit(stop - 1) == schedule.visits(stop)[last] - 1
        assert schedule.shares(start, stop)[last] == pytest.approx(counts[last] / len(order))


@settings(deadline=None, max_examples=50)
@given(schedules(), st.data())
def test_appending_leaves_the_past_alone(schedule, data):
    start = data.draw(st.integers(1, schedule.segments[-1].start + 200))
    rule = data.draw(st.sampled_from(RULES))
    longer = schedule.append(start, data.draw(weights(rule)), rule=rule)
    assert longer.strip(0, start) == schedule.strip(0, start)
    before = schedule.visits(start)
    assert {t: n for t, n in longer.visits(start).items() if n} == {
        task: n for task, n in before.items() if n
    }
    assert longer.segments[-1].start == start
    assert longer.strip(start, start + 50) == longer.segments[-1].strip(start, start + 50)


@settings(deadline=None, max_examples=50)
@given(schedules(), st.data())
def test_replacing_a_segment_leaves_past_and_plans_alone(schedule, data):
    """Up to the next segment the new weights hold; before it and after it all is as it was."""
    start = data.draw(st.integers(0, schedule.segments[-1].start + 50))
    rule = data.draw(st.sampled_from(RULES))
    new = data.draw(weights(rule))
    changed = schedule.replace(start, new, rule=rule)
    assert changed.strip(0, start) == schedule.strip(0, start)
    later = [s for s in schedule.segments if s.start > start]
    end = later[0].start if later else start + 100
    alone = schedule.append(start, new, rule=rule)
    assert changed.strip(start, end) == alone.strip(start, end)
    for before, after in zip(later, changed.segments[-len(later) :] if later else [], strict=True):
        assert (after.start, after.rule, after.weights, after.seed) == (
            before.start, before.rule, before.weights, before.seed,
        )  # fmt: skip
    visits = Counter(changed.strip(0, end + 50))
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
        [{"start": 10, "weights": {"b": 1}}, {"start": 20, "weights": {"c": 1}}],
    )
    changed = schedule.append(15, {"d": 1}, now=12)
    assert [segment.start for segment in changed.segments] == [0, 10, 15]
    assert changed.visits(40) == {"a": 10, "b": 5, "d": 25}
    same_start = schedule.append(20, {"d": 1})
    assert same_start.visits(40) == {"a": 10, "b": 10, "d": 20}
    assert schedule.append(0, {"d": 1}).strip(0, 2) == ["d", "d"]


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
            PhaseConfig(6, {"b": 1, "a": 2}),
            PhaseConfig(12, {"a": 3, "b": 1}, rule="shares"),
        ],
    )
    assert [segment.rule for segment in schedule.segments] == ["interval", "interval", "shares"]
    assert [segment.seed for segment in schedule.segments] == [7, 7, 7]
    assert "".join(schedule.strip(0, 12)) == "abaabababbab"
    assert schedule.segments[2].base == {"a": 6, "b": 6}


@settings(deadline=None, max_examples=50)
@given(schedules(), st.booleans())
def test_json_round_trip(schedule, sort_keys):
    """Also through a writer that sorts keys: the order of tasks must survive."""
    text = json.dumps(schedule.to_json(), sort_keys=sort_keys)
    again = Schedule.from_json(json.loads(text))
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert again.strip(0, 400) == schedule.strip(0, 400)
    assert Segment.from_json(schedule.segments[-1].to_json()) == schedule.segments[-1]


def test_order_of_tasks_is_part_of_a_segment():
    one, two = (
        from_config("shares", {"a": 1, "b": 1}, 0),
        from_config("shares", {"b": 1, "a": 1}, 0),
    )
    assert one != two
    assert one.strip(0, 2) != two.strip(0, 2)


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
    for ask in (schedule.shares, schedule.between):
        with pytest.raises(ValueError, match="no steps 5 to 4"):
            ask(5, 4)


# What a person gets wrong.


@pytest.mark.parametrize("rule", [*RULES, BUDGET])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"a": 1, "caption": -1}, "'caption': its .* 0 or more; found -1"),
        ({"a": 1, "caption": 1.5}, "'caption': its .* an integer; found 1.5"),
        ({"a": 1, "caption": "2"}, "'caption': its .* an integer; found '2'"),
        ({"a": 1, "caption": True}, "'caption': its .* an integer; found True"),
        ({"a": 1, "caption": None}, "'caption': its .* an integer; found None"),
        ({"a": 0, "caption": 0}, "No task would ever run.*'a', 'caption'"),
        ({}, "no tasks"),
    ],
)
def test_bad_weights(rule, bad, message):
    seconds = {"a": 1.0}
    with pytest.raises(UserError, match=message):
        from_config(rule, bad, 0, seconds=lambda _: seconds)


def test_unknown_rule():
    with pytest.raises(UserError, match="no schedule rule 'share'.*'shares'"):
        from_config("share", {"a": 1}, 0)


def test_a_seed_that_is_no_integer():
    with pytest.raises(UserError, match="seed must be an integer; found '1'"):
        from_config("random", {"a": 1}, "1")


def test_a_period_too_long():
    with pytest.raises(UserError, match="repeats only after 2000001 steps"):
        from_config("random", {"a": 10**6, "b": 1, "c": 10**6}, 0)


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ({"start": 0}, r"phases\[1\].start is 0; it must be at least 1"),
        ({"start": -3}, r"phases\[1\].start is -3; it must be at least 1"),
        ({"start": 2.0}, r"phases\[1\].start' is 2.0; expected int"),
        ({"start": True}, r"phases\[1\].start' is True; expected int"),
        ({"weights": {"a": 1}}, r"phases\[1\].start' is missing"),
        ({"start": 5, "weigths": {"a": 1}}, r"'schedule.phases\[1\].weigths'.*'weights'"),
        ({"start": 5, "weights": {"a": -1}}, r"phases\[1\].weights.a is -1; .* at least 0"),
        ({"start": 5, "weights": {"a": "2"}}, r"phases\[1\].weights.a' is '2'; expected int"),
        ({"start": 5, "weights": {"a": True}}, r"phases\[1\].weights.a' is True; expected int"),
        ({"start": 5, "weights": {"a": None}}, r"phases\[1\].weights.a' is None; expected int"),
        ({"start": 5, "weights": {"a": 1.5}}, r"phases\[1\].weights.a' is 1.5; expected int"),
        ({"start": 5, "weights": 3}, r"phases\[1\].weights' is 3; expected a block of keys"),
        ({"start": 5, "rule": 3}, r"phases\[1\].rule' is 3; expected str"),
        ({"start": 5, "learning_rate": -0.5}, r"phases\[1\].learning_rate is -0.5; .* at least 0"),
        ({"start": 5, "tasks": {"a": {"batch": 0}}}, r"phases\[1\].tasks.a.batch is 0; .* at least 1"),
        ({"start": 5, "tasks": {"a": {"bach": 2}}}, r"phases\[1\].tasks.a.bach'.*'batch'"),
        ({"start": 5, "rules": [{"mach": ".*"}]}, r"phases\[1\].rules\[0\].mach'.*'match'"),
    ],
)  # fmt: skip
def test_bad_phases(phase, message):
    block = {"phases": [{"start": 1}, phase]}
    with pytest.raises(UserError, match=message):
        configs.build(ScheduleConfig, block, "schedule")


def test_a_phase_of_a_config_is_typed():
    block = {"start": 4, "rules": [{"match": ".*"}], "tasks": {"a": {"inputs": {"x": {"size": 8}}}}}
    [phase] = configs.build(ScheduleConfig, {"phases": [block]}, "schedule").phases
    assert (phase.start, phase.weights, phase.rule, phase.learning_rate) == (4, None, None, None)
    assert phase.rules == (RuleConfig(".*"),)
    assert phase.tasks["a"].block == {"inputs": {"x": {"size": 8}}}


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        (PhaseConfig(5, rule="share"), r"schedule.phases\[1\].rule: .* 'share'.*'shares'"),
        (PhaseConfig(5, {"a": 0}), "No task would ever run.*'a'"),
        (PhaseConfig(5, {}), "no tasks"),
        (PhaseConfig(5, {"a": 10**6, "b": 10**6 - 1}), "repeats only after 1999999 steps"),
    ],
)
def test_phases_of_which_there_is_no_schedule(phase, message):
    with pytest.raises(UserError, match=message):
        from_config("shares", {"a": 1}, 0, [PhaseConfig(4), phase])


def test_a_phase_keeps_the_weights_and_the_rule_that_it_does_not_name():
    phases = [
        PhaseConfig(4, {"a": 1, "b": 3}),
        PhaseConfig(8),
        PhaseConfig(12, rule="interval"),
    ]
    segments = from_config("shares", {"a": 1, "b": 1}, 0, phases).segments
    assert [(s.start, s.rule, s.weights["b"]) for s in segments] == [
        (0, "shares", 1), (4, "shares", 3), (8, "shares", 3), (12, "interval", 3),
    ]  # fmt: skip


def test_phases_out_of_order():
    phases = [PhaseConfig(9, {"a": 1}), PhaseConfig(4, {"a": 1})]
    with pytest.raises(UserError, match=r"phases\[1\].start is 4.*step 9.*ascending"):
        from_config("shares", {"a": 1}, 0, phases)


# Budgets of time.


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
    assert schedule.strip(0, start) == from_config("random", plan, 0).strip(0, start)


def test_stretches_keep_what_the_config_says():
    planned = stretches(BUDGET, {"a": 1}, [PhaseConfig(5, {"a": 2})])
    assert [(s.start, s.rule, s.weights) for s in planned] == [
        (0, BUDGET, {"a": 1}), (5, BUDGET, {"a": 2}),
    ]  # fmt: skip
    assert [stretch_at(planned, step).start for step in (0, 4, 5, 10**9)] == [0, 0, 5, 5]


def test_a_budget_without_step_times():
    with pytest.raises(UserError, match="'a' has no step time"):
        from_config(BUDGET, {"a": 1}, 0)


def test_light_to_import():
    code = "import sys, mmjax.schedule.schedule, mmjax.data.order; print('jax' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert found.stdout.strip() == "False"
