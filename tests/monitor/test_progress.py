"""The progress display, on a terminal and in a log file."""

import io
import math
import re
import sys
from collections.abc import Iterator
from io import StringIO
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from mmjax.monitor.progress import Progress

_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _live(width: int = 80) -> Console:
    return Console(
        force_terminal=True, width=width, height=24, file=StringIO(), color_system="standard"
    )


def _text(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


@pytest.fixture(autouse=True)
def _terminal_kind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TERM", "xterm-256color")
    yield


def _drive(progress: Progress, clock: _Clock, steps: range, tasks: list[str]) -> None:
    for step in steps:
        clock.now += 0.5
        progress.update(step, tasks[step % len(tasks)], 4.0, 64)


def test_a_plain_line() -> None:
    stream, clock = StringIO(), _Clock()
    with Progress(600, 118, ["image_text", "mim"], stream, clock=clock) as progress:
        progress.update(118, "mim", 0.83, 406)
        clock.now += 0.5
        progress.update(119, "image_text", 4.123, 406)
        clock.now += 0.5
        progress.update(120, "mim", 0.83, 406)
    assert stream.getvalue().split("\n") == [
        "Loss of each task (smoothed), examples per second and time left",
        "  step",
        "of 600    image_text           mim   ex/s    left",
        "   119             -          0.83",
        "   120          4.12          0.83    812",
        "   121          4.12          0.83    812 stopped",
        "",
        "",
    ]


_SIX = ["image_classes", "image_text", "instruments", "masked_image", "speech_text", "video_text"]


def test_six_tasks_have_a_column_each_and_one_line_an_entry() -> None:
    stream, clock = StringIO(), _Clock()
    with Progress(600, 0, _SIX, stream, clock=clock, line_seconds=1e9) as progress:
        _drive(progress, clock, range(600), _SIX)
    lines = stream.getvalue().splitlines()
    assert lines[1:5] == [
        "  step    image    image  instrum   masked   speech    video",
        "of 600  classes     text     ents    image     text     text   ex/s    left",
        "     1     4.00        -        -        -        -        -",
        "    30     4.00     4.00     4.00     4.00     4.00     4.00    128   4m45s",
    ]
    assert len(lines) == 3 + 21 + 1
    assert lines[-2] == "   600     4.00     4.00     4.00     4.00     4.00     4.00    128"


def test_heads_are_repeated_in_a_long_log() -> None:
    stream, clock = StringIO(), _Clock()
    with Progress(10**6, 0, _SIX, stream, clock=clock, line_seconds=0.5) as progress:
        _drive(progress, clock, range(60), _SIX)
    lines = stream.getvalue().splitlines()
    assert [i for i, line in enumerate(lines) if line.startswith("of 1000000")] == [2, 29, 56]


def test_more_tasks_than_columns_are_listed() -> None:
    stream, names = StringIO(), [f"task_{i}" for i in range(9)]
    with Progress(60, 0, names, stream) as progress:
        progress.update(0, "task_3", 4.0, 64)
    assert stream.getvalue().splitlines()[0] == "step 1/60  task_3  loss task_3 4.00"


def _steps(text: str) -> list[int]:
    """Return the step of each plain line."""
    return [int(found) for found in re.findall(r"^ *(\d+) ", text, re.MULTILINE)]


def test_plain_lines_are_first_last_and_each_twentieth() -> None:
    stream, clock = StringIO(), _Clock()
    with Progress(1000, 0, ["a", "b"], stream, clock=clock, line_seconds=1e9) as progress:
        _drive(progress, clock, range(1000), ["a", "b"])
    assert _steps(stream.getvalue()) == [1, *range(50, 1001, 50)]
    assert stream.getvalue().count(" 4m10s") == 1


def test_plain_lines_of_a_long_run_come_by_time() -> None:
    stream, clock = StringIO(), _Clock()
    with Progress(10**9, 0, ["a"], stream, clock=clock, line_seconds=60) as progress:
        _drive(progress, clock, range(1000), ["a"])
    assert _steps(stream.getvalue()) == [1, 121, 241, 361, 481, 601, 721, 841, 961, 1000]


def test_a_run_that_breaks_prints_where() -> None:
    stream, clock = StringIO(), _Clock()
    with pytest.raises(KeyError), Progress(1000, 0, ["a"], stream, clock=clock) as progress:
        _drive(progress, clock, range(30), ["a"])
        raise KeyError
    assert _steps(stream.getvalue()) == [1, 30]
    assert stream.getvalue().endswith(" stopped\n\n")


_NAMES = st.lists(st.text(min_size=1, max_size=60), min_size=1, max_size=12, unique=True)
_LOSSES = st.one_of(st.none(), st.floats())
_UPDATES = st.lists(st.tuples(st.integers(0, 11), _LOSSES, st.integers(0, 10**6)), max_size=30)


@given(_NAMES, _UPDATES)
@settings(max_examples=100, deadline=None)
def test_plain_lines_have_80_columns_and_no_control_codes(names: Any, updates: Any) -> None:
    stream, clock = StringIO(), _Clock()
    with Progress(20, 0, names, stream, clock=clock) as progress:
        for step, (task, loss, examples) in enumerate(updates):
            clock.now += 0.3
            progress.update(step, names[task % len(names)], loss, examples)
    for line in stream.getvalue().split("\n"):
        assert cell_len(line) <= 80
        assert not _CONTROL.search(line)
    assert bool(updates) == bool(stream.getvalue())


@given(_NAMES, _UPDATES, st.sampled_from([40, 80, 200]))
@settings(max_examples=60, deadline=None)
def test_live_lines_fit_the_terminal(names: Any, updates: Any, width: int) -> None:
    console, clock = _live(width), _Clock()
    with Progress(20, 0, names, console=console, clock=clock) as progress:
        for step, (task, loss, examples) in enumerate(updates):
            clock.now += 0.3
            progress.update(step, names[task % len(names)], loss, examples)
        progress.status("evaluating")
    for line in re.split(r"[\r\n]", _ESCAPE.sub("", _text(console))):
        assert cell_len(line) <= width


def test_live_shows_bar_task_rate_left_and_a_line_for_each_task() -> None:
    console, clock = _live(), _Clock()
    with Progress(600, 0, ["image_text", "mim"], console=console, clock=clock) as progress:
        _drive(progress, clock, range(120), ["image_text", "mim"])
        shown = re.split(r"[\r\n]+", _ESCAPE.sub("", _text(console)))[-3:]
    assert re.fullmatch(r"[━╸╺]{20,}  120/600  mim  128 ex/s  left 4m00s", shown[0].rstrip())
    assert [line.rstrip() for line in shown[1:]] == [
        "  image_text  loss 4.00  60 steps",
        "  mim         loss 4.00  60 steps",
    ]


def test_live_draws_at_most_ten_times_a_second_but_always_the_end() -> None:
    console, clock = _live(), _Clock()
    with Progress(1000, 0, ["a"], console=console, clock=clock) as progress:
        for step in range(1000):
            clock.now += 0.001
            progress.update(step, "a", 1.0, 1)
        text = _ESCAPE.sub("", _text(console))
    assert text.count("ex/s") <= 12
    assert "1000/1000" in text


@pytest.mark.parametrize("fails", [False, True])
def test_the_terminal_is_left_sane(fails: bool) -> None:
    console, out, err = _live(), sys.stdout, sys.stderr
    try:
        with Progress(5, 0, ["a"], console=console) as progress:
            progress.update(0, "a", 1.0, 1)
            # Even a kill here must find the cursor shown.
            assert _text(console).rfind("\x1b[?25h") > _text(console).rfind("\x1b[?25l")
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert _text(console).rfind("\x1b[?25h") > _text(console).rfind("\x1b[?25l")
    assert _text(console).endswith(("\n", "\x1b[?25h"))
    assert (sys.stdout, sys.stderr) == (out, err)
    assert "stopped" in _text(console)


def test_messages_go_above_the_bar() -> None:
    console = _live()
    with Progress(5, 0, ["a"], console=console) as progress:
        progress.update(0, "a", 1.0, 1)
        progress.message("saved [bold]step 1\x1b[2J")
        text = _ESCAPE.sub("", _text(console))
    assert "\x1b[2J" not in _text(console)
    assert text.index("saved [bold]step 1") < text.rindex("1/5")


def test_messages_in_a_log_file() -> None:
    stream = StringIO()
    with Progress(5, 0, ["a"], stream) as progress:
        progress.message("saved\x1b[1m " + "x" * 100)
    assert stream.getvalue() == "saved " + "x" * 100 + "\n"


def test_a_stream_that_knows_only_ascii() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    with Progress(5, 0, ["émoji"], stream) as progress:
        progress.update(0, "émoji", 1.0, 1)
    stream.flush()
    assert raw.getvalue().splitlines()[2:] == [
        b"  of 5         ?moji   ex/s    left",
        b"     1          1.00",
        b"",
    ]


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    console = _live()
    with Progress(2, 0, ["a"], console=console) as progress:
        progress.update(0, "a", 1.0, 1)
    assert "\x1b" not in _text(console) and _text(console).startswith("Loss of each task")
    assert _text(console).endswith("     1          1.00\n\n")


def test_time_left_knows_that_tasks_differ() -> None:
    left = {"quick": 10, "slow": 90}
    progress = Progress(300, 100, ["quick", "slow"], StringIO())
    progress.plan(left)
    assert progress.seconds_left() is None
    for step in range(100, 108):
        slow = step % 4 == 0
        progress.update(step, "slow" if slow else "quick", None, 1, 3.0 if slow else 1.0)
    assert progress.seconds_left() == 4 * 1.0 + 88 * 3.0


def test_time_left_without_the_schedule_takes_the_shares_seen() -> None:
    progress = Progress(108, 0, ["quick", "slow"], StringIO())
    for step in range(8):
        slow = step % 4 == 0
        progress.update(step, "slow" if slow else "quick", None, 1, 3.0 if slow else 1.0)
    assert progress.seconds_left() == 100 * 1.5


def test_time_left_is_not_moved_by_a_slow_first_step_or_a_pause() -> None:
    clock = _Clock()
    progress = Progress(100, 0, ["a"], StringIO(), clock=clock)
    for step in range(10):
        clock.now += 60.0 if step == 1 else 0.5
        if step == 7:
            progress.status("evaluating")
            clock.now += 1000.0
        progress.update(step, "a", 1.0, 64)
    assert progress.seconds_left() == 90 * 0.5


def test_the_rate_leaves_out_pauses() -> None:
    clock = _Clock()
    progress = Progress(100, 0, ["a"], StringIO(), clock=clock)
    for step in range(10):
        clock.now += 0.5
        if step == 5:
            progress.status("saving")
            clock.now += 1000.0
        progress.update(step, "a", 1.0, 64)
    assert progress.examples_per_second() == 128.0


def _shown_loss(*losses: float | None) -> str:
    stream = StringIO()
    with Progress(len(losses), 0, ["a"], stream) as progress:
        for step, loss in enumerate(losses):
            progress.update(step, "a", loss, 1)
    return stream.getvalue().splitlines()[-2].split()[1]


def test_losses_are_smoothed_without_bias() -> None:
    # 0.9-weighted mean: (4 * 0.81 + 2 * 0.9 + 3) / (0.81 + 0.9 + 1)
    assert _shown_loss(4.0, 2.0, 3.0) == f"{8.04 / 2.71:.2f}"
    assert _shown_loss(4.0, None) == "4.00"


def test_a_broken_loss_shows_and_does_not_stay() -> None:
    assert _shown_loss(4.0, math.nan) == "nan"
    assert _shown_loss(4.0, math.inf, 2.0) == "2.00"


def test_steps_of_before_a_restart_are_counted() -> None:
    console = _live()
    with Progress(600, 100, ["a", "b"], console=console, visits={"a": 60, "b": 40}) as progress:
        progress.update(100, "a", 1.0, 1)
        shown = _ESCAPE.sub("", _text(console))
    assert "61 steps" in shown and "40 steps" in shown


def test_no_steps_to_do() -> None:
    with Progress(5, 5, ["a"], console=_live()):
        pass
    stream = StringIO()
    with Progress(0, 0, ["a"], stream):
        pass
    assert stream.getvalue() == ""
