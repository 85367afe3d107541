"""The rule `shares` against the bound of its theorem."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedules import SHARES

from mmjax.schedule.phase_specs import from_config


def drift(order, shares):
    """Return the largest |n * share / total - visits| over all tasks and all n, exactly."""
    total, visits, worst = sum(shares), [0] * len(shares), Fraction(0)
    for n, task in enumerate(order, 1):
        visits[task] += 1
        off = max(abs(n * s - v * total) for s, v in zip(shares, visits, strict=True))
        worst = max(worst, Fraction(off, total))
    return worst


def one_period(rule, values, seed=0):
    """Return the first sum(values) steps, tasks by number."""
    names = [str(i) for i in range(len(values))]
    schedule = from_config(rule, dict(zip(names, values, strict=True)), seed)
    return [int(task) for task in schedule.sequence(0, sum(values))]


def smooth_weighted_round_robin(shares):
    """Return what load balancers do: all gain their share, the richest runs and pays the total."""
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
    assert "".join(from_config("shares", {"a": 10**9, "b": 2 * 10**9}, 0).sequence(0, 3)) == "bab"


def test_golden_shares():
    assert (
        "".join(from_config("shares", {"a": 5, "b": 2, "c": 1}, 0).sequence(0, 16))
        == "aabacaabaabacaab"
    )
    assert "".join(from_config("shares", {"a": 1, "b": 1, "c": 1}, 0).sequence(0, 7)) == "abcabca"
    assert (
        "".join(from_config("shares", {"a": 3, "z": 0, "b": 7}, 0).sequence(0, 10)) == "babbabbbab"
    )
