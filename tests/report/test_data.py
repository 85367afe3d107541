"""Check what the report reads from a run's folder."""

import pytest

from mmjax.report.data import wanted_shares
from mmjax.schedule.config import PhaseConfig
from mmjax.schedule.phase_specs import from_config


@pytest.mark.parametrize("rule", ["shares", "random", "interval"])
def test_wanted_shares_are_met_where_stretches_hold_whole_periods(rule: str) -> None:
    later = PhaseConfig(120, {"a": 1, "b": 2, "c": 3})
    schedule = from_config(rule, {"a": 3, "b": 1, "c": 2}, 0, [later])
    wanted = wanted_shares(schedule, 1200 if rule != "interval" else 120 + 11 * 98)
    steps = 1200 if rule != "interval" else 120 + 11 * 98
    counted = {t: schedule.sequence(0, steps).count(t) / steps for t in "abc"}
    tolerance = 1e-12 if rule != "interval" else 1 / 120
    assert sum(wanted.values()) == pytest.approx(1)
    assert wanted == pytest.approx(counted, abs=tolerance)


def test_a_stretch_that_has_not_begun_asks_for_nothing() -> None:
    later = PhaseConfig(100, {"b": 1})
    assert wanted_shares(from_config("shares", {"a": 1}, 0, [later]), 50) == {"a": 1.0, "b": 0.0}
