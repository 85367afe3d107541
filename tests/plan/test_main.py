"""The plan's main, as far as it needs no compiler."""

from __future__ import annotations

import pytest
import toyrun
from mains import run

from mmjax.core.errors import UserError
from mmjax.experiment import make_experiment
from mmjax.plan import __main__ as main


def test_it_needs_a_config_and_a_topology() -> None:
    ended = run(main.main)
    assert ended.status == 2 and "--config and --topology are needed. usage: " in ended.err
    assert ended.err.count("\n") == 1


def test_an_unknown_topology_is_told_before_anything_else() -> None:
    ended = run(main.main, "--config=nowhere.py", "--topology=v5e:16x17")
    assert ended.status == 2 and "Did you mean 'v5e:16x16'?" in ended.err


def test_programs_of_a_config_and_of_a_task() -> None:
    experiment = make_experiment(toyrun.block())
    assert main.program_names(experiment) == ["one", "two", "one/loss", "two/loss"]
    assert main.program_names(experiment, "two") == ["two", "two/loss"]
    with pytest.raises(UserError, match=r"--task=oen: no such task. Did you mean 'one'\?"):
        main.program_names(experiment, "oen")
