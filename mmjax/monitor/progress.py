"""The progress display of a run: one progress display, for terminals and log files."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from types import TracebackType
from typing import Self, TextIO

from rich.cells import cell_len, chop_cells
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mmjax.monitor.progress_columns import Columns
from mmjax.monitor.tables import (
    WIDTH,
    console_for,
    human_bytes,
    human_count,
    human_flops,
    human_seconds,
    loss_text,
    parameter_table,
    percent,
    program_table,
    results_table,
    table,
    without_control_codes,
)

__all__ = [
    "Progress",
    "human_bytes",
    "human_count",
    "human_flops",
    "human_seconds",
    "loss_text",
    "parameter_table",
    "percent",
    "program_table",
    "results_table",
    "table",
]

_REDRAW_SECONDS = 0.1
_NAME_CELLS = 24
_DECAY = 0.9  # a loss is smoothed over about the last ten visits of its task


@dataclass
class _Task:
    """The display's record of one task: its steps, its loss, the seconds of its last steps."""

    steps: int = 0
    left: int | None = None
    loss: float | None = None
    weight: float = 0.0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=9))

    def smooth(self, loss: float) -> None:
        """Update the bias-corrected exponential mean; a broken loss shows once."""
        if not math.isfinite(loss):
            self.loss, self.weight = loss, 0.0
            return
        old = self.loss if self.loss is not None and self.weight else 0.0
        weight = _DECAY * self.weight + 1.0
        self.loss, self.weight = old + (loss - old) / weight, weight


class Progress:
    """Progress of a run with several tasks, to be used in a `with` block.

    On a terminal: a bar with the task now running, examples per second and time left, and a line
    for each task, kept at the bottom. Elsewhere (a file, a pipe, a notebook): plain lines of at
    most 80 columns without control codes, the loss of each task in a column of its own where all
    find room, for the first and the last step and, between them, each twentieth of the run and at
    least every `line_seconds`.

    Args:
      total_steps: complete steps at the end of the run.
      start_step: complete steps at its (re)start.
      tasks: their names, in the order to show them.
      stream: where to print; standard output if None.
      visits: steps each task has done before `start_step`; 0 where missing.
      line_seconds: the longest time between two plain lines.
      console: takes the place of `stream`.
      clock: a monotonic clock in seconds.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        tasks: Sequence[str],
        stream: TextIO | None = None,
        *,
        visits: Mapping[str, int] | None = None,
        line_seconds: float = 60.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._done = total_steps, start_step
        self._tasks = {name: _Task((visits or {}).get(name, 0)) for name in tasks}
        self._console = console or console_for(stream or sys.stdout)
        self._is_live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live: Live | None = None
        self._columns = Columns([_clip(name) for name in tasks], total_steps)
        self._clock, self._line_seconds = clock, line_seconds
        self._now, self._stopped = "starting", False
        self._mark: float | None = None  # when the last step ended, None after a pause
        self._drawn = -math.inf
        self._printed = -1  # complete steps at the last plain line
        self._recent: deque[tuple[int, float]] = deque(maxlen=64)

    def plan(self, visits_left: Mapping[str, int]) -> None:
        """Set the steps that tasks have still to do, after a change of the schedule."""
        for name, left in visits_left.items():
            self._tasks[name].left = left

    def update(
        self, step: int, task: str, loss: float | None, examples: int, seconds: float | None = None
    ) -> None:
        """Show that step `step` (counted from 0) is complete.

        Args:
          step: the step.
          task: the task that ran.
          loss: its loss; None if it was not fetched, and the last one stays.
          examples: examples in its batch.
          seconds: what the step added to the time of the run. If None, the time since the last
            update.
        """
        now = self._clock()
        self._done, self._now = step + 1, task
        state = self._tasks[task]
        state.steps += 1
        if state.left is not None:
            state.left = max(state.left - 1, 0)
        if loss is not None:
            state.smooth(float(loss))
        if seconds is None and self._mark is not None:
            seconds = now - self._mark
        if seconds is not None:
            state.seconds.append(seconds)
            self._recent.append((examples, seconds))
        self._mark = now
        self._draw(now)

    def status(self, text: str) -> None:
        """Show `text` (evaluating, saving) in the task's place until the next update.

        The time until then counts for no task.
        """
        self._now, self._mark = text, None
        if self._live:
            self._live.refresh()

    def message(self, text: str) -> None:
        """Print `text` above the display."""
        text = without_control_codes(text)
        if self._live:
            self._console.print(Text(text))
            self._live.refresh()
        else:
            self._say(text)

    def seconds_left(self) -> float | None:
        """Return the seconds left, from the usual seconds of each task; None if unknown.

        The usual one is the median of a task's last nine, so that a slow first step or a pause
        does not move it. Evaluations to come are not in it.
        """
        usual = {name: median(task.seconds) for name, task in self._tasks.items() if task.seconds}
        if len(self._recent) < 2:
            return None
        steps = {name: self._tasks[name].steps for name in usual}
        mean = sum(usual[name] * steps[name] for name in usual) / sum(steps.values())
        if all(task.left is not None for task in self._tasks.values()):
            return sum((task.left or 0) * usual.get(n, mean) for n, task in self._tasks.items())
        return (self._total - self._done) * mean

    def examples_per_second(self) -> float | None:
        """Return the rate over the last 64 steps without pauses; None if not yet known."""
        seconds = sum(seconds for _, seconds in self._recent)
        return sum(examples for examples, _ in self._recent) / seconds if seconds > 0 else None

    def __enter__(self) -> Self:
        if self._is_live:
            self._live = Live(
                console=self._console,
                get_renderable=self._picture,
                auto_refresh=False,
                vertical_overflow="crop",
            )
            self._live.start(refresh=True)
            # A run may be killed at any moment and must not leave a terminal without cursor.
            self._console.show_cursor(True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._done < self._total or kind is not None:
            self._now, self._stopped = "stopped", True
        if self._live:
            self._live.stop()
            self._live = None
        elif self._printed >= 0:
            if self._done != self._printed:
                self._line(self._clock())
            self._say("")  # what follows is another matter

    def _draw(self, now: float) -> None:
        is_last = self._done >= self._total
        if self._live:
            if is_last or now - self._drawn >= _REDRAW_SECONDS:
                self._live.refresh()
                self._drawn = now
        elif is_last or self._printed < 0 or self._is_due(now):
            self._line(now)

    def _is_due(self, now: float) -> bool:
        twentieth = 20 * self._done // self._total > 20 * self._printed // self._total
        return twentieth or now - self._drawn >= self._line_seconds

    def _line(self, now: float) -> None:
        self._say(self._in_columns() if self._columns.fits else self._in_a_list())
        self._drawn, self._printed = now, self._done

    def _in_columns(self) -> str:
        rate, left = self.examples_per_second(), self._left()
        losses = [loss_text(task.loss) for task in self._tasks.values()]
        status = "stopped" if self._stopped else left or ""
        return self._columns.line(
            self._done, losses, human_count(rate) if rate is not None else "", status
        )

    def _in_a_list(self) -> str:
        losses = [
            f" {_clip(name)} {loss_text(task.loss)}"
            for name, task in self._tasks.items()
            if task.loss is not None
        ]
        if losses:
            losses[0] = f"  loss{losses[0]}"
        facts = [f"  {_clip(self._now)}", *losses, *(f"  {fact}" for fact in self._facts())]
        return "\n".join(_wrapped([f"step {self._done}/{self._total}", *facts]))

    def _say(self, text: str) -> None:
        stream = self._console.file
        encoding = getattr(stream, "encoding", None) or "utf-8"
        stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        stream.flush()

    def _facts(self) -> list[str]:
        rate, left = self.examples_per_second(), self._left()
        facts = [f"{human_count(rate)} ex/s"] if rate is not None else []
        return facts if left is None else [*facts, f"left {left}"]

    def _left(self) -> str | None:
        """Return the time left in words, while there is some to come."""
        left = self.seconds_left()
        if left is None or self._done >= self._total or self._stopped:
            return None
        return human_seconds(left) if left >= 60 else f"{left:.0f}s"

    def _picture(self) -> RenderableType:
        facts = [f"{self._done}/{self._total}", _clip(self._now), *self._facts()]
        text = "  ".join(facts)
        head = Table.grid(padding=(0, 2))
        head.add_column()
        head.add_column(no_wrap=True, overflow="ellipsis")
        cells = max(min(self._console.width, 100) - cell_len(text) - 3, 4)
        head.add_row(ProgressBar(max(self._total, 1), self._done, width=cells), Text(text))
        return Group(head, *([self._task_lines()] if self._tasks else []))

    def _task_lines(self) -> Table:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True, overflow="ellipsis")
        for _ in range(2):
            grid.add_column(justify="right", no_wrap=True, overflow="ellipsis")
        for name, task in self._tasks.items():
            loss = f"loss {loss_text(task.loss)}" if task.loss is not None else ""
            style = "bold" if name == self._now else ""
            cells = [f"  {_clip(name)}", loss, f"{task.steps} steps"]
            grid.add_row(*(Text(cell, style=style) for cell in cells))
        return grid


def _clip(name: str) -> str:
    name = " ".join(without_control_codes(name).split())
    if cell_len(name) <= _NAME_CELLS:
        return name
    return chop_cells(name, _NAME_CELLS - 2)[0] + ".."


def _wrapped(pieces: Sequence[str]) -> list[str]:
    """Join pieces, which bring the blanks before them, to lines of at most 80 columns."""
    lines = [pieces[0]]
    for piece in pieces[1:]:
        if cell_len(lines[-1] + piece) <= WIDTH:
            lines[-1] += piece
        else:
            lines.append("    " + piece.lstrip())
    return lines
