"""The metrics of a run: exact numbers, and one line for each step however often it restarts."""

import json
import math
import os
import signal
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event, SessionLog

from mmjax.core.errors import UserError
from mmjax.core.workdir import METRICS
from mmjax.monitor.metrics import MetricWriter, gaps, read

EVERY = 4  # an evaluation before each fourth step


def _run(workdir: str | Path, resume: int, stop: int, writer: MetricWriter | None = None) -> None:
    """Train steps `resume` to `stop` - 1, evaluating before the step, as a training loop does."""
    writer = writer or MetricWriter(epath.Path(workdir), resume)
    for step in range(resume, stop):
        if step % EVERY == 0:
            record = {"name": "recall", "task": "a", "split": "held", "value": 1 / (1 + step)}
            writer.write_eval(step, [record, record | {"name": "other"}])
        timing = {"seconds": np.random.random()}
        writer.write(step, "ab"[step % 2], {"loss": np.float32(1 / 3 + step), "b": step}, timing)
    writer.close()


def _exact(workdir: str | Path) -> list[str]:
    """Return the lines, without what may differ from run to run."""
    lines = (epath.Path(workdir) / METRICS).read_text().splitlines()
    return [json.dumps({k: v for k, v in json.loads(x).items() if k != "timing"}) for x in lines]


def _events(workdir: str | Path) -> list[list[Event]]:
    """Return the events of each file, files in the order of their names."""
    return [_parse(path.read_bytes()) for path in sorted(Path(workdir).glob("tensorboard/*"))]


def _parse(data: bytes) -> list[Event]:
    events, at = [], 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        events.append(Event.FromString(data[at + 12 : at + 12 + length]))
        at += 16 + length
    return events


def test_line_of_a_step(tmp_path: Path) -> None:
    with MetricWriter(epath.Path(tmp_path), 0) as writer:
        writer.write(0, "image_text", {"loss": 0.5, "accuracy": 1, "ok": True}, {"seconds": 2.0})
    assert (tmp_path / METRICS).read_text() == (
        '{"kind": "train", "step": 0, "task": "image_text", "accuracy": 1, "loss": 0.5, '
        '"ok": true, "timing": {"seconds": 2.0}}\n'
    )


def test_lines_of_an_evaluation(tmp_path: Path) -> None:
    record = {"task": "a", "name": "recall", "split": "held", "value": 0.25, "majority": None}
    timed = record | {"timing": {"seconds": 1.0}}
    with MetricWriter(epath.Path(tmp_path), 0) as writer:
        writer.write_eval(7, [record, timed])
    line = (
        '{"kind": "eval", "step": 7, "majority": null, "name": "recall", "split": "held", '
        '"task": "a", "value": 0.25'
    )
    text = (tmp_path / METRICS).read_text()
    assert text == line + "}\n" + line + ', "timing": {"seconds": 1.0}}\n'


@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
@settings(max_examples=30, deadline=None)
def test_float32_comes_back_in_the_same_bits(numbers: list[float]) -> None:
    values = {f"m{i}": np.float32(x) for i, x in enumerate(numbers)}
    with tempfile.TemporaryDirectory() as workdir:
        with MetricWriter(epath.Path(workdir), 0) as writer:
            writer.write(0, "a", values, {})
        (line,) = (Path(workdir) / METRICS).read_text().splitlines()
        (record,) = read(epath.Path(workdir))
    json.loads(line, parse_constant=pytest.fail)  # strict JSON has no NaN or Infinity
    for name, value in values.items():
        back = np.float32(record[name])
        assert back.tobytes() == value.tobytes() or (np.isnan(back) and np.isnan(value))


def test_not_finite_is_text_in_the_file_and_a_float_when_read(tmp_path: Path) -> None:
    values = {"a": math.nan, "b": np.float32(math.inf), "c": np.array(-math.inf)}
    with MetricWriter(epath.Path(tmp_path), 0) as writer:
        writer.write(0, "nan", values, {"inf": math.inf})
    assert '"a": "nan", "b": "inf", "c": "-inf"' in (tmp_path / METRICS).read_text()
    (record,) = read(epath.Path(tmp_path))
    assert math.isnan(record["a"]) and record["b"] == math.inf and record["c"] == -math.inf
    assert record["task"] == "nan"
    assert record["timing"] == {"inf": math.inf}


@pytest.mark.parametrize("value", [np.int32(3), np.array(3), np.uint8(3), 3])
def test_integers_stay_integers(tmp_path: Path, value: Any) -> None:
    with MetricWriter(epath.Path(tmp_path), 0) as writer:
        writer.write(0, "a", {"count": value, "ok": np.bool_(True)}, {})
    assert '"count": 3, "ok": true' in (tmp_path / METRICS).read_text()


@st.composite
def _histories(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Return attempts as (checkpoint it starts from, step it is killed before, bytes torn off)."""
    attempts, checkpoint = [], 0
    for _ in range(draw(st.integers(0, 4))):
        stop = draw(st.integers(checkpoint, 24))
        attempts.append((checkpoint, stop, draw(st.integers(0, 300))))
        checkpoint = draw(st.integers(0, stop))  # later, or back to an older one
    return [*attempts, (checkpoint, 24, 0)]


@given(_histories())
@settings(max_examples=40, deadline=None)
def test_any_history_leaves_the_lines_of_an_unkilled_run(
    history: list[tuple[int, int, int]],
) -> None:
    with tempfile.TemporaryDirectory() as straight, tempfile.TemporaryDirectory() as broken:
        _run(straight, 0, 24)
        for (resume, stop, torn), after in zip(history, [*history[1:], None], strict=True):
            _run(broken, resume, stop)
            path = Path(broken) / METRICS
            content = path.read_bytes()
            safe = 0  # `flush` before a checkpoint makes the lines before it durable
            for line in content.splitlines(keepends=True):
                safe += len(line) * (json.loads(line)["step"] < (after or (24,))[0])
            path.write_bytes(content[: max(len(content) - torn, safe)])
        assert _exact(broken) == _exact(straight)


@pytest.mark.parametrize(
    "tail", [b'{"kind": "train", "st', b"{", b"12", b"\x00\x00\x00\n\x00", b'{"kind": "\xff', b"\n"]
)
def test_a_torn_tail_is_cut(tmp_path: Path, tail: bytes) -> None:
    _run(tmp_path, 0, 6)
    whole = (tmp_path / METRICS).read_bytes()
    (tmp_path / METRICS).write_bytes(whole + tail)
    assert len(read(epath.Path(tmp_path))) == len(whole.splitlines())
    MetricWriter(epath.Path(tmp_path), 6).close()
    assert (tmp_path / METRICS).read_bytes() == whole
    assert b"".join(_replaced(tmp_path)).replace(b"\n", b"") == tail.replace(b"\n", b"")


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    _run(tmp_path, 0, 6)
    whole = (tmp_path / METRICS).read_bytes()
    (tmp_path / METRICS).write_bytes(whole[:-1])
    MetricWriter(epath.Path(tmp_path), 6).close()
    assert (tmp_path / METRICS).read_bytes() == whole


def test_the_evaluation_at_the_checkpoint_is_taken_again(tmp_path: Path) -> None:
    _run(tmp_path, 0, 9)
    MetricWriter(epath.Path(tmp_path), 8).close()
    steps = [(record["kind"], record["step"]) for record in read(epath.Path(tmp_path))]
    assert ("train", 7) in steps and ("eval", 4) in steps
    assert ("eval", 8) not in steps and ("train", 8) not in steps


def _replaced(workdir: Path) -> list[bytes]:
    """Return the files of replaced lines, oldest first."""
    paths = workdir.glob(f"{METRICS}.replaced-*")
    return [p.read_bytes() for p in sorted(paths, key=lambda p: int(p.name.rsplit("-", 1)[1]))]


def test_lines_that_are_replaced_are_moved_and_not_cut(tmp_path: Path) -> None:
    _run(tmp_path, 0, 9)
    lines = (tmp_path / METRICS).read_bytes().splitlines(keepends=True)
    torn = b'{"kind": "train", "st'
    (tmp_path / METRICS).write_bytes(b"".join(lines) + torn)
    kept = [line for line in lines if json.loads(line)["step"] < 6]
    MetricWriter(epath.Path(tmp_path), 6).close()
    assert (tmp_path / METRICS).read_bytes() == b"".join(kept)
    assert _replaced(tmp_path) == [b"".join(lines[len(kept) :]) + torn + b"\n"]
    _run(tmp_path, 6, 8)
    _run(tmp_path, 0, 3)
    assert len(_replaced(tmp_path)) == 2
    moved = [json.loads(line)["step"] for line in _replaced(tmp_path)[1].splitlines()]
    assert sorted(set(moved)) == list(range(8))
    # Nothing to replace makes no file.
    MetricWriter(epath.Path(tmp_path), 3).close()
    assert len(_replaced(tmp_path)) == 2


@pytest.mark.parametrize("replaces", [1, 2])
def test_a_kill_between_moving_and_cutting_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaces: int
) -> None:
    _run(tmp_path, 0, 9)
    before, calls, replace = (tmp_path / METRICS).read_bytes(), iter(range(9)), os.replace

    def killed(*arguments: Any) -> None:
        if next(calls) == replaces - 1:
            raise KeyboardInterrupt
        replace(*arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", killed)
        MetricWriter(epath.Path(tmp_path), 5)
    assert (tmp_path / METRICS).read_bytes() == before
    MetricWriter(epath.Path(tmp_path), 5).close()
    assert (tmp_path / METRICS).read_bytes() + b"".join(_replaced(tmp_path)) == before


def test_gaps_are_the_steps_without_a_line(tmp_path: Path) -> None:
    assert gaps(epath.Path(tmp_path), 0) == []
    assert gaps(epath.Path(tmp_path), 3) == [(0, 2)]
    _run(tmp_path, 0, 12)
    assert gaps(epath.Path(tmp_path), 12) == []
    lines = (tmp_path / METRICS).read_text().splitlines(keepends=True)
    left = [x for x in lines if json.loads(x)["step"] not in (0, 4, 5, 6, 9)]
    # A line of an evaluation is none of a step.
    evaluation = [x for x in lines if '"eval"' in x and json.loads(x)["step"] == 4]
    (tmp_path / METRICS).write_text("".join([*evaluation, *left]))
    assert gaps(epath.Path(tmp_path), 12) == [(0, 0), (4, 6), (9, 9)]
    assert gaps(epath.Path(tmp_path), 6) == [(0, 0), (4, 5)]
    assert gaps(epath.Path(tmp_path), 14) == [(0, 0), (4, 6), (9, 9), (12, 13)]


@pytest.mark.parametrize(
    "line",
    ["5", "null", "[1]", '"x"', '{"step": 1}', '{"kind": "train", "task": "a", "step": true}',
     '{"kind": "train", "task": 3, "step": 1}', '{"kind": "train", "task": "a", "step": "1"}',
     '{"kind": "train", "task": "a", "step": 1, "timing": 5}', "[" * 100_000],
    ids=lambda x: x[:40],
)  # fmt: skip
def test_a_line_that_is_no_record_is_named_or_left_out_at_the_end(
    tmp_path: Path, line: str
) -> None:
    _run(tmp_path, 1, 4)
    whole = (tmp_path / METRICS).read_text()
    (tmp_path / METRICS).write_text(f"{whole}{line}\n")
    assert [record["step"] for record in read(epath.Path(tmp_path))] == [1, 2, 3]
    (tmp_path / METRICS).write_text(f"{line}\n{whole}")
    with pytest.raises(UserError, match="line 1: not a metrics record"):
        read(epath.Path(tmp_path))


def test_a_file_that_cannot_be_read_is_not_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(tmp_path, 0, 3)
    before = (tmp_path / METRICS).read_bytes()

    def fail(*_: Any) -> bytes:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(type(epath.Path(tmp_path)), "read_bytes", fail)
        for use in (
            lambda: MetricWriter(epath.Path(tmp_path), 0),
            lambda: read(epath.Path(tmp_path)),
        ):
            with pytest.raises(PermissionError):
                use()
    assert (tmp_path / METRICS).read_bytes() == before


def test_a_full_disk_names_the_folder_of_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    writer = MetricWriter(epath.Path(tmp_path), 0)
    with (
        monkeypatch.context() as patched,
        pytest.raises(OSError, match=str(tmp_path / "tensorboard")),
    ):
        patched.setattr("tensorboardX.event_file_writer.EventsWriter.flush", full)
        writer.flush()
    writer.close()


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    _run(tmp_path, 1, 4)
    lines = (tmp_path / METRICS).read_text().splitlines()
    (tmp_path / METRICS).write_text("\n".join([lines[0], "{", lines[2], ""]))
    for use in (lambda: MetricWriter(epath.Path(tmp_path), 4), lambda: read(epath.Path(tmp_path))):
        with pytest.raises(UserError, match=r"metrics.jsonl, line 2: .*Repair or delete"):
            use()


def test_a_cut_that_fails_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _run(tmp_path, 0, 6)
    before = (tmp_path / METRICS).read_bytes()

    def broken(*_: Any) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="no"):
        MetricWriter(epath.Path(tmp_path), 2)
    assert (tmp_path / METRICS).read_bytes() == before


@pytest.mark.parametrize("name", ["kind", "step", "task", "timing"])
def test_reserved_names(tmp_path: Path, name: str) -> None:
    writer = MetricWriter(epath.Path(tmp_path), 0)
    with writer, pytest.raises(ValueError, match=f"'{name}' is reserved"):
        writer.write(0, "a", {name: 1.0}, {})


def test_steps_before_the_checkpoint_are_refused(tmp_path: Path) -> None:
    with MetricWriter(epath.Path(tmp_path), 5) as writer:
        with pytest.raises(ValueError, match="step 4 is already written"):
            writer.write(4, "a", {}, {})
        with pytest.raises(ValueError, match="step 4 is already written"):
            writer.write_eval(4, [])


def test_reading_nothing(tmp_path: Path) -> None:
    assert read(epath.Path(tmp_path)) == []


def test_two_evaluators_of_one_measure_have_events_each(tmp_path: Path) -> None:
    with MetricWriter(epath.Path(tmp_path), 0) as writer:
        one = {"task": "a", "split": "s", "name": "r"}
        records = [one | {"evaluator": e, "value": v} for e, v in (("x", 0.25), ("y", 0.5))]
        writer.write_eval(4, [*records, one | {"name": "q", "evaluator": "x", "value": 0.75}])
    ((_, _, evaluation),) = _events(tmp_path)
    found = {v.tag: v.simple_value for v in evaluation.summary.value}
    assert found == {"eval/a/s/r/x": 0.25, "eval/a/s/r/y": 0.5, "eval/a/s/q": 0.75}


def test_events_hold_every_scalar(tmp_path: Path) -> None:
    with MetricWriter(epath.Path(tmp_path), 0) as writer:
        writer.write(3, "a", {"loss": 0.5, "bad": math.nan}, {"seconds": 2.0})
        writer.write_eval(
            4, [{"task": "a", "split": "s", "name": "r", "value": v} for v in (0.25, None)]
        )
    ((_, start, train, evaluation),) = _events(tmp_path)
    assert start.session_log.status == SessionLog.START and start.step == 0
    scalars = {value.tag: value.simple_value for value in train.summary.value}
    assert scalars.keys() == {"a/loss", "a/bad", "timing/a/seconds"} and train.step == 3
    assert scalars["a/loss"] == 0.5 and math.isnan(scalars["a/bad"])
    assert [(v.tag, v.simple_value) for v in evaluation.summary.value] == [("eval/a/s/r", 0.25)]


def test_quick_restarts_keep_and_purge_events(tmp_path: Path) -> None:
    for resume, stop in ((0, 6), (3, 5), (4, 9)):
        _run(tmp_path, resume, stop)
    shown: dict[int, float] = {}
    files = _events(tmp_path)
    assert len(files) == 3
    for event in (event for events in files for event in events):
        if event.session_log.status == SessionLog.START:
            shown = {step: value for step, value in shown.items() if step < event.step}
        for value in event.summary.value:
            if value.tag.endswith("/loss"):
                assert event.step not in shown
                shown[event.step] = value.simple_value
    assert shown == {step: pytest.approx(1 / 3 + step) for step in range(9)}


_KILLED = """
import os, signal, sys
from etils import epath
from mmjax.monitor.metrics import MetricWriter
writer = MetricWriter(epath.Path(sys.argv[1]), 0)
for step in range(500):
    writer.write(step, "a", {"loss": step}, {})
writer.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_is_flushed_survives_a_kill(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert [record["loss"] for record in read(epath.Path(tmp_path))] == list(range(500))
    (events,) = _events(tmp_path)
    assert [value.simple_value for event in events for value in event.summary.value] == list(
        range(500)
    )


def test_flush_reaches_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_ino))
    with MetricWriter(epath.Path(tmp_path), 0) as writer:
        writer.write(0, "a", {"loss": 1.0}, {})
        assert synced == []  # not at each step
        writer.flush()
        assert (tmp_path / METRICS).stat().st_ino in synced
