"""Shares of time: from model FLOPs at first, from measured step times at boundaries, frozen as integers."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import toyrun
from etils import epath
from harness import Aim, Harness, deterministic, finished_steps
from toyrun import block, run

from mmjax.core.errors import UserError
from mmjax.core.workdir import SEGMENTS
from mmjax.engine.health import quarantine
from mmjax.experiment import make_experiment
from mmjax.schedule.phase_specs import budget_weights
from mmjax.schedule.schedule import Schedule
from mmjax.training import rebalance
from mmjax.training.rebalance import Budget
from mmjax.training.session import fresh_clock

RULE = (
    "schedule.rule=budget",
    "schedule.rebalance_every=4",
    "checkpoint.every=3",
    "evaluation.every=0",
)


def segments(workdir: Path) -> list[tuple[int, dict[str, int]]]:
    clock = toyrun.meta(workdir)["clock"]
    return [(s.start, s.weights) for s in Schedule.from_json(clock["segments"]).segments]


def decisions(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / SEGMENTS).read_text().splitlines()]


@pytest.fixture
def slow_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a step of `two` take seven times as long as one of `one`, whatever the machine does."""
    seconds = {"one": 1.0, "two": 7.0}
    monkeypatch.setattr(rebalance, "measured", lambda lines: seconds if list(lines) else {})


def test_planned_shares_follow_from_model_flops() -> None:
    experiment = make_experiment(block("schedule.rule=budget", "tasks.one.weight=3"))
    flops = experiment.flops
    wanted = budget_weights({t: float(n) for t, n in flops.items()}, {"one": 3, "two": 1})
    [segment] = experiment.planned.schedule().segments
    assert (segment.rule, segment.weights) == ("shares", wanted)
    # By hand: the times of 1,000 steps are as three to one, to a step.
    assert wanted["one"] * flops["one"] / (wanted["two"] * flops["two"]) == pytest.approx(3, rel=0.01)  # fmt: skip


def test_a_phase_may_be_a_budget_and_leave_it(tmp_path: Path) -> None:
    phases = (
        'schedule.phases=({"start": 6, "rule": "budget", "weights": {"one": 1, "two": 1}},'
        '{"start": 9, "rule": "interval", "weights": {"one": 1, "two": 2}})'
    )
    experiment = make_experiment(block(phases, "schedule.rebalance_every=4"))
    assert [s.rule for s in experiment.planned.schedule().segments] == [
        "shares",
        "shares",
        "interval",
    ]
    boundaries = Budget(experiment, tmp_path)
    # Of 4 and 8 only the second lies in the budget's stretch.
    assert [boundaries.next(step) for step in (0, 7, 8)] == [8, 8, None]


def test_measured_shares_begin_at_a_boundary(tmp_path: Path, slow_two: None) -> None:
    run(tmp_path / "run", *RULE)
    planned = make_experiment(block(*RULE)).planned.schedule().segments[0].weights
    changed = budget_weights({"one": 1, "two": 7}, {"one": 2, "two": 1})
    # The second boundary finds what the first one did, and makes no segment.
    assert segments(tmp_path / "run") == [(0, planned), (4, changed)]
    assert [d["start"] for d in decisions(tmp_path / "run")] == [4, 8]
    assert decisions(tmp_path / "run")[0]["seconds"] == {"one": 1.0, "two": 7.0}
    tasks = [x["task"] for x in deterministic(tmp_path / "run") if x["kind"] == "train"]
    schedule = Schedule.from_json(toyrun.meta(tmp_path / "run")["clock"]["segments"])
    assert tasks == schedule.sequence(0, 12)
    assert toyrun.meta(tmp_path / "run")["clock"]["positions"] == {
        "one": 8 * tasks.count("one"), "two": 16 * tasks.count("two"),
    }  # fmt: skip


def test_real_times_are_measured_of_every_task(tmp_path: Path) -> None:
    run(tmp_path / "run", *RULE)
    assert all(d["seconds"].keys() == {"one", "two"} for d in decisions(tmp_path / "run"))
    assert all(s > 0 for d in decisions(tmp_path / "run") for s in d["seconds"].values())


def test_a_killed_run_takes_the_shares_that_it_had_frozen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow_two: None
) -> None:
    """Killed after the boundary at 4, it resumes from 3; what it would measure now is another thing."""
    straight, again = tmp_path / "straight", tmp_path / "again"
    run(straight, *RULE)
    run(again, *RULE, "steps=4")
    assert finished_steps(again) == (3, 4)
    shutil.rmtree(again / "checkpoints" / "4")
    shutil.copy(straight / SEGMENTS, again / SEGMENTS)
    monkeypatch.setattr(rebalance, "measured", lambda _: {"one": 5.0, "two": 1.0})
    run(again, *RULE)
    assert toyrun.bits(again) == toyrun.bits(straight)
    assert deterministic(again) == deterministic(straight)
    # The control: without the file the run goes another way.
    other = tmp_path / "other"
    run(other, *RULE)
    assert segments(other) != segments(straight)


@pytest.mark.parametrize(
    "line",
    ["5", "null", "[1]", "{}", '{"start": 4}', "[" * 100_000,
     '{"start": 4, "config": CONFIG, "wanted": WANTED, "weights": 5}',
     '{"start": 4, "config": CONFIG, "wanted": WANTED, "weights": {"one": 1}}',
     '{"start": 4, "config": CONFIG, "wanted": WANTED, "weights": {"one": 1, "two": "1"}}',
     '{"start": 4, "config": CONFIG, "wanted": [], "weights": {}}'],
    ids=lambda x: x[:60],
)  # fmt: skip
def test_a_line_that_is_no_decision_is_passed_over(tmp_path: Path, line: str) -> None:
    decision = {
        "start": 4,
        "config": "a",
        "wanted": {"one": 2, "two": 1},
        "weights": {"one": 14, "two": 1},
    }
    line = line.replace("CONFIG", '"a"').replace("WANTED", '{"one": 2, "two": 1}')
    (tmp_path / SEGMENTS).write_text(f"{line}\n{json.dumps(decision)}\n{line}\n")
    assert rebalance._read(epath.Path(tmp_path / SEGMENTS)) == [decision]


def test_frozen_shares_are_for_one_config(tmp_path: Path, slow_two: None) -> None:
    run(tmp_path / "run", *RULE, "steps=6")
    run(tmp_path / "run", *RULE, "tasks.two.weight=9", allow_change=True)
    wanted = budget_weights({"one": 1, "two": 7}, {"one": 2, "two": 9})
    assert segments(tmp_path / "run")[-1] == (8, wanted)


def test_the_end_of_a_shorter_run_is_a_boundary_of_the_longer_one(
    tmp_path: Path, slow_two: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "straight", *RULE)
    run(tmp_path / "run", *RULE, "steps=4")
    assert len(segments(tmp_path / "run")) == 1
    run(tmp_path / "run", *RULE)
    assert [d["start"] for d in decisions(tmp_path / "run")] == [4, 8]
    assert segments(tmp_path / "run") == segments(tmp_path / "straight")
    assert toyrun.bits(tmp_path / "run") == toyrun.bits(tmp_path / "straight")
    # What was settled is frozen: resumed from a boundary, other times change nothing.
    words = (*RULE, "checkpoint.every=4")
    run(tmp_path / "again", *words)
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "12")
    monkeypatch.setattr(rebalance, "measured", lambda _: {"one": 5.0, "two": 1.0})
    run(tmp_path / "again", *words)
    assert segments(tmp_path / "again") == segments(tmp_path / "straight")


def test_a_kill_from_outside(toy_command: Callable[..., Harness], tmp_path: Path) -> None:
    """Whatever times the runs measure, a killed one ends as a run that freezes the same shares."""
    killed = toy_command(tmp_path / "killed", *[f"--config.{word}" for word in RULE])
    # In the save of step 6, or where that was too quick, of 9: the shares from 4 on are decided.
    kill = killed.kill(Aim("save", 2, delay=0.0), random.Random(0))
    assert [d["start"] for d in decisions(killed.workdir)] in ([4], [4, 8]) and kill.newest < 12
    killed.finish()
    (tmp_path / "straight").mkdir()
    shutil.copy(killed.workdir / SEGMENTS, tmp_path / "straight" / SEGMENTS)
    run(tmp_path / "straight", *RULE)
    assert toyrun.bits(killed.workdir) == toyrun.bits(tmp_path / "straight")
    assert deterministic(killed.workdir) == deterministic(tmp_path / "straight")


def test_what_a_person_gets_wrong() -> None:
    with pytest.raises(UserError, match="'budgte'.*Did you mean 'budget'"):
        make_experiment(block("schedule.rule=budgte"))
    with pytest.raises(UserError, match="schedule.rebalance_every is -1"):
        make_experiment(block("schedule.rebalance_every=-1"))
    with pytest.raises(UserError, match="schedule.rebalance_every is 5, but no phase has the rule"):
        make_experiment(block("schedule.rebalance_every=5"))


def test_a_quarantine_about_to_begin_begins_at_the_boundary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No segment with the shares of before comes after the new one."""
    words = (*RULE, 'schedule.phases=({"start": 10, "weights": {"one": 1, "two": 5}},)', "steps=12")
    experiment = make_experiment(block(*words, 'tasks.three={"source": {"name": "toy"}, '
        '"inputs": {"toy": {}}, "batch": 8, "objective": {"name": "toy"}}'))  # fmt: skip
    clock = replace(fresh_clock(experiment), step=4)
    schedule = quarantine(clock.schedule, ["three"], 5, 4)
    assert schedule is not None
    clock = replace(clock, schedule=schedule, quarantined={"three": 5})
    monkeypatch.setattr(rebalance, "measured", lambda lines: {"one": 1.0, "two": 7.0, "three": 1.0})
    settled = Budget(experiment, epath.Path(tmp_path)).settle(clock).schedule.segments
    assert [s.start for s in settled] == [0, 4, 10]
    assert [s.weights.get("three", 0) for s in settled[1:]] == [0, 0]
    assert settled[1].weights["one"] > settled[1].weights["two"]


def test_a_decision_for_other_tasks_is_not_taken(tmp_path: Path, slow_two: None) -> None:
    experiment = make_experiment(block(*RULE))
    clock = replace(fresh_clock(experiment), step=4)
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"kind": "train", "step": 0, "task": "one", "visit": 0}) + "\n"
    )
    Budget(experiment, epath.Path(tmp_path)).settle(replace(clock, quarantined={"two": 2}))
    after = Budget(experiment, epath.Path(tmp_path)).settle(clock).schedule.segments[-1].weights
    assert after["two"] > 0
    assert [d["wanted"]["two"] for d in decisions(tmp_path)] == [0, 1]
