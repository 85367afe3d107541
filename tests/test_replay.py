"""One visit of one task, replayed alone, gives what the metrics of the run hold."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
import toyrun
from etils import epath
from harness import contents, deterministic
from toyrun import run

from mmjax.core.errors import UserError
from mmjax.replay import Replayed, find_visit, replay
from mmjax.schedule.config import PhaseConfig
from mmjax.schedule.phase_specs import from_config
from mmjax.schedule.schedule import Schedule

ROOT = Path(__file__).resolve().parent
# Non-finite steps, a task that is excluded, and a change of the config at step 12.
FIRST = ("tasks.one.objective.bad_loss=(13,)", "limits.max_non_finite_steps=2")
CHANGE = (*FIRST, "tasks.one.weight=1", "tasks.one.batch=4", "steps=20")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = tmp_path_factory.mktemp("replay") / "run"
    run(result, *FIRST, "checkpoint.keep=9")
    run(result, *CHANGE, "checkpoint.keep=9", allow_change=True)
    return result


def again(workdir: Path, task: str, visit: int) -> Replayed:
    return replay(epath.Path(workdir), task, visit, jax.devices()[:1])


def told(workdir: Path, task: str, visit: int) -> dict[str, Any]:
    lines = [x for x in deterministic(workdir) if x["kind"] == "train"]
    [line] = [x for x in lines if (x["task"], x["visit"]) == (task, visit)]
    return line


def non_finite(workdir: Path) -> int:
    lines = [x for x in deterministic(workdir) if x["kind"] == "train" and x["task"] == "one"]
    return next(x["visit"] for x in lines if x["loss"] == "nan")


# Visits: before the first checkpoint; the first after one; some steps after one; behind the change.
@pytest.mark.parametrize(
    "task, visit, start",
    [("two", 0, 0), ("one", 3, 4), ("two", 2, 4), ("one", 8, 12), ("one", 9, 16)],
)
def test_a_visit_replayed_gives_the_same_bits(
    workdir: Path, task: str, visit: int, start: int
) -> None:
    before = contents(workdir)
    found = again(workdir, task, visit)
    line = told(workdir, task, visit)
    assert found.is_same
    assert found.now == {n: float(line[n]) for n in ("loss", "grad_norm")}
    assert (found.step, found.start) == (line["step"], start)
    assert contents(workdir) == before


def test_a_step_that_was_not_finite_is_not_finite_again(workdir: Path) -> None:
    found = again(workdir, "one", non_finite(workdir))
    assert found.is_same and found.now["loss"] != found.now["loss"]


def test_metrics_that_tell_otherwise_are_found_out(workdir: Path, tmp_path: Path) -> None:
    """The control: the last bit of one number."""
    copy = Path(shutil.copytree(workdir, tmp_path / "run"))
    line = told(copy, "two", 1)
    text = (copy / "metrics.jsonl").read_text()
    other = float.fromhex(line["loss"].hex()) * (1 + 2**-52)
    changed = text.replace(json.dumps(line["loss"]), json.dumps(other))
    assert changed != text
    (copy / "metrics.jsonl").write_text(changed)
    assert not again(copy, "two", 1).is_same


def test_visits_that_never_were_are_refused(workdir: Path) -> None:
    with pytest.raises(UserError, match="no such task.*Did you mean 'two'"):
        again(workdir, "tow", 0)
    visits = Schedule.from_json(toyrun.meta(workdir)["clock"]["segments"]).visits(20)["two"]
    for visit in (-1, visits):
        with pytest.raises(UserError, match=f"has {visits} visits"):
            again(workdir, "two", visit)


def test_a_visit_is_found_by_bisection() -> None:
    schedule = from_config("random", {"a": 3, "b": 1}, 1, [PhaseConfig(50, {"a": 1, "b": 5})])
    steps = {(schedule.task(s), schedule.visit(s)): s for s in range(120)}
    assert {k: find_visit(schedule, *k, 120) for k in steps} == steps


def test_the_main_says_what_it_found(
    workdir: Path, environment_of: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    words = [f"--extra={ROOT / 'extra'}", f"--workdir={workdir}", "--task=two", "--visit=2"]
    done = subprocess.run(
        [sys.executable, "-m", "mmjax", "replay", *words], env=environment_of(1), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    line = told(workdir, "two", 2)
    assert done.returncode == 0, done.stderr
    assert f"is step {line['step']}; replayed from step 4." in done.stdout
    assert done.stdout.count(repr(line["loss"])) == 2 and "the same bits." in done.stdout
