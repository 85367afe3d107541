"""One, two and four processes: the same examples, the same parameters, and an end that all agree on."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import toyrun
from etils import epath
from harness import LIMIT, deterministic, finished_steps, log

from mmjax import train
from mmjax.engine.lease import Lease
from mmjax.engine.lease_store import FileStore

HERE = Path(__file__).resolve().parent
CLOSE = 1e-10
STEPS = 12
DOUBLE = ("--config.dtype.parameters=float64", "--config.dtype.compute=float64")


@dataclass(frozen=True)
class Ended:
    """The end of the processes of one attempt, and what they printed (standard output and error)."""

    statuses: list[int]
    said: list[str]


@dataclass(frozen=True)
class Team:
    """Starts all processes of a run over loopback.

    Attributes:
      folder: `run` is the workdir; `ids` and `said` lie beside it.
      environment_of: `conftest.environment_of`.
    """

    folder: Path
    environment_of: Callable[..., dict[str, str]]

    @property
    def workdir(self) -> Path:
        return self.folder / "run"

    def start(
        self, count: int, devices: int, attempt: str, seconds: float, words: Sequence[str],
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> list[subprocess.Popen[bytes]]:  # fmt: skip
        (self.folder / attempt).mkdir(parents=True)
        port = free_port()
        extra, config = HERE.parent / "extra", HERE.parent / "configs" / "toy.py"
        common = [f"--extra={extra}", f"--config={config}", f"--workdir={self.workdir}", *DOUBLE]
        together = [f"--coordinator=127.0.0.1:{port}", f"--processes={count}"] if count > 1 else []
        started = []
        for index in range(count):
            mine = [f"--process={index}"] if count > 1 else []
            driver = [str(HERE / "member.py"), str(self.folder / attempt), str(seconds)]
            with (self.folder / attempt / f"{index}.said").open("wb") as said:
                started.append(
                    subprocess.Popen(
                        [sys.executable, *driver, *common, *together, *mine, *words],
                        env=self.environment_of(devices, {"JAX_ENABLE_X64": "1", **environment}),
                        stdout=said, stderr=said,
                    )
                )  # fmt: skip
        return started

    def run(
        self,
        count: int,
        devices: int,
        attempt: str,
        *words: str,
        seconds: float = 0.0,
        meanwhile: Callable[[list[subprocess.Popen[bytes]]], None] = lambda started: None,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> Ended:
        started = self.start(count, devices, attempt, seconds, words, environment)
        try:
            meanwhile(started)
            statuses = [each.wait(LIMIT) for each in started]
        finally:
            for each in started:
                each.kill()
        said = [(self.folder / attempt / f"{i}.said").read_text() for i in range(count)]
        return Ended(statuses, said)

    def wait_for_step(self, step: int, pid: int) -> None:
        """Wait until process 0 is in the stretch of steps that begins at `step`."""
        limit = time.monotonic() + LIMIT
        while not any(
            x["line"] == "begin" and x["phase"] == "step" and x["step"] == step
            for x in log(self.workdir, pid)
        ):
            assert time.monotonic() < limit, "the run does not come so far"
            time.sleep(0.01)

    def ids(self, attempt: str) -> list[list[int]]:
        """Return the examples of each step in the order of the global batch, from what each process noted."""
        parts = [p.read_text().splitlines() for p in (self.folder / attempt).glob("*.jsonl")]
        steps = []
        for lines in zip(*parts, strict=False):  # one that was killed may be a step behind
            rows = {start: ids for start, ids in map(json.loads, lines)}
            steps.append([i for start in sorted(rows) for i in rows[start]])
        return steps

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        return toyrun.parameters(self.workdir)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def team(
    tmp_path_factory: pytest.TempPathFactory, environment_of: Callable[..., dict[str, str]]
) -> Callable[[str], Team]:
    toyrun.block()  # the toy's modules, for reading checkpoints here
    return lambda name: Team(tmp_path_factory.mktemp(name), environment_of)


@pytest.fixture(scope="module")
def alone(team: Callable[[str], Team]) -> Team:
    """Return a run of one process on one device that nothing disturbed."""
    result = team("alone")
    ended = result.run(1, 1, "whole")
    assert ended.statuses == [0], ended.said
    return result


def same(one: Team, other: Team) -> None:
    """Check for the same course in the metrics, and the same parameters up to the order of sums."""
    a, b = one.arrays(), other.arrays()
    assert a.keys() == b.keys() and all(x.dtype == np.float64 for x in a.values())
    for name in a:
        np.testing.assert_allclose(b[name], a[name], rtol=CLOSE, atol=CLOSE, err_msg=name)
    lines, others = deterministic(one.workdir), deterministic(other.workdir)
    assert [_text(x) for x in others] == [_text(x) for x in lines]
    for x, y in zip(lines, others, strict=True):
        assert x.keys() == y.keys()
        floats = {k for k, v in x.items() if isinstance(v, float)}
        assert all(abs(x[k] - y[k]) <= CLOSE * max(1, abs(x[k])) for k in floats)
    clocks = [toyrun.meta(team.workdir)["clock"] for team in (one, other)]
    for clock in clocks:
        assert clock.pop("health").keys() == {"one", "two"}  # losses, compared above
    assert clocks[0] == clocks[1]


def _text(line: dict[str, Any]) -> set[tuple[str, Any]]:
    return {(k, v) for k, v in line.items() if not isinstance(v, float)}


def test_asked_to_stop_all_stop_at_one_step_and_another_team_goes_on(
    alone: Team, team: Callable[[str], Team]
) -> None:
    """Two processes of one device, SIGTERM to the second; then four processes of two devices."""
    run = team("asked")

    def ask(started: list[subprocess.Popen[bytes]]) -> None:
        run.wait_for_step(4, started[0].pid)
        started[1].send_signal(signal.SIGTERM)

    ended = run.run(2, 1, "first", seconds=0.3, meanwhile=ask)
    assert ended.statuses == [train.STOPPED] * 2, ended.said
    step = finished_steps(run.workdir)[-1]
    assert 4 <= step < STEPS and f"Stopped by another process; saved step {step}" in ended.said[0]
    assert [x["step"] for x in deterministic(run.workdir) if x["kind"] == "train"][-1] == step - 1
    ended = run.run(4, 2, "second")
    assert ended.statuses == [0] * 4, ended.said
    assert "processes 2 -> 4" in ended.said[0] and "devices 2 -> 8" in ended.said[0]
    # Only the first prints, and only it writes.
    assert not any("step" in said or "Results" in said for said in ended.said[1:])
    assert run.ids("first") + run.ids("second") == alone.ids("whole")
    same(alone, run)


def test_one_is_killed_the_others_end_and_another_team_goes_on(
    alone: Team, team: Callable[[str], Team]
) -> None:
    """Two processes of two devices, SIGKILL to the second; then one process of two devices."""
    run = team("killed")

    def kill(started: list[subprocess.Popen[bytes]]) -> None:
        run.wait_for_step(4, started[0].pid)
        while not finished_steps(run.workdir):
            time.sleep(0.01)
        started[1].kill()

    ended = run.run(2, 2, "first", seconds=0.3, meanwhile=kill)
    assert ended.statuses[1] == -signal.SIGKILL
    assert ended.statuses[0] not in (0, train.STOPPED), ended.said[0]
    assert "Another process of this run has ended" in ended.said[0] or ended.statuses[0] < 0
    step = finished_steps(run.workdir)[-1]
    ended = run.run(1, 2, "second")
    assert ended.statuses == [0], ended.said
    assert run.ids("first")[:step] + run.ids("second") == alone.ids("whole")
    same(alone, run)


def test_the_parameters_are_compared_where_they_moved(alone: Team) -> None:
    """The control: what is tolerated is far below what one step changes."""
    before = toyrun.parameters_of(alone.workdir, 8)
    after = alone.arrays()
    assert all(np.abs(after[n] - before[n]).max() > 1e6 * CLOSE for n in after)
    assert len({tuple(ids) for ids in alone.ids("whole")}) == STEPS


def test_processes_that_were_started_otherwise_are_told_which_keys_differ(
    team: Callable[[str], Team],
) -> None:
    run = team("otherwise")
    started = run.start(2, 1, "first", 0.0, ["--config.steps=4"])
    started[1].kill()
    port = next(w for w in started[0].args if str(w).startswith("--coordinator="))  # type: ignore[union-attr]
    words = [w for w in started[0].args if not str(w).startswith("--process=")]  # type: ignore[union-attr]
    with (run.folder / "first" / "other.said").open("wb") as said:
        other = subprocess.Popen(
            [*words, "--process=1", "--config.tasks.one.batch=16"],
            env=run.environment_of(1, {"JAX_ENABLE_X64": "1"}), stdout=said, stderr=said,
        )  # fmt: skip
    assert port and [started[0].wait(LIMIT), other.wait(LIMIT)] == [2, 2]
    for name in ("0.said", "other.said"):
        text = (run.folder / "first" / name).read_text()
        assert (
            "Process 1 was started differently from process 0: config.tasks.one.batch: 8 there, 16"
            in text
        )
    assert not finished_steps(run.workdir)


def test_a_process_that_all_wait_for_is_named(
    team: Callable[[str], Team], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = team("slow")
    monkeypatch.setenv("MEMBER_SLOW", "1:0.5")  # seconds for each batch of process 1
    words = ["--config.loader.threads=1", "--config.loader.prefetch=1", "--config.steps=8"]
    words += [f"--config.tasks.{task}.evaluators={{}}" for task in ("one", "two")]
    ended = run.run(2, 1, "first", *words)
    assert ended.statuses == [0, 0], ended.said
    assert "slow process: process 1 waits" in ended.said[0]
    events = [x for x in map(json.loads, (run.workdir / "goodput.jsonl").open()) if "text" in x]
    waits = [re.search(r"process 1 waits ([\d.e-]+) s", x["text"]) for x in events]
    # Not what a process waits anyway, which is milliseconds.
    assert max(float(wait[1]) for wait in waits if wait) > 0.1


def test_all_processes_of_a_second_run_end_where_another_lives(team: Callable[[str], Team]) -> None:
    made = team("second")
    made.workdir.mkdir()
    store = FileStore(made.workdir)
    lease = Lease(epath.Path(made.workdir), "train", store)  # of this process
    lease.take()
    before = store.read()
    ended = made.run(2, 1, "attempt")
    assert ended.statuses == [2, 2], ended.said
    assert all(f"is in use: train, process {os.getpid()} on" in said for said in ended.said)
    assert store.read() == before and [p.name for p in made.workdir.iterdir()] == ["lease.json"]
