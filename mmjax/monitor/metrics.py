"""Metrics of a run, step by step: `metrics.jsonl` and TensorBoard events.

One JSON object per line. A line about a training step S (counted from 0) is

    {"kind": "train", "step": S, "task": "...", "loss": ..., ..., "timing": {...}}

and a line about an evaluation taken after S steps are complete is

    {"kind": "eval", "step": S, "count": ..., "name": "...", "task": "...", "value": ..., ...}

Everything outside `timing` is deterministic: the same run gives the same bytes. Numbers are
written so that reading gives the same float64, and so the same float32; what JSON cannot express is
written as "nan", "inf" and "-inf".

Restarting from a checkpoint of R complete steps keeps exactly the lines with `step < R`. For
training this is plain: steps 0 to R-1 are in the checkpoint. An evaluation after R steps belongs
to what follows the checkpoint of R: the loop evaluates at R *before* it trains step R, and a run
that starts again from R takes that evaluation again. So each line is written once. The lines that a
restart does again are moved to `metrics.jsonl.replaced-N`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from mmjax.core.errors import UserError
from mmjax.core.files import is_local, naming, read_bytes, replace_file
from mmjax.core.workdir import METRICS
from mmjax.monitor.line_file import LineFile

_WORDS = (
    "kind",
    "task",
    "name",
    "split",
    "unit",
    "better",
    "bucket",
    "evaluator",
    "time",
    "command",
)  # fields that are text, whatever their content
USAGE = "usage "  # before layer and modality, in the names of what experts have
_TAG = ("task", "split", "name")
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Sink(Protocol):
    """A place where numbers go in addition to `metrics.jsonl`."""

    def add(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Add numbers of a step, by name."""

    def flush(self) -> None:
        """Make them durable."""

    def close(self) -> None:
        """Let go of it."""


class MetricWriter:
    """Writes the metrics of a run; one process of a run does.

    Args:
      workdir: where `metrics.jsonl` and `tensorboard/` are. On an object store the file is
        written by `flush` only, and no TensorBoard events are written, with one warning.
      resume_step: complete steps in the restored checkpoint, 0 for a fresh run. Lines of that
        step and later are moved to `metrics.jsonl.replaced-N`, and hidden from TensorBoard.
      sinks: where the numbers go in addition; closed with the writer.
      guard: called before lines are written; it raises if they must not be.

    Raises:
      UserError: a line in the middle of the file is broken.

    Call `flush` before a checkpoint is committed: a checkpoint must never know of a step whose
    line can still be lost.
    """

    def __init__(
        self,
        workdir: epath.Path,
        resume_step: int,
        sinks: Sequence[Sink] = (),
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        workdir = epath.Path(workdir)
        self._resume_step = resume_step
        self._is_local = is_local(workdir)
        _move_replaced(workdir / METRICS, resume_step)
        self._lines = LineFile(workdir / METRICS, guard)
        self._sinks = [*sinks]
        if self._is_local:
            self._sinks.append(_Events(workdir / "tensorboard", resume_step))
        else:
            logging.getLogger(__name__).warning(
                "TensorBoard events are not written: %s is not a local directory. "
                "%s has every number.",
                workdir,
                METRICS,
            )

    def write(
        self, step: int, task: str, values: Mapping[str, Any], timing: Mapping[str, Any]
    ) -> None:
        """Write one line for training step `step` (from 0) of `task`.

        Args:
          step: the step these numbers describe; at least `resume_step`.
          task: the task that ran.
          values: deterministic scalars: Python numbers, NumPy scalars or arrays without axes. Arrays with an axis
            are the parts that experts have (`usage ...`): the line holds them as a list, in ten-thousandths, and
            other places get how many experts are in use.
          timing: scalars that differ from run to run, in seconds or per second.
        """
        self._check_step(step)
        _check_names(values, ("kind", "step", "task", "timing"))
        line = {"kind": "train", "step": step, "task": task, **_plain_fields(values)}
        self._append(_dumps(line | {"timing": _plain_fields(timing)}))
        scalars = {f"{task}/{n}": x for n, x in _scalars(values) if n not in _WORDS}
        scalars |= {f"timing/{task}/{name}": value for name, value in timing.items()}
        self.add(step, scalars)

    def write_eval(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Write one line for each record of an evaluation taken after `step` complete steps.

        Args:
          step: complete steps; at least `resume_step`.
          records: as in `results.json`: name, task, split, value, chance, count and more. Only a
            field called `timing`, a mapping, may differ from run to run.
        """
        self._check_step(step)
        for record in records:
            _check_names(record, ("kind", "step"))
        self._append("".join(_dumps(_eval_line(step, record)) for record in records))
        self.add(step, _eval_scalars(records))

    def add(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Add numbers for TensorBoard and the like, which `metrics.jsonl` does not hold."""
        for sink in self._sinks:
            sink.add(step, scalars)

    def flush(self) -> None:
        """Make all that was written durable."""
        self._lines.sync()
        for sink in self._sinks:
            sink.flush()

    def close(self) -> None:
        """Call `flush`, then close the files. Calling it again does nothing."""
        with ExitStack() as stack:  # one that fails must not keep the others open
            while self._sinks:
                stack.callback(self._sinks.pop().close)
            stack.callback(self._lines.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _append(self, text: str) -> None:
        self._lines.append(text)
        if self._is_local:  # uploading a long file again and again would hold up the steps
            self._lines.push()

    def _check_step(self, step: int) -> None:
        if step < self._resume_step:
            raise ValueError(f"step {step} is already written: resumed at {self._resume_step}")


def read(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl` in order; none if there is no file.

    "nan", "inf" and "-inf" come back as floats. A last line that is still being written is left
    out. Raises `UserError` if a line before the last is broken.
    """
    path = epath.Path(workdir) / METRICS
    return [revived(record) for _, record in _records(read_bytes(path), path)]


def gaps(workdir: epath.PathLike, stop: int) -> list[tuple[int, int]]:
    """Return the stretches (first step, last step) of training steps before `stop` that have no line."""
    path = epath.Path(workdir) / METRICS
    records = [record for _, record in _records(read_bytes(path), path)]
    steps = sorted({r["step"] for r in records if r.get("kind") == "train" and r["step"] < stop})
    edges = zip([-1, *steps], [*steps, stop], strict=True)
    return [(before + 1, after - 1) for before, after in edges if after - before > 1]


class _Events:
    """TensorBoard events, written in this thread.

    tensorboardX's SummaryWriter hands events to a queue that its `flush` does not drain, and two
    of them in one second share a file name, so a quick restart would erase events.
    """

    def __init__(self, logdir: epath.Path, purge_step: int) -> None:
        self._logdir = logdir
        logdir.mkdir(parents=True, exist_ok=True)
        attempt = len(list(logdir.glob("events.*")))
        self._writer = EventsWriter(os.path.join(logdir, "events"), f".{attempt:05d}")
        # TensorBoard drops the values of earlier files for this step and later when it sees a start.
        start = SessionLog(status=SessionLog.START)
        self._write(Event(step=purge_step, session_log=start))

    def add(self, step: int, scalars: Mapping[str, Any]) -> None:
        values = [Summary.Value(tag=tag, simple_value=float(x)) for tag, x in scalars.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def flush(self) -> None:
        with naming(self._logdir):
            self._writer.flush()

    def close(self) -> None:
        with naming(self._logdir):
            self._writer.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        with naming(self._logdir):
            self._writer.write_event(event)


def _move_replaced(path: epath.Path, resume_step: int) -> None:
    """Keep the records with `step < resume_step`, and move the rest of the file to another one.

    That one is whole before this one changes, so that a kill in between loses nothing.
    """
    content = read_bytes(path)
    lines_before = [
        line for line, record in _records(content, path) if record["step"] < resume_step
    ]
    coming, replaced = iter([*lines_before, None]), []
    following = next(coming)
    for line in content.split(b"\n"):
        if line == following:
            following = next(coming)
        elif line:
            replaced.append(line + b"\n")
    if replaced:
        _put_aside(path, b"".join(replaced))
    remaining = b"".join(line + b"\n" for line in lines_before)
    if remaining != content:
        replace_file(path, remaining)


def _put_aside(path: epath.Path, content: bytes) -> None:
    """Write a new file `NAME.replaced-N`, unless a start that was killed here has just written the same."""
    pattern = re.compile(re.escape(path.name) + r"\.replaced-(\d+)")
    matches = [pattern.fullmatch(other.name) for other in path.parent.iterdir()]
    last = max((int(match[1]) for match in matches if match), default=-1)
    if last < 0 or read_bytes(path.with_name(f"{path.name}.replaced-{last}")) != content:
        replace_file(path.with_name(f"{path.name}.replaced-{last + 1}"), content)


def _records(content: bytes, path: epath.Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Return each whole line with its record. A line torn off by a kill or a power cut is skipped."""
    result: list[tuple[bytes, dict[str, Any]]] = []
    torn = 0
    for number, line in enumerate(content.split(b"\n"), 1):
        record = _parsed(line)
        if record is None:
            torn = torn or (number if line else 0)
        elif torn:
            raise UserError(
                f"{path}, line {torn}: not a metrics record, though records follow it. "
                "Repair or delete that line, or move the file away, and run again."
            )
        else:
            result.append((line, record))
    return result


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and _is_record(record) else None


def _is_record(record: Mapping[str, Any]) -> bool:
    """Return whether the fields that every reader needs are there."""
    step, timing = record.get("step"), record.get("timing", {})
    is_step = isinstance(step, int) and not isinstance(step, bool)
    names = (record.get("kind"), record.get("task"))
    return is_step and isinstance(timing, dict) and all(isinstance(n, str) for n in names)


def revived(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record whose "nan", "inf" and "-inf" are floats again, also in records within it."""

    def back(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return revived(value)
        if isinstance(value, list):
            return [back(key, item) for item in value]
        is_number = isinstance(value, str) and key not in _WORDS
        return _NOT_FINITE.get(value, value) if is_number else value

    return {key: back(key, value) for key, value in record.items()}


def strict(value: Any) -> Any:
    """Return plain data with "nan", "inf" and "-inf" for the floats that JSON cannot express, see `revived`."""
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def in_use(shares_E: np.ndarray) -> float:
    """Return the number of experts in use: exp of the entropy of their parts; 0 where nothing is."""
    shares = np.asarray(shares_E, float)[np.asarray(shares_E) > 0]
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0


def _scalars(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if np.ndim(value):
            yield f"experts in use {name.removeprefix(USAGE)}", in_use(value)
        else:
            yield name, value


def _eval_line(step: int, record: Mapping[str, Any]) -> dict[str, Any]:
    timing = {"timing": _plain_fields(record["timing"])} if "timing" in record else {}
    fields = {key: value for key, value in record.items() if key != "timing"}
    return {"kind": "eval", "step": step, **_plain_fields(fields), **timing}


def _eval_scalars(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    tags = ["/".join(str(record.get(key, "")) for key in _TAG) for record in records]
    # Two evaluators of one kind on one split: both stay, under the names they have in the config.
    pairs = zip(tags, records, strict=True)
    names = [
        f"{t}/{r['evaluator']}" if tags.count(t) > 1 and "evaluator" in r else t for t, r in pairs
    ]
    values = zip(names, (record.get("value") for record in records), strict=True)
    return {f"eval/{tag}": value for tag, value in values if value is not None}


def _dumps(line: Mapping[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"


def _check_names(fields: Mapping[str, Any], reserved: Sequence[str]) -> None:
    taken = [name for name in reserved if name in fields]
    if taken:
        raise ValueError(f"the metric name {taken[0]!r} is reserved")


def _plain_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _plain(fields[name]) for name in sorted(fields)}


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold and gives back unchanged; floats by their shortest exact form."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return _plain_fields(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    kind = getattr(value, "dtype", None)
    if np.ndim(value):
        return [round(float(x), 4) for x in value]
    if kind is not None and np.issubdtype(kind, np.bool_):
        return bool(value)
    if kind is not None and np.issubdtype(kind, np.integer):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else str(number)
