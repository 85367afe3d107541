"""The optimizer of a run under its phases, and what its tasks' updates ask of the clock."""

from __future__ import annotations

import re

import pytest
import toyrun

from mmjax.core.errors import UserError
from mmjax.experiment import make_experiment
from mmjax.optim.optimizer import PARTS

FROZEN = "schedule.phases=[{'start': 6, 'rules': [{'match': 'trunk/.*', 'freeze': True}]}]"


def test_the_whole_runs_optimizer_holds_all_that_any_phase_trains() -> None:
    optimizers = make_experiment(toyrun.block(FROZEN)).optimizers
    first, later = (optimizers.of(phase) for phase in optimizers.phases.entries)
    of_trunk = {n for n in optimizers.views["one"].trains if n.startswith("trunk/")}
    assert of_trunk and of_trunk <= first.views["one"].trains
    assert not of_trunk & later.views["one"].trains
    assert optimizers.whole.views["one"].trains == first.views["one"].trains


def test_progress_is_a_part_of_all_examples() -> None:
    """12 steps in turn of 2 x 8 and 16 examples: 8 x 8 + 4 x 16 in all."""
    optimizers = make_experiment(toyrun.block("optimizer.unit=examples")).optimizers
    assert optimizers.planned.examples == 8 * 8 + 4 * 16
    parts = [
        optimizers.progress("one", 3, {"one": read, "two": 0})["part"] for read in (0, 32, 1000)
    ]
    assert parts == [0, PARTS // 4, PARTS]


def test_the_last_step_is_told_to_a_run_that_accumulates() -> None:
    optimizers = make_experiment(toyrun.block("optimizer.accumulate=2")).optimizers
    assert [optimizers.progress("one", step, {})["last"] for step in (0, 10, 11)] == [0, 0, 1]
    assert "last" not in make_experiment(toyrun.block()).optimizers.progress("one", 11, {})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tasks.one.update_scope=own", "tasks.one.update_scope"),
        ("optimizer.update_scope=own", "optimizer.update_scope"),
        ("optimizer.rules=[{'match': 'trunk/nothing'}]", "trunk/nothing"),
    ],
)
def test_views_and_rules_that_cannot_be_are_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        make_experiment(toyrun.block(override))


def test_accumulating_needs_shared_updates() -> None:
    overrides = ("optimizer.accumulate=2", "tasks.one.update_scope=own_clock")
    with pytest.raises(UserError, match="'one' has the update_scope 'own_clock'"):
        make_experiment(toyrun.block(*overrides))
