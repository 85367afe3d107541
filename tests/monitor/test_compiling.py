"""Check what is shown while programs compile: on a terminal, in a log file, and nothing where others show it."""

from __future__ import annotations

import re
import threading
from io import StringIO

import pytest
from rich.console import Console
from toyrun import parts

from mmjax.engine import processes
from mmjax.engine.compile import LimitsConfig, compile_all
from mmjax.engine.requests import train_requests
from mmjax.monitor.compiling import CACHED, COMPILED, COMPILING, TRACING, Compiling

LABELS = {"a": "image_text train", "b": "image_text embed/text", "c": "video_text train"}
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class _Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def _passed(watch: Compiling, clock: _Clock, *changes: tuple[float, str, str]) -> None:
    for seconds, name, state in changes:
        clock.now += seconds
        watch(name, state)


STORY = (
    (0.0, "a", TRACING), (0.5, "a", COMPILING), (0.0, "b", TRACING), (1.0, "b", COMPILING),
    (0.25, "b", CACHED), (0.0, "c", TRACING), (60.0, "a", COMPILED), (0.0, "c", COMPILING),
    (3.0, "c", COMPILED),
)  # fmt: skip


def test_a_log_has_a_line_for_each_program_that_took_long() -> None:
    """Not for one of the first two seconds: the table of programs comes soon."""
    stream, clock = StringIO(), _Clock()
    with Compiling(LABELS, stream, clock=clock) as watch:
        _passed(watch, clock, *STORY)
    assert stream.getvalue().splitlines() == [
        "image_text train: compiled in 1m02s (2 of 3)",
        "video_text train: compiled in 1m03s (3 of 3)",
    ]
    assert "\x1b" not in stream.getvalue()


def test_a_log_says_what_is_under_way_where_nothing_ends() -> None:
    came = threading.Event()

    class Stream(StringIO):
        def flush(self) -> None:
            came.set()

    stream = Stream()
    with Compiling(LABELS, stream, beat_seconds=0.01) as watch:
        watch("a", TRACING)
        watch("b", COMPILING)
        assert came.wait(60)
    line = stream.getvalue().splitlines()[0]
    match = re.fullmatch(
        r"0 of 3 programs compiled after \S+; now (image_text train \(tracing\)|none)"
        r"(, image_text embed/text \(compiling\))?",
        line,
    )
    assert match, line


def test_a_terminal_shows_each_program_with_its_seconds_and_how_many_are_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    console = Console(force_terminal=True, width=80, height=24, file=StringIO())
    clock = _Clock()
    with Compiling(LABELS, console=console, clock=clock) as watch:
        _passed(watch, clock, *STORY[:6], (60.0, "c", COMPILING))
        assert isinstance(console.file, StringIO)
        drawn = _ESCAPE.sub("", console.file.getvalue()).rpartition("compiling 3 programs")[2]
    lines = [line.split("  ") for line in drawn.splitlines()]
    assert drawn.startswith(": 1 done, 2 left, 1m02s")
    rows = [[cell.strip() for cell in line if cell.strip()] for line in lines[1:4]]
    assert rows == [
        ["image_text train", "compiling", "1m02s"],
        ["video_text train", "compiling", "1m00s"],
        ["image_text embed/text", "cached", "1.2s"],
    ]


def test_one_process_shows_it_for_all() -> None:
    stream, clock = StringIO(), _Clock()
    with Compiling(LABELS, stream, clock=clock, muted=True) as watch:
        _passed(watch, clock, *STORY)
    assert stream.getvalue() == ""


def test_every_program_is_traced_then_compiled_or_cached() -> None:
    toy = parts()
    requests = train_requests(toy.experiment, toy.mesh)
    states: dict[str, list[str]] = {name: [] for name in requests}
    compile_all(requests, toy.mesh, LimitsConfig(), lambda name, state: states[name].append(state))
    for name in ("one", "two"):
        assert states[name][:2] == [TRACING, COMPILING]
        assert states[name][2:] in ([COMPILED], [CACHED])
    with processes.compiling(requests, "the rest") as watch:
        assert [watch(name, COMPILED) for name in (*requests, "the rest")] == [None] * 3


def test_an_error_ends_it() -> None:
    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError), Compiling(LABELS, StringIO()) as watch:
        watch("a", TRACING)
        raise ZeroDivisionError
    assert threading.active_count() == threads
