"""A task that is not well is excluded, the others continue, and an interruption changes none of it."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import toyrun
from etils import epath
from harness import Aim, Harness, NotMetError, deterministic, finished_steps, log, survive
from toyrun import run, watched

from mmjax import show, train
from mmjax.core.errors import UserError
from mmjax.data import order
from mmjax.schedule.schedule import Schedule
from mmjax.training import flight, loop
from mmjax.training.session import roll_back

# Task one is broken: its visits are steps 0, 2, 3, 5, ...
BROKEN = (f"tasks.one.objective.bad_gradient={tuple(range(40))}", "limits.max_non_finite_steps=2")
# Task two goes uphill: its losses are over the limit from step 4 on, and for long enough at step 13.
UPHILL = (
    "tasks.two.objective.climbs=true",
    "limits.divergence=1.5",
    "limits.divergence_visits=3",
    "optimizer.learning_rate=0.03",
    "steps=20",
)
BOTH = (
    *UPHILL,
    "tasks.bad={'source': {'name': 'toy'}, 'inputs': {'toy': {}}, 'batch': 8, 'objective': "
    f"{{'name': 'toy', 'bad_loss': {tuple(range(40))}}}}}",
    "limits.max_non_finite_steps=2",
)  # fmt: skip


def clock(workdir: Path) -> dict[str, Any]:
    result: dict[str, Any] = toyrun.meta(workdir)["clock"]
    return result


def segments(workdir: Path) -> list[tuple[int, dict[str, int]]]:
    return [(s.start, s.weights) for s in Schedule.from_json(clock(workdir)["segments"]).segments]


def tasks(workdir: Path) -> list[str]:
    lines = [x for x in deterministic(workdir) if x["kind"] == "train"]
    assert [x["step"] for x in lines] == list(range(len(lines)))
    return [x["task"] for x in lines]


def events(workdir: Path, name: str) -> list[str]:
    return [x["text"] for x in log(workdir) if x["line"] == "event" and x["name"] == name]


def same(workdir: Path, other: Path) -> None:
    assert toyrun.bits(workdir) == toyrun.bits(other)
    assert deterministic(workdir) == deterministic(other)
    assert (workdir / "results.json").read_bytes() == (other / "results.json").read_bytes()


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("broken") / "run"
    with watched() as seen:
        run(workdir, *BROKEN)
    (workdir / "ids.json").write_text(json.dumps(seen.ids))
    return workdir


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("both") / "run"
    run(workdir, *BOTH)
    return workdir


# --- non-finite steps in a row -----------------------------------------------------------------


def test_a_task_of_non_finite_steps_is_left_out(
    broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two in a row at step 2; the steps then under way still run as they were to."""
    assert tasks(broken) == ["one", "two", "one", "one"] + ["two"] * 8
    assert segments(broken) == [(0, {"one": 2, "two": 1}), (4, {"one": 0, "two": 1})]
    held = clock(broken)
    assert held["quarantined"] == {"one": 4} and held["skipped"] == {"one": 3, "two": 0}
    assert held["positions"] == {"one": 24, "two": 9 * 16}
    [told] = events(broken, "quarantine")
    assert told.startswith("task one is excluded from step 4 on: 2 steps in a row")
    show.show_run(epath.Path(broken), None, False)
    assert "Quarantined from step 4 on: one." in capsys.readouterr().out


def test_the_others_keep_their_place(broken: Path) -> None:
    seen = json.loads((broken / "ids.json").read_text())
    mine = [i for task, ids in zip(tasks(broken), seen, strict=True) if task == "two" for i in ids]
    assert mine == order.example_ids(toyrun.SEED, "two", 0, 9 * 16, 40).tolist()


def test_the_examples_named_once_a_task_is_excluded_are_those_that_are_read(tmp_path: Path) -> None:
    ids = order.example_ids(toyrun.SEED, "two", 0, 9 * 16, 40).reshape(9, 16)
    visits = {i: np.flatnonzero((ids == i).any(axis=1)) for i in range(40)}
    bad = next(i for i, v in visits.items() if np.diff(v).min() > 1 and v[0] > 0)
    run(tmp_path / "run", *BROKEN, f"tasks.two.objective.bad_loss=({bad},)")
    steps = [step for step, task in enumerate(tasks(tmp_path / "run")) if task == "two"]
    named = [text for text in events(tmp_path / "run", "non-finite") if "task two" in text]
    assert named == [
        f"step {steps[v]}, task two: no update; examples {', '.join(map(str, ids[v]))}"
        for v in visits[bad]
    ]


@pytest.mark.parametrize("stop", [2, 3, 4, 5])
def test_a_stop_anywhere_around_it_changes_nothing(
    broken: Path, stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, calls = flight.place, [0]

    def placed(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == stop:
            signal.raise_signal(signal.SIGTERM)
        return place(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(flight, "place", placed)
        assert run(tmp_path / "run", *BROKEN) is None
    assert finished_steps(tmp_path / "run")[-1] == stop
    run(tmp_path / "run", *BROKEN)
    same(tmp_path / "run", broken)


def test_a_longer_run_is_no_other(broken: Path, tmp_path: Path) -> None:
    """The end of the shorter one lies before the new segment begins."""
    run(tmp_path / "run", *BROKEN, "steps=3")
    assert clock(tmp_path / "run")["quarantined"] == {"one": 4}
    run(tmp_path / "run", *BROKEN)
    assert toyrun.bits(tmp_path / "run") == toyrun.bits(broken)


def test_a_task_whose_block_changes_is_tried_again(broken: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    run(workdir, *BROKEN)
    run(workdir, "limits.max_non_finite_steps=2", "steps=18", allow_change=True)
    assert segments(workdir)[2:] == [(12, {"one": 2, "two": 1})]
    assert clock(workdir)["quarantined"] == {} and tasks(workdir)[12:].count("one") == 4
    assert clock(workdir)["positions"]["one"] == 24 + 4 * 8


def test_another_change_leaves_it_out(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    run(workdir, *BROKEN)
    run(workdir, *BROKEN, "steps=18", "tasks.two.weight=3", allow_change=True)
    assert segments(workdir)[2:] == [(12, {"one": 0, "two": 3})]
    assert clock(workdir)["quarantined"] == {"one": 4}


def test_a_run_goes_on_where_a_later_phase_has_no_task_left(tmp_path: Path) -> None:
    """Also under a budget, which has nothing to share there; stopped in it, it resumes the same way."""
    phase = 'schedule.phases=({"start": 8, "rule": "budget", "weights": {"one": 1, "two": 0}},)'
    words = (*BROKEN, phase, "schedule.rebalance_every=5", "evaluation.every=0")
    run(tmp_path / "run", *words, "steps=9")
    run(tmp_path / "run", *words)
    assert tasks(tmp_path / "run")[4:] == ["two"] * 8
    assert segments(tmp_path / "run")[1:] == [(4, {"one": 0, "two": 1})]


# --- parameters that are broken ----------------------------------------------------------------


def test_a_rate_that_breaks_the_parameters_at_once_ends_the_run_with_one_error(
    tmp_path: Path,
) -> None:
    """No task is excluded for it: step 0 is finite, steps 1 to 3 are not, and neither task is at fault."""
    words = ("optimizer.learning_rate=1e30", "optimizer.warmup=0", "limits.max_non_finite_steps=2")
    with pytest.raises(
        UserError, match="no task has had a finite .* from step 1 to step 3, and no check"
    ) as error:
        run(tmp_path / "run", *words)
    assert "Lower optimizer.learning_rate" in str(error.value)
    assert not events(tmp_path / "run", "quarantine")


def broken_after(call: int) -> Callable[..., Any]:
    """Return a `flight.dispatch` whose call of this number (from 0) leaves parameters that are NaN."""
    dispatch, calls = flight.dispatch, [0]

    def dispatched(*arguments: Any) -> Any:
        state, metrics = dispatch(*arguments)
        calls[0] += 1
        if calls[0] != call + 1:
            return state, metrics
        nan = {
            n: jax.device_put(np.full(x.shape, np.nan, x.dtype), x.sharding)
            for n, x in state.parameters.items()
        }
        return replace(state, parameters=nan), metrics

    return dispatched


def test_parameters_that_a_step_broke_are_those_of_the_checkpoint_before_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 5 is of task one; the checkpoint of step 8 holds what it broke, that of step 4 does not."""
    workdir = tmp_path / "run"
    monkeypatch.setattr(flight, "dispatch", broken_after(5))
    run(workdir, "limits.max_non_finite_steps=2")
    [told] = events(workdir, "diverged")
    assert told.startswith("Task 'one' has diverged by step 8: no task has had a finite loss")
    assert tasks(workdir) == ["one", "two", "one", "one"] + ["two"] * 8
    assert clock(workdir)["quarantined"] == {"one": 4}
    assert [p.name for p in (workdir / "diverged").iterdir()] == ["8"]
    assert (workdir / "results.json").exists()
    assert all(np.isfinite(x).all() for x in toyrun.parameters(workdir).values())


@pytest.mark.parametrize("words", [["limits.divergence=0"], ["checkpoint.every=0"]])
def test_where_a_run_may_or_can_not_go_back_broken_parameters_end_it(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flight, "dispatch", broken_after(5))
    with pytest.raises(UserError, match="from step 6 to step 8"):
        run(tmp_path / "run", "limits.max_non_finite_steps=2", *words)


# --- finite divergence -------------------------------------------------------------------------


def test_a_divergence_goes_back_to_where_all_were_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = tmp_path / "run"
    with watched() as seen:
        run(workdir, *UPHILL)
    said = " ".join(capsys.readouterr().out.split())
    assert "Task 'two' has diverged by step 13" in said and "Resuming from step 8" in said
    assert "Continuing from step 8 without two." in said
    assert [text.split(":")[0] for text in events(workdir, "diverged")] == [
        "Task 'two' has diverged by step 13"
    ]
    assert segments(workdir) == [(0, {"one": 2, "two": 1}), (8, {"one": 2, "two": 0})]
    assert clock(workdir)["quarantined"] == {"two": 8}
    assert tasks(workdir)[8:] == ["one"] * 12 and tasks(workdir)[:8].count("two") == 3
    # The checkpoint of step 12 showed signs already: it is kept, but aside.
    assert [p.name for p in (workdir / "diverged").iterdir()] == ["12"]
    assert clock(workdir)["positions"] == {"one": 17 * 8, "two": 3 * 16}
    # After the 13 or 14 steps that were given up, task one is read again from its place at step 8.
    again = [i for ids in seen.ids[-12:] for i in ids]
    assert again == order.example_ids(toyrun.SEED, "one", 5 * 8, 96, 40).tolist()


@pytest.mark.parametrize("every", [4, 0])
def test_sigterm_on_the_way_back_is_honoured(
    every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a checkpoint to go back to, and from the beginning."""
    words = (*UPHILL, f"checkpoint.every={every}")
    run(tmp_path / "straight", *words)

    def signalled(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return roll_back(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(train, "roll_back", signalled)
        assert run(tmp_path / "run", *words) is None
    stood = 8 if every else 0
    assert f"Stopped by SIGTERM; saved step {stood}." in capsys.readouterr().out
    with watched() as seen:
        run(tmp_path / "run", *words)
    # The checkpoint of step 8 stays as it is, so its restart comes to the divergence again.
    assert len(seen.ids) >= 20 - stood
    same(tmp_path / "run", tmp_path / "straight")


def test_without_a_checkpoint_at_which_all_were_well_it_begins_anew(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    run(workdir, *UPHILL, "checkpoint.every=0")
    assert segments(workdir) == [(0, {"one": 2, "two": 0})]
    assert tasks(workdir) == ["one"] * 20 and clock(workdir)["positions"]["two"] == 0


def test_no_limit_no_divergence(tmp_path: Path) -> None:
    """The control: the losses do what the tests above assume."""
    run(tmp_path / "run", *UPHILL, "limits.divergence=0")
    lines = [x for x in deterministic(tmp_path / "run") if x["kind"] == "train"]
    losses = [x["loss"] for x in lines if x["task"] == "two"]
    assert min(losses[3:]) > 1.5 * sorted(losses[:3])[1]
    assert segments(tmp_path / "run") == [(0, {"one": 2, "two": 1})]


def test_the_last_task_that_diverges_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Task 'two' has diverged.*no other task is left"):
        run(tmp_path / "run", *UPHILL, "tasks.one.weight=0", "checkpoint.every=0")


def test_both_kinds_in_one_run(both: Path) -> None:
    held = clock(both)
    assert set(held["quarantined"]) == {"bad", "two"}
    assert set(tasks(both)[held["quarantined"]["two"] :]) == {"one"}


def test_killed_before_and_after_it_ends_in_the_same_bits(
    both: Path, tmp_path: Path, toy_command: Callable[..., Harness]
) -> None:
    """SIGKILL from outside: before the quarantine, before the divergence, and after the way back."""
    words = [f"--config.{word}" for word in BOTH]
    aims = [Aim("step", 1), Aim("step", 3), Aim("restore", 2), Aim("step", 2)]
    # A kill that falls behind the divergence leaves none for the next to meet: then all of it again.
    for attempt in range(4):
        workdir = tmp_path / f"run{attempt}"
        try:
            kills = survive(toy_command(workdir, *words), aims, seed=attempt)
        except NotMetError:
            continue
        assert len(kills) == 4
        same(workdir, both)
        return
    pytest.fail("no kill fell where it was aimed")


def test_a_task_without_visits_left_takes_over(tmp_path: Path) -> None:
    """Its program is there, though nothing at the start showed that it would run again."""
    workdir, shares = tmp_path / "run", ("tasks.one.weight=9", "tasks.two.weight=1")
    run(workdir, *shares, "steps=10")
    assert tasks(workdir).count("two") == 1
    run(workdir, *shares, *BROKEN, "steps=18", allow_change=True)
    assert tasks(workdir)[10:].count("two") > 1
    assert clock(workdir)["quarantined"].keys() == {"one"}


def test_a_shorter_run_than_was_done_only_evaluates(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    run(workdir, "steps=8")
    (workdir / "results.json").unlink()
    assert run(workdir, "steps=4")
    assert (workdir / "results.json").exists() and finished_steps(workdir)[-1] == 8


def test_results_of_an_earlier_end_do_not_stand_for_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = tmp_path / "run"
    run(workdir, "steps=4")
    with monkeypatch.context() as patched:
        patched.setattr(loop, "write_results", lambda *_: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(OSError, match="gone"):
            run(workdir, "steps=8")
    assert not (workdir / "results.json").exists()
    whole = run(tmp_path / "whole", "steps=8")
    assert run(workdir, "steps=8") == whole
