"""Progress of compilation: a line for each, live on a terminal, as they end in a log file."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mmjax.monitor.tables import console_for, human_seconds, without_control_codes

TRACING, COMPILING, COMPILED, CACHED = STATES = ("tracing", "compiling", "compiled", "cached")
_ENDS = (COMPILED, CACHED)


@dataclass
class _Program:
    """A program's state; "" before its turn."""

    label: str
    state: str = ""
    since: float = 0.0  # when it was first traced or compiled
    seconds: float = 0.0  # of the whole of it, once it has ended


class Compiling:
    """Progress of compilation, to be used in a `with` block and called with each change of a program's state.

    On a terminal: how many programs are done and left, and a line for each that is under way or done, redrawn four
    times a second and removed at the end. Elsewhere: a plain line for each program that ends, but for those of the
    first seconds, and a line in every `beat_seconds` in which there was no other.

    Args:
      labels: words for each program, by name.
      stream: where to print; standard output if None.
      quiet_seconds: no plain line comes before.
      beat_seconds: the longest time between two plain lines.
      console: takes the place of `stream`.
      clock: a monotonic clock in seconds.
      muted: show nothing.
    """

    def __init__(
        self,
        labels: Mapping[str, str],
        stream: TextIO | None = None,
        *,
        quiet_seconds: float = 2.0,
        beat_seconds: float = 30.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        muted: bool = False,
    ) -> None:
        self._muted = muted
        self._programs = {n: _Program(without_control_codes(w)) for n, w in labels.items()}
        self._console = console or console_for(stream or sys.stdout)
        self._clock, self._began, self._quiet = clock, clock(), quiet_seconds
        self._last_line, self._beat_seconds = self._began, beat_seconds
        self._live: Live | None = None
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._beats, daemon=True)

    def __call__(self, name: str, state: str) -> None:
        """Note that a program is now in one of `STATES`; may be called by any thread."""
        with self._lock:
            program, now = self._programs[name], self._clock()
            program.since = program.since or now
            program.state = state
            if state in _ENDS:
                program.seconds = now - program.since
                self._end(program, now)
        if self._live:
            self._live.refresh()

    def _end(self, program: _Program, now: float) -> None:
        if self._live or self._muted or now - self._began < self._quiet:
            return
        how = "loaded from the cache" if program.state == CACHED else "compiled"
        spent, place = human_seconds(program.seconds), f"{self._done()} of {len(self._programs)}"
        self._say(f"{program.label}: {how} in {spent} ({place})")

    def __enter__(self) -> Self:
        if self._muted:
            return self
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(
                console=self._console, get_renderable=self._picture, refresh_per_second=4, transient=True,
                vertical_overflow="ellipsis",
            )  # fmt: skip
            self._live.start(refresh=True)
            self._console.show_cursor(True)  # a run may be killed at any moment
        else:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._live:
            self._live.stop()
        elif self._thread.ident is not None:
            self._thread.join()

    def _beats(self) -> None:
        while not self._ended.wait(max(self._last_line + self._beat_seconds - self._clock(), 0.01)):
            with self._lock:
                if (
                    self._clock() - self._last_line >= self._beat_seconds
                    and not self._ended.is_set()
                ):
                    self._say(self._words())

    def _words(self) -> str:
        """Return one line: how many are done, for how long it has been, and what is under way."""
        spent = human_seconds(self._clock() - self._began)
        under_way = [f"{p.label} ({p.state})" for p in self._under_way()]
        return f"{self._done()} of {len(self._programs)} programs compiled after {spent}; now " + (
            ", ".join(under_way) or "none"
        )

    def _done(self) -> int:
        return sum(program.state in _ENDS for program in self._programs.values())

    def _under_way(self) -> list[_Program]:
        return [p for p in self._programs.values() if p.state and p.state not in _ENDS]

    def _say(self, text: str) -> None:
        self._console.file.write(text + "\n")
        self._console.file.flush()
        self._last_line = self._clock()

    def _picture(self) -> RenderableType:
        now, count = self._clock(), len(self._programs)
        spent = human_seconds(now - self._began)
        head = (
            f"compiling {count} programs: {self._done()} done, {count - self._done()} left, {spent}"
        )
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True, overflow="ellipsis")
        grid.add_column(no_wrap=True)
        grid.add_column(justify="right", no_wrap=True)
        begun = [p for p in self._programs.values() if p.state]
        for program in sorted(begun, key=lambda p: (p.state in _ENDS, p.since)):
            seconds = program.seconds if program.state in _ENDS else now - program.since
            cells = (f"  {program.label}", program.state, human_seconds(seconds))
            style = "dim" if program.state in _ENDS else ""
            grid.add_row(*(Text(cell, style=style) for cell in cells))
        return Group(Text(head), grid)
