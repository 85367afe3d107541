"""Goodput: how a run spends its time, over all its attempts: `goodput.jsonl`.

The file only grows. Each attempt (each start of the process) writes

    {"line": "start", "attempt": 0, "pid": 71, "time": 1e9, "seconds": 0.0}
    {"line": "begin", "phase": "compile", "task": "image_text", ...}
    {"line": "end", "phase": "compile", "elapsed": 3.1, "self": 3.1, ...}
    {"line": "beat", "moved": {"wait_data": 0.4}, ...}
    {"line": "event", "name": "sigterm", ...}

and every line holds attempt, pid, `time` (the wall clock, for people) and `seconds` (since the
attempt's start by the monotonic clock, for sums: a wall clock may jump, durations may not). A
line is with the operating system before the call that wrote it returns, so an observer outside
sees which activity the process is in and a kill loses nothing.

Seconds are exclusive: a `save` inside `step` counts as save, not as step. Activities in use: restore,
init, compile, step, save, eval, report, wait_data.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from etils import epath

from mmjax.core.workdir import GOODPUT
from mmjax.monitor.line_file import LineFile, read_records

OTHER = "other"
STEP = "step"
REPEATED = "repeated"
# Activities of a run, as `summary` names them, in the order of every table and picture.
LABELS = {
    "step": "steps that count (goodput)",
    "repeated": "steps that were done again",
    "wait_data": "waiting for data",
    "compile": "compiling",
    "eval": "evaluating",
    "save": "saving",
    "restore": "making or restoring the state",
    "init": "opening data and checkpoint",
    "report": "writing the report",
    OTHER: "between these",
}
_COUNTS = ("total", "attempts", "unfinished")  # in `summary`, and no activities
_SUMS = (OTHER, REPEATED, "total", "attempts", "unfinished")
_STAMP = ("attempt", "pid", "time", "seconds")
_OWN = (*_STAMP, "line", "phase", "name", "elapsed", "self", "moved", "error")


@dataclass
class _Open:
    activity: str
    began: float
    inner: float = 0.0  # seconds of it that belong to activities inside, or were moved away


class ActivityLog:
    """Writes `goodput.jsonl` in `workdir`; a new attempt is noted at once.

    Activities are opened by the thread that made the log; `event` may be called by any.

    Args:
      workdir: local or an object store (there the file is rewritten at most every two seconds).
      clock: a monotonic clock in seconds.
      guard: called before lines are written; it raises if they must not be.
    """

    def __init__(
        self,
        workdir: epath.Path,
        clock: Callable[[], float] = time.monotonic,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        path = epath.Path(workdir) / GOODPUT
        self.attempt = sum(line["line"] == "start" for line in _read(path))
        self._clock = clock
        self._began = clock()
        self._thread = threading.get_ident()
        self._lock = threading.RLock()
        self._open: list[_Open] = []
        self._moved: dict[str, float] = defaultdict(float)
        self._lines = LineFile(path, guard)
        self._write("start", {})

    @contextmanager
    def activity(self, activity: str, **fields: Any) -> Iterator[None]:
        """Time a block: a begin line with `fields`, and an end line with its seconds.

        `elapsed` is the whole block and `self` what of it belongs to no inner activity. A block
        that raises ends too, with the name of the error in `error`.
        """
        self._check(activity, fields)
        entry = _Open(activity, self._clock())
        self._write("begin", {"phase": activity, **fields})
        self._open.append(entry)
        ending: dict[str, Any] = {}
        try:
            yield
        except BaseException as error:
            ending["error"] = type(error).__name__
            raise
        finally:
            self._end(entry, fields | ending)

    def add(self, activity: str, seconds: float) -> None:
        """Count `seconds` of the open activity as `activity` instead; write no line.

        For what happens every step, such as waiting for data: it goes out with the next line.
        """
        self._moved[activity] += seconds
        if self._open:
            self._open[-1].inner += seconds

    def beat(self, **fields: Any) -> None:
        """Write a line that marks the open activities as alive, so that a kill later loses less time."""
        self._check("beat", fields)
        self._write("beat", fields)

    def event(self, name: str, **fields: Any) -> None:
        """Write a line for something that happened at one moment."""
        self._check("event", fields, any_thread=True)
        self._write("event", {"name": name, **fields})

    def close(self) -> None:
        """Close the file. Calling it again does nothing."""
        self._lines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _end(self, entry: _Open, fields: Mapping[str, Any]) -> None:
        elapsed = max(self._clock() - entry.began, 0.0)
        self_seconds = max(elapsed - entry.inner, 0.0)
        self._open.pop()
        if self._open:
            self._open[-1].inner += elapsed
        seconds = {"elapsed": round(elapsed, 6), "self": round(self_seconds, 6)}
        self._write("end", {"phase": entry.activity, **seconds, **fields})

    def _write(self, line: str, fields: Mapping[str, Any]) -> None:
        with self._lock:
            record = {"line": line, **fields, **self._stamp()}
            if self._moved and line != "event":  # an event may come from another thread
                record["moved"] = dict(self._moved)
                self._moved.clear()
            self._lines.append(json.dumps(record) + "\n")
            self._lines.push()

    def _stamp(self) -> dict[str, int | float]:
        seconds = round(self._clock() - self._began, 6)
        wall = round(time.time(), 3)
        return {"attempt": self.attempt, "pid": os.getpid(), "time": wall, "seconds": seconds}

    def _check(self, activity: str, fields: Mapping[str, Any], any_thread: bool = False) -> None:
        if activity in _SUMS:
            raise ValueError(f"the activity name {activity!r} is reserved")
        for name in _OWN:
            if name in fields:
                raise ValueError(f"the field name {name!r} is reserved")
        if not any_thread and threading.get_ident() != self._thread:
            raise RuntimeError("phases are opened by the thread that made the log")


def summary(workdir: epath.Path) -> dict[str, float]:
    """Return the seconds by activity over all attempts in `workdir`, each second counted once.

    In addition to the activities: `repeated` (steps that a later attempt did again, because it resumed from an
    earlier one), `other` (inside no activity), `total` (their sum), `attempts` (a count) and
    `unfinished` (the count of attempts that were killed in an activity, or are still in one). Time of a
    killed attempt counts until its last line. Lines torn by a kill are passed over. An attempt that
    a `UserError` ended before its first step (a wrong config, other data) counts for nothing.
    """
    attempts: dict[tuple[int, int], list[_Attempt]] = {}
    for line in _read(epath.Path(workdir) / GOODPUT):
        parts = attempts.setdefault((line["attempt"], line["pid"]), [_Attempt()])
        parts[-1].take(line)
        if line["line"] == "event" and line["name"] == "diverged":
            parts.append(_Attempt(last=parts[-1].last))  # it resumes from an earlier step
    attempts = {key: parts for key, parts in attempts.items() if not parts[0].is_refused}
    pieces = [part for parts in attempts.values() for part in parts]
    sums: dict[str, float] = defaultdict(float, {OTHER: 0.0})
    again = math.inf  # the first step that a later attempt did
    for attempt in reversed(pieces):
        for (activity, step), seconds in attempt.sums.items():
            is_again = activity == STEP and again <= step < math.inf
            sums[REPEATED if is_again else activity] += seconds
        again = min(again, attempt.first_step)
    return {
        **sums,
        "total": sum(sums.values()),
        "attempts": float(len(attempts)),
        "unfinished": float(sum(bool(parts[-1].open) for parts in attempts.values())),
    }


def goodput(seconds: Mapping[str, float]) -> float:
    """Return the share of all time, as `summary` has it, that went into steps which count; 0 for no time."""
    return share_of_time(seconds.get(STEP, 0.0), seconds["total"])


def share_of_time(seconds: float, total: float) -> float:
    """Return the share of a run's time: `seconds` of an activity or a task in the `total` of all attempts.

    A task's seconds are those of the steps that count, from the end of the step before to their own: its waiting for
    data is among them. Every share of time that a table, the report or `summary.json` gives is this one.
    """
    return seconds / total if total > 0 else 0.0


def rows(seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return a row for each activity that took time: its name as `phase`, `label`, `seconds`, `share` of all.

    Args:
      seconds: as `summary` has them.
    """
    names = [*LABELS, *(name for name in seconds if name not in (*LABELS, *_COUNTS))]
    return [
        {
            "phase": name,
            "label": LABELS.get(name, name),
            "seconds": seconds[name],
            "share": share_of_time(seconds[name], seconds["total"]),
        }
        for name in names
        if seconds.get(name)
    ]


_Begun = tuple[
    str, float
]  # an activity, and the step at which it began; infinity where it states none


@dataclass
class _Attempt:
    """Replays the lines of one attempt: time between two lines belongs to the innermost activity."""

    sums: dict[_Begun, float] = field(default_factory=lambda: defaultdict(float))
    open: list[_Begun] = field(default_factory=list)
    last: float = 0.0
    errors: set[str] = field(default_factory=set)  # names of the errors that ended activities

    @property
    def is_refused(self) -> bool:
        """True if an error of the user's ended the attempt before its first step."""
        return "UserError" in self.errors and all(activity != STEP for activity, _ in self.sums)

    @property
    def first_step(self) -> float:
        """The first step that the attempt did; infinity if none."""
        return min((step for activity, step in self.sums if activity == STEP), default=math.inf)

    def take(self, line: Mapping[str, Any]) -> None:
        spent = max(line["seconds"] - self.last, 0.0)
        self.last = max(self.last, line["seconds"])
        self._charge(spent, line.get("moved", {}))
        if line["line"] == "begin":
            self.open.append((line["phase"], line.get("step", math.inf)))
            self.sums[self.open[-1]] += 0.0
        elif line["line"] == "end" and line["phase"] in [activity for activity, _ in self.open]:
            while self.open.pop()[0] != line["phase"]:
                pass
            if "error" in line:
                self.errors.add(line["error"])

    def _charge(self, spent: float, moved: Mapping[str, float]) -> None:
        activity = self.open[-1] if self.open else (OTHER, math.inf)
        self.sums[activity] += spent
        for other, seconds in moved.items():
            # Waits can overlap; what is moved never exceeds what the activity has.
            seconds = min(max(seconds, 0.0), self.sums[activity])
            self.sums[activity] -= seconds
            self.sums[other, math.inf] += seconds


def _read(path: epath.Path) -> list[dict[str, Any]]:
    return [line for line in read_records(path) if _is_line(line)]


def _is_line(line: Mapping[str, Any]) -> bool:
    """Return whether the fields that `summary` reads have the right types."""
    kind, moved = line.get("line"), line.get("moved", {})
    named = (
        {"begin": "phase", "end": "phase", "event": "name"}.get(kind)
        if isinstance(kind, str)
        else None
    )
    return (
        isinstance(kind, str)
        and (named is None or isinstance(line.get(named), str))
        and isinstance(line.get("attempt"), int)
        and isinstance(line.get("pid"), int)
        and isinstance(moved, dict)
        and all(_is_number(n) for n in (line.get("seconds"), line.get("step", 0), *moved.values()))
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
