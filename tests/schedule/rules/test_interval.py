"""The rule `interval` against the published loop."""

from collections import Counter

import pytest
from hypothesis import given, settings
from schedules import INTERVALS, NAMES

from mmjax.core.errors import UserError
from mmjax.schedule.phase_specs import from_config

IMP = {
    "image_text": 1,
    "image_classes": 1,
    "video_text": 12,
    "video_classes": 5,
    "video_audio_text": 12,
    "audio_classes": 8,
}


def published_loop(intervals, steps, counter_of=lambda task: task, first=1):
    """Return IMP's loop: a counter per key goes up at each turn; the interval that divides it fires."""
    counters, order = {counter_of(task): first - 1 for task in intervals}, []
    while len(order) < steps:
        for task, interval in intervals.items():
            counters[counter_of(task)] += 1
            if counters[counter_of(task)] % interval == 0:
                order.append(task)
    return order[:steps]


def test_imp_is_the_published_loop_with_a_counter_per_task():
    """Theirs counts passes from 1, ours from 0: one more pass, in which every task runs."""
    order = from_config("interval", IMP, 0).sequence(0, 2006)
    assert order[:6] == list(IMP)
    assert order[6:] == published_loop(IMP, 2000)


def test_imp_shares():
    """What the published intervals intend: 40.1, 40.1, 3.3, 8.0, 3.3 and 5.0 %."""
    schedule = from_config("interval", IMP, 0)
    for start in (0, 10**9):
        shares = schedule.realised_shares(start, start + 299)  # 120 passes
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
    order = from_config("interval", named, 0).sequence(0, 500)
    assert order == published_loop(named, 500, first=0)


def test_interval_of_enormous_passes():
    """Empty passes cost nothing."""
    assert from_config("interval", {"a": 10**30}, 0).sequence(0, 3) == ["a", "a", "a"]
    schedule = from_config("interval", {"a": 10**30, "b": 3 * 10**30}, 0)
    assert "".join(schedule.sequence(0, 8)) == "abaaabaa"


def test_interval_refuses_an_endless_period():
    with pytest.raises(UserError, match="interval.*'b': 1000003.*repeats only after 1999986 steps"):
        from_config("interval", {"a": 999983, "b": 1000003}, 0)
