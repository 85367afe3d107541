"""Check where time goes: each second once, over kills and restarts."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.core.errors import UserError
from mmjax.core.workdir import GOODPUT
from mmjax.monitor.goodput import ActivityLog, goodput, summary


class _Clock:
    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def _lines(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / GOODPUT).read_text().splitlines()]


def test_lines_of_a_phase(tmp_path: Path) -> None:
    clock = _Clock(50.0)
    log = ActivityLog(epath.Path(tmp_path), clock)
    with log.activity("compile", task="a"):
        begun = _lines(tmp_path)
        clock.now += 2.0
    assert [line["line"] for line in begun] == ["start", "begin"]
    end = _lines(tmp_path)[-1]
    assert (end["line"], end["phase"], end["task"]) == ("end", "compile", "a")
    assert (end["elapsed"], end["self"], end["seconds"]) == (2.0, 2.0, 2.0)
    assert (end["attempt"], end["pid"]) == (0, os.getpid())


def test_nested_phases_count_once(tmp_path: Path) -> None:
    clock = _Clock()
    log = ActivityLog(epath.Path(tmp_path), clock)
    clock.now += 1
    with log.activity("step"):
        clock.now += 10
        with log.activity("save", step=3):
            clock.now += 4
            with log.activity("eval"):
                clock.now += 2
        clock.now += 5
    log.event("done")
    ends = {line["phase"]: line for line in _lines(tmp_path) if line["line"] == "end"}
    assert {name: line["self"] for name, line in ends.items()} == {"step": 15, "save": 4, "eval": 2}
    assert ends["step"]["elapsed"] == 21
    assert summary(epath.Path(tmp_path)) == {
        "other": 1,
        "step": 15,
        "save": 4,
        "eval": 2,
        "total": 22,
        "attempts": 1,
        "unfinished": 0,
    }


def test_time_added_inside_a_phase_moves(tmp_path: Path) -> None:
    clock = _Clock()
    log = ActivityLog(epath.Path(tmp_path), clock)
    with log.activity("step"):
        for _ in range(10):
            clock.now += 1.0
            log.add("wait_data", 0.25)
        assert len(_lines(tmp_path)) == 2  # nothing is written for it
        with log.activity("save"):
            clock.now += 3.0
        log.add("wait_data", 0.5)
        clock.now += 1.0
    assert _lines(tmp_path)[-1]["self"] == 8.0
    sums = summary(epath.Path(tmp_path))
    assert (sums["step"], sums["wait_data"], sums["save"], sums["total"]) == (8.0, 3.0, 3.0, 14.0)


def test_more_wait_than_time_never_makes_negative_seconds(tmp_path: Path) -> None:
    clock = _Clock()
    log = ActivityLog(epath.Path(tmp_path), clock)
    with log.activity("step"):
        clock.now += 1.0
        log.add("wait_data", 5.0)
    assert _lines(tmp_path)[-1]["self"] == 0.0
    sums = summary(epath.Path(tmp_path))
    assert (sums["step"], sums["wait_data"], sums["total"]) == (0.0, 1.0, 1.0)


_TREES: st.SearchStrategy[Any] = st.recursive(
    st.just([]),
    lambda inner: st.lists(
        st.tuples(st.sampled_from(["init", "step", "save", "eval"]), st.integers(0, 9), inner),
        max_size=4,
    ),
    max_leaves=8,
)


def _walk(log: ActivityLog, clock: _Clock, tree: Any, sums: dict[str, float]) -> None:
    for phase, seconds, inner in tree:
        with log.activity(phase):
            clock.now += seconds
            sums[phase] = sums.get(phase, 0) + seconds
            _walk(log, clock, inner, sums)


@given(st.lists(_TREES, min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_sums_equal_what_was_spent(attempts: list[Any]) -> None:
    sums: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as workdir:
        for number, tree in enumerate(attempts):
            clock = _Clock(1000.0 * number)
            with ActivityLog(epath.Path(workdir), clock) as log:
                assert log.attempt == number
                _walk(log, clock, tree, sums)
        found = summary(epath.Path(workdir))
    assert found.pop("attempts") == len(attempts)
    assert found.pop("total") == sum(sums.values())
    assert found.pop("other") == found.pop("unfinished") == 0
    assert found == sums


def test_a_killed_attempt_counts_until_its_last_line(tmp_path: Path) -> None:
    clock = _Clock()
    killed = ActivityLog(epath.Path(tmp_path), clock)
    step = killed.activity("step")
    step.__enter__()
    clock.now += 7.0
    killed.beat(step=70)
    clock.now += 1.0
    save = killed.activity("save")
    save.__enter__()
    clock.now += 100.0  # killed here: its later duration is unknown
    with (tmp_path / GOODPUT).open("a") as file:
        file.write('{"line": "end", "ph')
    again = ActivityLog(epath.Path(tmp_path), clock)
    with again.activity("step"):
        clock.now += 5.0
    sums = summary(epath.Path(tmp_path))
    assert (sums["step"], sums["save"], sums["attempts"], sums["unfinished"]) == (13.0, 0.0, 2, 1)


def _attempt(workdir: Path, clock: _Clock, stretches: list[tuple[int, float]]) -> None:
    """Write an attempt with a step phase of so many seconds from each of these steps on."""
    with ActivityLog(epath.Path(workdir), clock) as log:
        for step, seconds in stretches:
            with log.activity("step", step=step):
                clock.now += seconds
            with log.activity("save", step=step):
                clock.now += 1


def test_steps_that_a_later_attempt_does_again_are_not_useful(tmp_path: Path) -> None:
    """Checkpoints at 4 and 8: the first attempt ends after 8 without it, the second after 4."""
    clock = _Clock()
    _attempt(tmp_path, clock, [(0, 10), (4, 20), (8, 40)])
    with ActivityLog(epath.Path(tmp_path), clock) as log, log.activity("init"):
        clock.now += 3  # dies before it does a step
    _attempt(tmp_path, clock, [(8, 80), (12, 160)])
    _attempt(tmp_path, clock, [(4, 320), (8, 640), (12, 1280)])
    sums = summary(epath.Path(tmp_path))
    assert sums["step"] == 10 + 320 + 640 + 1280
    assert sums["repeated"] == 20 + 40 + 80 + 160
    assert sums["total"] == sum(10 * 2**i for i in range(8)) + 3 + 8
    assert goodput(sums) == pytest.approx(sums["step"] / sums["total"])


def test_a_run_that_goes_on_repeats_nothing(tmp_path: Path) -> None:
    clock = _Clock()
    _attempt(tmp_path, clock, [(0, 10), (4, 20)])
    _attempt(tmp_path, clock, [(8, 40)])
    sums = summary(epath.Path(tmp_path))
    assert sums["step"] == 70 and "repeated" not in sums
    assert goodput(summary(epath.Path(tmp_path / "nothing"))) == 0


def test_an_attempt_that_was_refused_counts_for_nothing(tmp_path: Path) -> None:
    """A wrong config, other data: the user's time, not the run's. An attempt that was killed counts."""
    clock = _Clock()
    _attempt(tmp_path, clock, [(0, 10)])
    expected = summary(epath.Path(tmp_path))
    for phase in ("init", "compile"):
        with suppress(UserError), ActivityLog(epath.Path(tmp_path), clock) as log:
            with log.activity("init"):
                clock.now += 500
                if phase == "init":
                    raise UserError("another config")
            with log.activity(phase):
                raise UserError("too large")
    assert summary(epath.Path(tmp_path)) == expected and expected["attempts"] == 1
    with suppress(OSError), ActivityLog(epath.Path(tmp_path), clock) as log, log.activity("init"):
        clock.now += 7
        raise OSError("the disk is gone")
    with (
        suppress(UserError),
        ActivityLog(epath.Path(tmp_path), clock) as log,
        log.activity("step", step=4),
    ):
        clock.now += 20
        raise UserError("no task is left")
    sums = summary(epath.Path(tmp_path))
    assert (sums["init"], sums["step"], sums["attempts"]) == (7, 30, 3)


def test_steps_that_a_divergence_gave_up_are_repeated(tmp_path: Path) -> None:
    """Within one process: from step 4 it goes back to 0, and does steps 0 to 4 again."""
    clock = _Clock()
    log = ActivityLog(epath.Path(tmp_path), clock=clock)
    for start, seconds in ((0, 10), (4, 20)):
        with log.activity("step", step=start):
            clock.now += seconds
    log.event("diverged", text="task a")
    for start, seconds in ((0, 40), (4, 80)):
        with log.activity("step", step=start):
            clock.now += seconds
    log.close()
    sums = summary(epath.Path(tmp_path))
    assert sums["step"] == 120 and sums["repeated"] == 30 and sums["attempts"] == 1


def test_a_wall_clock_that_jumps_changes_no_duration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = ActivityLog(epath.Path(tmp_path))
    with log.activity("step"):
        monkeypatch.setattr(time, "time", lambda: 0.0)  # back to 1970
    with log.activity("save"):
        monkeypatch.setattr(time, "time", lambda: 1e12)
    lines = _lines(tmp_path)
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds) and seconds[0] >= 0
    assert all(0 <= line["self"] < 60 for line in lines if line["line"] == "end")
    assert 0 <= summary(epath.Path(tmp_path))["total"] < 60


def test_a_phase_that_raises_ends_and_says_so(tmp_path: Path) -> None:
    log = ActivityLog(epath.Path(tmp_path))
    with pytest.raises(KeyError), log.activity("step"), log.activity("save"):
        raise KeyError("x")
    ends = [(line["phase"], line["error"]) for line in _lines(tmp_path) if line["line"] == "end"]
    assert ends == [("save", "KeyError"), ("step", "KeyError")]
    assert summary(epath.Path(tmp_path))["unfinished"] == 0


def test_two_processes_at_once_are_told_apart(tmp_path: Path) -> None:
    rows = [
        {"line": "start", "attempt": 0, "pid": 1, "seconds": 0},
        {"line": "begin", "phase": "step", "attempt": 0, "pid": 1, "seconds": 0},
        {"line": "start", "attempt": 0, "pid": 2, "seconds": 0},
        {"line": "begin", "phase": "init", "attempt": 0, "pid": 2, "seconds": 1},
        {"line": "end", "phase": "step", "attempt": 0, "pid": 1, "seconds": 10},
        {"line": "end", "phase": "init", "attempt": 0, "pid": 2, "seconds": 3},
    ]
    (tmp_path / GOODPUT).write_text("".join(json.dumps(row) + "\n" for row in rows))
    sums = summary(epath.Path(tmp_path))
    assert (sums["step"], sums["init"], sums["other"], sums["attempts"]) == (10, 2, 1, 2)


def test_reserved_names_and_other_threads_are_refused(tmp_path: Path) -> None:
    log = ActivityLog(epath.Path(tmp_path))
    with pytest.raises(ValueError, match="'total' is reserved"), log.activity("total"):
        pass
    with pytest.raises(ValueError, match="'seconds' is reserved"):
        log.event("x", seconds=3)
    caught: list[BaseException] = []

    def other() -> None:
        log.event("watchdog", stuck=True)
        try:
            with log.activity("step"):
                pass
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(caught) == 1 and "thread" in str(caught[0])
    assert _lines(tmp_path)[-1]["name"] == "watchdog"


def test_nothing_to_sum(tmp_path: Path) -> None:
    sums = summary(epath.Path(tmp_path))
    assert sums == {"other": 0, "total": 0, "attempts": 0, "unfinished": 0}


@pytest.mark.parametrize(
    "line",
    ["5", "null", "[1]", "{}", '{"line": "begin", "attempt": 0, "pid": 1, "seconds": 9.0}',
     '{"line": "begin", "phase": "step", "attempt": [0], "pid": 1, "seconds": 9.0}',
     '{"line": "begin", "phase": "step", "attempt": 0, "pid": 1, "seconds": "9"}',
     '{"line": "beat", "attempt": 0, "pid": 1, "seconds": 9.0, "moved": [1]}',
     '{"line": "beat", "attempt": 0, "pid": 1, "seconds": 9.0, "moved": {"save": "x"}}',
     '{"line": "event", "attempt": 0, "pid": 1, "seconds": 9.0}',
     '{"line": ["begin"], "attempt": 0, "pid": 1, "seconds": 9.0}', "[" * 100_000],
    ids=lambda x: x[:60],
)  # fmt: skip
def test_a_line_that_is_none_of_ours_is_passed_over(tmp_path: Path, line: str) -> None:
    clock = _Clock()
    with ActivityLog(epath.Path(tmp_path), clock) as log, log.activity("step", step=0):
        clock.now += 2.0
    expected = summary(epath.Path(tmp_path))
    whole = (tmp_path / GOODPUT).read_text()
    (tmp_path / GOODPUT).write_text(f"{line}\n{whole}{line}\n")
    assert summary(epath.Path(tmp_path)) == expected and expected["step"] == 2.0
    assert ActivityLog(epath.Path(tmp_path)).attempt == 1


_VICTIM = """
import sys, time
from etils import epath
from mmjax.monitor.goodput import ActivityLog
log = ActivityLog(epath.Path(sys.argv[1]))
with log.activity("step"):
    with log.activity("save", step=3):
        time.sleep(600)
"""


def _wait_for(path: Path, text: str, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.01)
    pytest.fail(f"the process ended with {process.returncode} before {text!r}")


def test_an_observer_kills_a_process_in_the_phase_it_chose(tmp_path: Path) -> None:
    for attempt in range(2):
        process = subprocess.Popen([sys.executable, "-c", _VICTIM, str(tmp_path)])
        try:
            stamp = f'"phase": "save", "step": 3, "attempt": {attempt}'
            _wait_for(tmp_path / GOODPUT, stamp, process)
        finally:
            process.kill()
            assert process.wait() == -signal.SIGKILL
    sums = summary(epath.Path(tmp_path))
    assert (sums["attempts"], sums["unfinished"]) == (2, 2)
