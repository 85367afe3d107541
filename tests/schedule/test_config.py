"""Phases as a config writes them."""

import pytest

from mmjax.core import config as configs
from mmjax.core.errors import UserError
from mmjax.optim.rules import RuleConfig
from mmjax.schedule.config import PhaseConfig, ScheduleConfig
from mmjax.schedule.phase_specs import from_config


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
        PhaseConfig(16, intervals={"a": 1, "b": 4}),
        PhaseConfig(20, rule="random"),
    ]
    intervals = {"a": 1, "b": 2}
    segments = from_config("shares", {"a": 1, "b": 1}, 0, phases, intervals=intervals).segments
    assert [(s.start, s.rule, s.weights["b"]) for s in segments] == [
        (0, "shares", 1), (4, "shares", 3), (8, "shares", 3), (12, "interval", 2),
        (16, "interval", 4), (20, "random", 3),
    ]  # fmt: skip


def test_phases_out_of_order():
    phases = [PhaseConfig(9, {"a": 1}), PhaseConfig(4, {"a": 1})]
    with pytest.raises(UserError, match=r"phases\[1\].start is 4.*step 9.*ascending"):
        from_config("shares", {"a": 1}, 0, phases)
