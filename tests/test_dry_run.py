"""A dry run: what it prints is what the run does, and it leaves no trace."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import jax
import mains
import numpy as np
import pytest
import toyrun
from harness import deterministic
from hypothesis import given, settings
from hypothesis import strategies as st
from toyrun import CONFIG, EXTRA, run

from mmjax import train
from mmjax.dry_run import letters_of, strip_lines
from mmjax.experiment import make_experiment
from mmjax.schedule.config import PhaseConfig
from mmjax.schedule.phase_specs import from_config

PHASES = 'schedule.phases=({"start": 8, "weights": {"two": 1}},)'


def dry(workdir: Path, *overrides: str) -> str:
    words = [f"--extra={EXTRA}", f"--config={CONFIG}", f"--workdir={workdir}", "--dry_run"]
    ended = mains.run(train.main, *words, *(f"--config.{word}" for word in overrides))
    assert (ended.status, ended.err) == (0, ""), ended
    return ended.out


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    found = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in found}


def steps_of(text: str) -> dict[int, str]:
    """Return the strip: first step of a line -> its tasks, by name."""
    text = text.partition("per line\n")[2].partition("\n\n")[0] or text
    names = dict(re.findall(r"^ {9}(\w)  (\w+)$", text, re.M))
    lines = re.findall(r"^ {1,9}(\d+)  ([\w ]+)$", text, re.M)
    return {int(n): " ".join(names[c] for c in line if c != " ") for n, line in lines}


def row(text: str, task: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.startswith(task))


@pytest.fixture
def nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a dry run compiles nothing")

    monkeypatch.setattr(jax.stages.Lowered, "compile", never)


@pytest.mark.usefixtures("nothing_compiles")
def test_a_fresh_run(tmp_path: Path) -> None:
    text = dry(tmp_path / "run", PHASES)
    assert "begin at step 0 of 12" in text
    assert steps_of(text) == {0: "one two one one two one one two two two two two"}
    assert row(text, "one")[1:5] == ["5", "41.7", "%", "40"]
    assert row(text, "two")[1:5] == ["7", "58.3", "%", "112"]
    data = text.partition("\nData\n")[2]  # of 40 examples
    assert row(data, "one") == ["one", "40", "40", "1"]
    assert row(data, "two") == ["two", "40", "112", "2.8"]
    assert "ASSUMED" in text and not (tmp_path / "run").exists()
    assert max(map(len, text.splitlines())) <= 80 and "\x1b" not in text


def test_expected_hours_follow_from_model_flops(tmp_path: Path) -> None:
    """By hand: FLOPs of `tests/engine/test_steps.py` over the FLOP/s that is printed."""
    text = dry(tmp_path / "run", "steps=36000000")
    rate = float(re.search(r"at ([\d.]+) GFLOP/s", text)[1]) * 1e9
    one, two = (3 * 2 * 8 * (2 * 176 + 8) - 8 * 2 * 96, 3 * 2 * 16 * (3 * 176 + 8) - 16 * 3 * 96)
    expected = {"one": 24e6 * one / rate / 3600, "two": 12e6 * two / rate / 3600}
    for task, hours in expected.items():
        assert float(row(text, task)[-4]) == pytest.approx(hours, rel=1e-2)


def test_a_run_under_way_is_read_and_left_alone(tmp_path: Path) -> None:
    run(tmp_path / "run", "steps=8")
    before = files(tmp_path / "run")
    text = dry(tmp_path / "run")
    assert files(tmp_path / "run") == before
    assert "resume from step 8 of 12" in text
    assert f"Step times are those measured in {tmp_path / 'run'}." in text and "FLOPs" not in text
    run(tmp_path / "run")
    tasks = [x["task"] for x in deterministic(tmp_path / "run") if x["kind"] == "train"]
    assert steps_of(text) == {8: " ".join(tasks[8:])}
    assert "holds all 12 steps" in dry(tmp_path / "run")
    assert "is at step 12, beyond steps = 10." in dry(tmp_path / "run", "steps=10")


def test_step_times_of_a_run_whose_checkpoints_are_gone(tmp_path: Path) -> None:
    run(tmp_path / "run", "steps=1", "schedule.rule=interval", "tasks.one.weight=1")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    text = dry(tmp_path / "run")
    assert "begin at step 0" in text
    assert "?" not in row(text, "one") and "?" in row(text, "two")
    assert "the rate of the measured tasks" in text


def refused_dry(workdir: Path, *overrides: str) -> str:
    words = [f"--extra={EXTRA}", f"--config={CONFIG}", f"--workdir={workdir}", "--dry_run"]
    return mains.refused(train.main, *words, *(f"--config.{word}" for word in overrides))


LACKING = "tasks.two.inputs.toy.field=valeus"
EVALUATED = "tasks.two.evaluators={'loss': {'name': 'held_out_loss', 'source': %r}}"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (LACKING, "tasks.two reads field 'valeus', which toy 40 lacks. It has: values, id, label"),
        (
            "tasks.two.source={'name': 'tfds', 'dataset': 'none', 'split': 'x'}",
            "'none' is not built",
        ),
        (
            EVALUATED % {"name": "tfds", "dataset": "emoji", "split": "nowhere"},
            "data set 'emoji' has no split 'nowhere'",
        ),
        (
            EVALUATED % {"name": "tfds", "dataset": "emoji", "split": "train"},
            "tasks.two.evaluators reads field 'values'",
        ),
    ],
)
def test_it_stops_where_the_run_would(
    tmp_path: Path, emoji_dir: object, override: str, words: str
) -> None:
    said = refused_dry(tmp_path / "run", override)
    assert words in said
    (tmp_path / "run").mkdir()
    run_words = [f"--extra={EXTRA}", f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}"]
    assert mains.refused(train.main, *run_words, f"--config.{override}") == said


def test_it_stops_where_the_data_have_changed(tmp_path: Path) -> None:
    values = np.zeros((40, 4, 6), np.float32)
    np.save(tmp_path / "values.npy", values)
    source = f"tasks.one.source={{'name': 'toy', 'file': {str(tmp_path / 'values.npy')!r}}}"
    run(tmp_path / "run", source, "steps=4")
    assert "resume from step 4" in dry(tmp_path / "run", source)
    np.save(tmp_path / "values.npy", values + 1)
    assert "has changed since: tasks.one.source" in refused_dry(tmp_path / "run", source)


def test_a_changed_schedule_needs_to_be_allowed(tmp_path: Path) -> None:
    run(tmp_path / "run", "steps=4")
    words = [f"--extra={EXTRA}", f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}", "--dry_run"]
    words.append("--config.tasks.two.weight=9")
    assert "allow_change" in mains.refused(train.main, *words)
    assert "two 9" in mains.run(train.main, *words, "--allow_change").out


def test_a_budget_is_shown_in_integers(tmp_path: Path) -> None:
    text = dry(tmp_path / "run", "schedule.rule=budget", "schedule.rebalance_every=5")
    weights = make_experiment(toyrun.block("schedule.rule=budget")).planned.schedule().segments[0]
    assert f"shares (budget)  one {weights.weights['one']}" in text
    assert "every 5 steps" in text
    # Two to one in time, whatever the FLOP/s.
    assert [float(row(text, task)[-2]) for task in ("one", "two")] == pytest.approx([66.7, 33.3], abs=6)  # fmt: skip


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text("ab_", min_size=1, max_size=4), min_size=1, max_size=70, unique=True))
def test_letters_tell_tasks_apart(names: list[str]) -> None:
    letters = letters_of(names)
    known = [letter for letter in letters.values() if letter != "?"]
    assert len(set(known)) == len(known) == min(len(names), 62)
    assert all(len(letter) == 1 and letter.isalnum() for letter in known)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 400), min_size=0, max_size=12), st.integers(0, 700), st.data())
def test_the_strip_is_the_schedule(lengths: list[int], start: int, data: st.DataObject) -> None:
    starts = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    phases = [PhaseConfig(s, {"a": 1, "b": 1 + s % 3}) for s in starts]
    schedule = from_config("shares", {"a": 3, "b": 1}, 0, phases)
    stop = start + data.draw(st.integers(1, 2000))
    lines = list(strip_lines(schedule, start, stop))
    assert max(map(len, lines)) <= 80
    for first, tasks in steps_of("\n".join(lines)).items():
        assert tasks.split() == schedule.sequence(first, min(first + 60, stop))
    assert steps_of("\n".join(lines)).keys() >= {*range(start, min(start + 300, stop), 60)}
