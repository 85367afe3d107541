"""Progress in a log file: a column for each task, where there is room for all in 80."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len, chop_cells

from mmjax.monitor.tables import WIDTH

_STEP, _RATE, _LEFT = 6, 7, 8  # cells of the columns that are always there, gaps with them
_LEAST, _MOST = 8, 14  # cells of a task's column, of which two are the gap
_TITLE = "Loss of each task (smoothed), examples per second and time left"
_AGAIN = 25  # lines after which the heads are repeated


class Columns:
    """Lines whose numbers stand below each other, under heads that are repeated now and then.

    Args:
      names: of the tasks, free of control codes.
      total: steps of the run.
    """

    def __init__(self, names: Sequence[str], total: int):
        self._total, self._step = f"of {total}", max(_STEP, len(f"of {total}"))
        room = (WIDTH - self._step - _RATE - _LEFT) // max(len(names), 1)
        self._width, self.fits = min(room, _MOST), bool(names) and room >= _LEAST
        self._names = [_broken(name, self._width - 2) for name in names] if self.fits else []
        self._lines = 0

    def line(self, step: int, losses: Sequence[str], rate: str, left: str) -> str:
        """Return one line, below the heads when it is time for them."""
        cells = [f"{step}".rjust(self._step), *(loss.rjust(self._width) for loss in losses)]
        line = "".join([*cells, rate.rjust(_RATE), left.rjust(_LEFT)]).rstrip()
        above = [self._heads()] if self._lines % _AGAIN == 0 else []
        above = [_TITLE, *above] if self._lines == 0 else above
        self._lines += 1
        return "\n".join([*above, line])

    def _heads(self) -> str:
        """Return the heads; they end at the bottom line, above their numbers."""
        columns = [("step", self._total), *self._names, ("ex/s",), ("left",)]
        widths = [self._step, *(self._width for _ in self._names), _RATE, _LEFT]
        height = max(map(len, columns))
        rows = []
        for i in range(-height, 0):
            cells = (parts[i] if -i <= len(parts) else "" for parts in columns)
            pairs = zip(cells, widths, strict=True)
            rows.append("".join(" " * (w - cell_len(cell)) + cell for cell, w in pairs).rstrip())
        return "\n".join(rows)


def _broken(name: str, width: int) -> tuple[str, ...]:
    """Return the name in lines of at most `width` cells: whole, else between its words, else anywhere."""
    if cell_len(name) <= width:
        return (name,)
    words = name.replace("_", " ").split() or [name]
    return tuple(piece for word in words for piece in chop_cells(word, width))
