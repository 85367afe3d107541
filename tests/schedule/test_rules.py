"""Rules of a schedule, each against its published statement."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedules import INTERVALS, NAMES, SEEDS, SHARES

from mmjax.core.errors import UserError
from mmjax.schedule.stretches import from_config


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
