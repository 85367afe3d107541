"""Kills a run from outside in a chosen activity and starts it again, until it is finished.

Nothing in the run knows of this: activities are read from `goodput.jsonl`, which a run writes as it goes, and
the signal is SIGKILL. `phase_at_death` reads from the same file what the process was doing when it died.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ASYNC_SAVE = "asynchronous save"
POLL = 0.001  # seconds between two looks at the run
# Seconds that a run that is to be killed runs between two looks at it: once its programs are compiled, and before.
SLICE, LONG_SLICE = 0.001, 0.01
LIMIT = 900.0  # seconds after which a process is stuck

# Seconds within an activity after which a kill falls, at most: an activity that comes once must last longer.
DELAYS: Mapping[str, float] = {
    "init": 0.2,
    "compile": 2.0,
    "restore": 0.08,
    "step": 0.03,
    "save": 0.1,
    "eval": 0.2,
    ASYNC_SAVE: 0.01,
}

Lines = list[dict[str, Any]]


@dataclass(frozen=True)
class Aim:
    """The place where a kill is to fall: in the `number`-th such activity of the process, or a later one."""

    activity: str
    number: int = 1
    delay: float | None = None  # at most, in seconds; `DELAYS` if None


class NotMetError(AssertionError):
    """The run ended before the aim was met: its activity was shorter than the drawn moment, each time."""


@dataclass(frozen=True)
class Kill:
    """A process that was killed.

    Attributes:
      activity: the innermost activity that was open in its log.
      writing: steps of the checkpoints that it was writing in the background.
      newest: step of the newest finished checkpoint in the workdir; -1 for none.
    """

    activity: str | None
    writing: tuple[int, ...]
    newest: int

    @property
    def hits(self) -> frozenset[str]:
        """Return what the kill interrupted."""
        behind = {ASYNC_SAVE} if self.writing and self.activity != "save" else set()
        return frozenset(behind | ({self.activity} if self.activity else set()))


@dataclass(frozen=True)
class Harness:
    """Starts, watches and kills the processes of one run.

    Attributes:
      command: what starts the run, or resumes it.
      environment: the whole environment of its processes.
      workdir: its workdir.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    workdir: Path

    def finish(self) -> str:
        """Run to the end without a kill; what it printed."""
        with tempfile.TemporaryFile("w+") as output:
            process = self._start(output)
            status = process.wait(LIMIT)
            output.seek(0)
            text = output.read()
        assert status == 0, f"exit status {status}:\n{text}"
        return text

    def ask(self, aim: Aim, number: signal.Signals) -> tuple[int, str]:
        """Send a signal that the run answers; its exit status and what it printed."""
        with tempfile.TemporaryFile("w+") as output:
            process = self._start(output)
            self._wait(process, lambda lines: _begun(lines, aim.activity) >= aim.number)
            process.send_signal(number)
            status = process.wait(LIMIT)
            output.seek(0)
            return status, output.read()

    def kill(self, aim: Aim, rng: random.Random) -> Kill:
        """Start the run and kill it, at a moment that `rng` draws.

        The run goes in slices and stands still while it is looked at, so that an activity of a few
        milliseconds is hit on an idle machine and on a busy one alike. Where the activity ends before
        the drawn moment, the kill falls into the next such activity, earlier.
        """
        most = DELAYS[aim.activity] if aim.delay is None else aim.delay
        with tempfile.TemporaryFile("w+") as output:
            tail = Tail(self.workdir)
            process = self._start(output)
            begun, delay = aim.number, rng.uniform(0, most)
            inside = 0.0  # seconds that the process ran since the activity began
            while True:
                lines = tail.of(process.pid)
                is_in = self._is_there(lines, aim.activity, begun)
                if is_in and inside >= delay:
                    break
                since = time.monotonic()
                if not is_in and inside:
                    begun = _begun(lines, aim.activity) + 1
                    delay, inside = delay / 2, 0.0
                is_compiled = any(x["line"] == "end" and x["phase"] == "compile" for x in lines)
                seconds = SLICE if is_compiled else LONG_SLICE
                if not (_go_on(process, seconds) if lines else _let_begin(process)):
                    output.seek(0)
                    raise NotMetError(f"{aim} was not met; the run printed:\n{output.read()}")
                inside += time.monotonic() - since if is_in else 0.0
            process.kill()
            process.wait(LIMIT)
        return self._state(log(self.workdir, process.pid))

    def _is_there(self, lines: Lines, activity: str, number: int) -> bool:
        """Return whether the process of these lines is in such an activity, the `number`-th or a later one."""
        if activity not in self._state(lines).hits:
            return False
        return activity == ASYNC_SAVE or _begun(lines, activity) >= number

    def _state(self, lines: Lines) -> Kill:
        """Return what the process of these lines of the log is doing."""
        saved = {x["step"] for x in lines if x["line"] == "begin" and x["phase"] == "save"}
        writing = tuple(s for s in unfinished_steps(self.workdir) if s in saved)
        return Kill(phase_of(lines), writing, max(finished_steps(self.workdir), default=-1))

    def _start(self, output: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command, env=dict(self.environment), stdout=output, stderr=output, text=True
        )

    def _wait(self, process: subprocess.Popen[str], is_there: Callable[[Lines], bool]) -> None:
        """Wait until `is_there` of this process's lines of the log, or its end."""
        limit = time.monotonic() + LIMIT
        while process.poll() is None and not is_there(log(self.workdir, process.pid)):
            if time.monotonic() > limit:
                process.kill()
                raise TimeoutError(f"{self.command} did not come so far in {LIMIT:.0f} seconds")
            time.sleep(POLL)


def survive(run: Harness, aims: Iterable[Aim], seed: int) -> list[Kill]:
    """Kill the run once for each of `aims`, each time in another process, then let it finish."""
    rng = random.Random(seed)
    kills = [run.kill(aim, rng) for aim in aims]
    run.finish()
    return kills


class Tail:
    """Reads what `goodput.jsonl` gains from now on, each line once.

    Args:
      workdir: of the run.
    """

    def __init__(self, workdir: Path) -> None:
        self._path, self._lines = workdir / "goodput.jsonl", list[dict[str, Any]]()
        self._read = self._path.stat().st_size if self._path.exists() else 0

    def of(self, pid: int) -> Lines:
        """Return the whole lines of a process so far."""
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._read)
                whole = file.read().rpartition(b"\n")[0]
            self._lines += [json.loads(line) for line in whole.split(b"\n") if line]
            self._read += len(whole) + 1 if whole else 0
        return [line for line in self._lines if line["pid"] == pid]


def log(workdir: Path, pid: int | None = None) -> Lines:
    """Return the whole lines of `goodput.jsonl`, of all processes or of one."""
    path = workdir / "goodput.jsonl"
    whole = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    lines = [json.loads(line) for line in whole if line]
    return [line for line in lines if pid is None or line["pid"] == pid]


def phase_of(lines: Lines) -> str | None:
    """Return the innermost activity that these lines of one process begin and do not end."""
    open_activities: list[str] = []
    for line in lines:
        if line["line"] == "begin":
            open_activities.append(line["phase"])
        elif line["line"] == "end":
            open_activities.pop()
    return open_activities[-1] if open_activities else None


def finished_steps(workdir: Path) -> tuple[int, ...]:
    """Return steps of the checkpoints that have their final name."""
    return tuple(sorted(int(name) for name in _checkpoints(workdir) if name.isdigit()))


def unfinished_steps(workdir: Path) -> tuple[int, ...]:
    """Return steps of the checkpoints that are being written, or were when a process died."""
    first = [name.split(".")[0] for name in _checkpoints(workdir) if not name.isdigit()]
    return tuple(sorted(int(name) for name in first if name.isdigit()))


def deterministic(workdir: Path) -> Lines:
    """Return the lines of `metrics.jsonl` without the fields that are times."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "timing"} for line in lines]


def contents(workdir: Path) -> dict[str, bytes]:
    """Return every file but the log of attempts, which grows with each start, and TensorBoard's."""
    files = [p for p in workdir.rglob("*") if p.is_file()]
    return {
        str(p.relative_to(workdir)): p.read_bytes()
        for p in files
        if p.name != "goodput.jsonl" and "tensorboard" not in p.parts
    }


def _checkpoints(workdir: Path) -> list[str]:
    folder = workdir / "checkpoints"
    return os.listdir(folder) if folder.exists() else []


def _begun(lines: Lines, activity: str) -> int:
    return sum(line["line"] == "begin" and line["phase"] == activity for line in lines)


def _let_begin(process: subprocess.Popen[str]) -> bool:
    """Let a process that has not begun its log run for a slice; False if it has ended."""
    time.sleep(SLICE)
    return process.poll() is None


def _go_on(process: subprocess.Popen[str], seconds: float) -> bool:
    """Let a process run for a slice, and halt all its threads again; False if it has ended."""
    process.send_signal(signal.SIGCONT)
    time.sleep(seconds)
    process.send_signal(signal.SIGSTOP)
    stat = Path(f"/proc/{process.pid}/stat")
    while process.poll() is None:
        if stat.read_text().rsplit(")", 1)[1].split()[0] in "Tt":
            return True
        time.sleep(POLL / 10)
    return False
