"""Check what all rules of a schedule share: names, weights, periods."""

import pytest

from mmjax.core.errors import UserError
from mmjax.schedule.phase_specs import BUDGET, from_config
from mmjax.schedule.rules.base import names

RULES = names()


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
    with pytest.raises(UserError, match="nknown schedule rule 'share'.*'shares'"):
        from_config("share", {"a": 1}, 0)


def test_a_period_too_long():
    with pytest.raises(UserError, match="repeats only after 2000001 steps"):
        from_config("random", {"a": 10**6, "b": 1, "c": 10**6}, 0)
