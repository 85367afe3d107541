"""Check what the report calls good, and how it shows that."""

from typing import Any

import numpy as np
import pytest

from mmjax.report.results import _shown, _unit, is_good


def _record(**more: Any) -> dict[str, Any]:
    return {
        "task": "t",
        "name": "n",
        "split": "s",
        "value": 0.5,
        "chance": 0.1,
        "count": 100,
        **more,
    }


@pytest.mark.parametrize(
    ("more", "good"),
    [
        ({}, True),
        ({"value": 0.11}, False),  # within luck of 0.1
        ({"value": 0.11, "count": 100_000}, True),
        ({"value": 0.05}, False),
        ({"majority": 0.48}, False),
        ({"majority": 0.3}, True),
        ({"count": None}, False),
        ({"count": 0}, False),
        ({"unit": "semitones"}, True),
        ({"unit": "semitones", "value": 0.05}, False),
        ({"unit": "semitones", "value": 0.05, "better": "lower"}, True),
        ({"unit": "semitones", "better": "lower"}, False),
        ({"better": "lower"}, False),
        ({"chance": None}, False),
        ({"value": float("nan")}, False),
        ({"unit": "loss", "value": 0.7, "chance": 0.8}, True),
        ({"unit": "loss", "value": 0.8, "chance": 0.7}, False),
        ({"unit": "loss", "value": float("nan")}, False),
    ],
)
def test_good_is_better_than_chance_and_the_largest_class(more: dict[str, Any], good: bool) -> None:
    assert is_good(_record(**more)) == good


@pytest.mark.parametrize(
    ("unit", "shown"),
    [
        ({"unit": ""}, "0.25"),
        ({"unit": "fraction"}, "25.0 %"),
        ({}, "25.0 %"),
        ({"unit": "dB"}, "0.25 dB"),
    ],
)
def test_only_fractions_are_percentages(unit: dict[str, str], shown: str) -> None:
    assert _shown(0.25, _unit(_record(**unit))) == shown


def test_luck_is_rarely_called_good() -> None:
    """Guessing at random 200 times among ten classes is good in about one of forty evaluations."""
    hits = np.random.default_rng(0).binomial(200, 0.1, 2000) / 200
    share = np.mean([is_good(_record(value=value, count=200)) for value in hits])
    assert 0.005 < share < 0.05
