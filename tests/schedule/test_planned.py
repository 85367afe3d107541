"""The planned schedule of a run: weights and intervals, and what follows from them."""

from __future__ import annotations

import re

import pytest
import toyrun

from mmjax.core.errors import UserError
from mmjax.experiment import make_experiment
from mmjax.schedule.planned import PlannedSchedule


def planned(*overrides: str) -> PlannedSchedule:
    return make_experiment(toyrun.block(*overrides)).planned


def test_a_rule_reads_its_own_number() -> None:
    """The toy's tasks have the weights 2 and 1."""
    [stretch] = planned().phase_specs()
    assert (stretch.rule, stretch.weights) == ("shares", {"one": 2, "two": 1})
    overrides = ("schedule.rule=interval", "tasks.one.weight=1", "tasks.two.interval=3")
    [stretch] = planned(*overrides).phase_specs()
    assert (stretch.rule, stretch.weights) == ("interval", {"one": 1, "two": 3})


def test_a_phase_may_change_to_intervals() -> None:
    phase = "schedule.phases=[{'start': 4, 'rule': 'interval', 'intervals': {'one': 1, 'two': 2}}]"
    schedule = planned(phase).schedule()
    assert [(s.start, s.rule, s.weights) for s in schedule.segments] == [
        (0, "shares", {"one": 2, "two": 1}), (4, "interval", {"one": 1, "two": 2}),
    ]  # fmt: skip


def test_visits_and_examples_of_a_whole_run() -> None:
    """12 steps: task `one` (batch 8) takes two of three, task `two` (batch 16) the third."""
    made = planned()
    assert dict(made.visits) == {"one": 8, "two": 4}
    assert made.examples == 8 * 8 + 4 * 16


def test_a_budget_divides_by_the_cost_of_a_step() -> None:
    made = planned("schedule.rule=budget", "tasks.one.weight=1")
    seconds = {"one": 1.0, "two": 3.0}
    [segment] = made.schedule(lambda step: seconds).segments
    assert segment.weights["one"] == 3 * segment.weights["two"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tasks.one.interval=3"], "tasks.one.interval is set, but the schedule's rule 'shares' reads weights"),
        (["schedule.rule=interval"], "tasks.one.weight is set, but the schedule's rule 'interval' reads intervals"),
        (["schedule.phases=[{'start': 3, 'intervals': {'one': 2}}]"], "intervals of schedule.phases"),
        (["schedule.phases=[{'start': 3, 'weights': {'oen': 2}}]"], "phases[0].weights': no task 'oen'"),
        (["schedule.rebalance_every=3"], "no phase has the rule 'budget'"),
        (["schedule.rule=intervall"], "Did you mean 'interval'"),
    ],
)  # fmt: skip
def test_numbers_that_no_rule_reads_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        planned(*overrides)
