"""Signals that ask a run to stop: it saves, and resumes to the same bits."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Aim, Harness, finished_steps, log
from resumed import same
from toyrun import run, watched

from mmjax import train
from mmjax.engine.checkpoint import Checkpoints
from mmjax.training import flight, loop
from mmjax.training.evaluation import Evaluation


@pytest.fixture
def raised(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[int]]]:
    """Return `raised(owner, name, number)`: SIGTERM comes when `owner.name` is called for the `number`-th time."""
    # Handlers are for the main thread; elsewhere the signal would end the whole test run.
    assert threading.current_thread() is threading.main_thread()

    def arm(owner: Any, name: str, number: int, after: bool = False) -> list[int]:
        calls, function = [0], getattr(owner, name)

        def wrapped(*arguments: Any, **more: Any) -> Any:
            calls[0] += 1
            if calls[0] == number and not after:
                signal.raise_signal(signal.SIGTERM)
            result = function(*arguments, **more)
            if calls[0] == number and after:
                signal.raise_signal(signal.SIGTERM)
            return result

        monkeypatch.setattr(owner, name, wrapped)
        return calls

    yield arm


# Where the signal comes; the step at which the run must then stand.
MOMENTS: dict[str, tuple[Any, str, int, bool, int]] = {
    "before the first step": (loop, "Loader", 1, False, 0),
    "in a step": (flight, "place", 3, False, 3),
    "in the last step before a checkpoint": (flight, "place", 4, False, 4),
    "in a save": (Checkpoints, "save", 1, False, 4),
    "after a save": (Checkpoints, "save", 1, True, 4),
    "in an evaluation": (Evaluation, "__call__", 1, False, 6),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_sigterm_saves_and_going_on_ends_in_the_same_bits(
    tmp_path: Path,
    straight: Path,
    moment: str,
    raised: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    owner, name, number, after, step = MOMENTS[moment]
    with monkeypatch.context():
        calls = raised(owner, name, number, after)
        assert run(tmp_path / "run") is None
        assert calls[0] >= number
    monkeypatch.undo()
    assert f"Stopped by SIGTERM; saved step {step}." in capsys.readouterr().out
    assert finished_steps(tmp_path / "run")[-1] == step
    assert not (tmp_path / "run" / "results.json").exists()
    told = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert sum(row["steps"] for row in told["tasks"]) == step and told["seconds"]["total"] > 0
    with watched() as seen:
        run(tmp_path / "run")
    assert len(seen.ids) == 12 - step
    same(tmp_path / "run", straight)


def test_sigterm_again_before_the_first_new_step(
    half: Path, straight: Path, raised: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    raised(loop, "Loader", 1)
    assert run(half) is None
    monkeypatch.undo()
    assert finished_steps(half)[-1] == 8
    run(half)
    same(half, straight)


def test_sigterm_before_an_evaluation_that_is_done_again_leaves_it(
    tmp_path: Path, raised: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restart from step 8 evaluates there; one that is to stop does not begin to."""
    words = ("evaluation.every=4",)
    run(tmp_path / "straight", *words)
    workdir = Path(shutil.copytree(tmp_path / "straight", tmp_path / "run"))
    shutil.rmtree(workdir / "checkpoints" / "12")
    (workdir / "results.json").unlink()
    raised(loop, "Loader", 1)
    assert run(workdir, *words) is None
    monkeypatch.undo()
    begun = [x for x in log(workdir) if x["attempt"] == 1 and x["line"] == "begin"]
    assert {x["phase"] for x in begun if "step" in x} == {"save"}
    run(workdir, *words)
    same(workdir, tmp_path / "straight")


def test_sigterm_in_the_last_evaluation_lets_the_run_end(
    half: Path, straight: Path, raised: Callable[..., list[int]]
) -> None:
    raised(Evaluation, "__call__", 1)
    assert run(half) is not None
    same(half, straight)


def test_sigterm_ends_the_process_with_status_3(
    tmp_path: Path, straight: Path, toy_command: Callable[..., Harness]
) -> None:
    harness = toy_command(tmp_path / "run")
    status, said = harness.ask(Aim("step", 2), signal.SIGTERM)
    assert status == train.STOPPED == 3, said
    step = finished_steps(tmp_path / "run")[-1]
    assert f"Stopped by SIGTERM; saved step {step}." in said and 4 <= step < 12
    run(tmp_path / "run")
    same(tmp_path / "run", straight)
