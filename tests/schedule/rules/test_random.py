"""The rule `random`: what each period holds, and in which order."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from schedules import NAMES, SEEDS, SHARES

from mmjax.schedule.phase_specs import from_config


def test_golden_random():
    schedule = from_config("random", {"a": 5, "b": 2, "c": 1}, 42)
    assert "".join(schedule.sequence(0, 24)) == "caaaaabbaacbaaabbaacaaba"
    later = schedule.append(16, {"a": 5, "b": 2, "c": 1})
    assert (
        "".join(later.sequence(0, 24)) == "caaaaabbaacbaaabbaacaaba"
    )  # a period is known by its first step
    assert (
        "".join(later.append(16, {"a": 5, "b": 2, "c": 1}, seed=43).sequence(16, 24)) == "caababaa"
    )


@settings(deadline=None)
@given(SHARES, SEEDS, st.integers(0, 10**9))
def test_each_period_of_random_holds_each_share(shares, seed, turn):
    named = {NAMES[i]: share for i, share in enumerate(shares)}
    schedule, total = from_config("random", named, seed), sum(shares)
    period = Counter(schedule.sequence(turn * total, (turn + 1) * total))
    assert period == Counter({task: share for task, share in named.items() if share})


def test_random_orders_are_equally_likely():
    """Chi-square of the 24 orders of four tasks over 24,000 periods, and a seed matters."""
    order = "".join(from_config("random", dict.fromkeys("abcd", 1), 0).sequence(0, 4 * 24_000))
    counts = Counter(order[i : i + 4] for i in range(0, len(order), 4))
    chi_square = sum((count - 1000) ** 2 / 1000 for count in counts.values())
    assert len(counts) == 24
    assert chi_square < 23 + 4 * 46**0.5
    assert (
        "".join(from_config("random", dict.fromkeys("abcd", 1), 1).sequence(0, 400)) != order[:400]
    )
