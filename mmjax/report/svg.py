"""Charts as inline SVG: lines over steps, and the strip of a schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmjax.report.html import Html, join, tag

COLOURS = 10  # in the style sheet, as classes c0 to c9
MOST_POINTS = 5000  # of one line in the picture
_SMOOTH_POINTS = 1000
_WIDTH, _HEIGHT = 400, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 8, 34
_LOG_FROM = 50.0  # a positive range wider than this factor is drawn on a logarithmic axis


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
      x, y: its points, by ascending x; one whose y is not finite is a gap.
      style: CSS classes: `raw`, `smooth` or `flat`, and a colour `cN`.
    """

    x: np.ndarray
    y: np.ndarray
    style: str


@dataclass(frozen=True)
class _Axis:
    """The map from values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, values: np.ndarray) -> np.ndarray:
        low, high = self._scaled(np.array([self.low, self.high]))
        return self.start + (self._scaled(values) - low) / (high - low) * (self.end - self.start)

    def _scaled(self, values: np.ndarray) -> np.ndarray:
        # Below the lower end of a logarithmic axis is nothing that it could show.
        return np.log10(np.maximum(values, self.low)) if self.log else np.asarray(values, float)

    def ticks(self) -> list[float]:
        if self.log and self.high / self.low > 10:
            return log_ticks(self.low, self.high)
        return ticks(self.low, self.high)


def colour(index: int) -> str:
    """Return the class of the colour of the task `index`."""
    return f"c{index % COLOURS}"


def smoothed(line: Line, span: float, style: str) -> Line:
    """Return the mean of about `span` neighbours at up to a thousand of the line's points.

    Windows lie evenly around their point, and are smaller near the start, so that the curve begins
    at the first value and does not lag; at the end they hold what is left. What is not finite is
    passed over; NaN where a window holds nothing else.
    """
    count, half = len(line.x), int(span // 2)
    places = np.unique(np.linspace(0, max(count - 1, 0), min(count, _SMOOTH_POINTS)).round())
    means = []
    for i in places.astype(int).tolist():
        reach = min(half, i)
        window = line.y[i - reach : i + reach + 1]
        window = window[np.isfinite(window)]
        means.append(window.mean() if len(window) else np.nan)
    return Line(line.x[places.astype(int)], np.array(means), style)


def thinned(line: Line, most: int = MOST_POINTS) -> Line:
    """Return at most about `most` points: of each run of neighbours the lowest and the highest stay."""
    count = len(line.x)
    if count <= most:
        return line
    indices = {0, count - 1}
    finite = np.where(np.isfinite(line.y), line.y, np.nan)
    for part in np.array_split(np.arange(count), most // 2):
        values = finite[part]
        if np.isfinite(values).any():
            indices |= {int(part[np.nanargmin(values)]), int(part[np.nanargmax(values)])}
    chosen = np.array(sorted(indices))
    return Line(line.x[chosen], line.y[chosen], line.style)


def chart(
    lines: Sequence[Line], label: str, end: int, unit: str = "", log: bool | None = None
) -> Html:
    """Draw lines over steps.

    Args:
      lines: in the order in which they are painted.
      label: what the picture shows, in words, for those who cannot see it.
      end: the last step and one: where the horizontal axis ends.
      unit: of the vertical axis.
      log: whether that axis is logarithmic; where None, it is if the values range widely.

    Returns:
      The picture, or a line of text where no value is finite.
    """
    lines = [thinned(line) for line in lines]
    values = np.concatenate([line.y[np.isfinite(line.y)] for line in lines] or [np.zeros(0)])
    if not len(values):
        return tag("p", "No finite values.", class_="none")
    y = _vertical(values, log)
    x = _Axis(0.0, float(end), _LEFT, _WIDTH - _RIGHT)
    parts = [_frame(x, y, unit), *(_path(line, x, y) for line in lines)]
    return tag(
        "svg", *parts, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=label,
        class_="chart",
    )  # fmt: skip


def strip(places: Sequence[int], steps: int, style: str, label: str) -> Html:
    """Return a lane of the schedule: of `steps` steps, those at `places` are filled."""
    cells = "".join(f"M{place} 0h1v1h-1z" for place in places)
    return tag(
        "svg", tag("path", d=cells), viewBox=f"0 0 {steps} 1", preserveAspectRatio="none",
        role="img", aria_label=label, class_=f"lane {style}",
    )  # fmt: skip


def spark(values: Sequence[float]) -> Html:
    """Return a small line of how a number moved, for the eye only; nothing for less than two."""
    known = np.array([v for v in values if math.isfinite(v)])
    if len(known) < 2:
        return Html("")
    y = _Axis(*_padded(known.min(), known.max(), 0.0), 18, 2)(known)
    x = np.linspace(2, 58, len(known))
    end = tag("circle", cx=f"{x[-1]:.1f}", cy=f"{y[-1]:.1f}", r="2")
    line = tag("path", d=_moves(x, y))
    return tag("svg", line, end, viewBox="0 0 60 20", class_="spark", aria_hidden="true")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers from `low` to `high`."""
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return the powers of ten from `low` to `high`, with 2 and 5 between them where these are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    many = len(powers) > 4
    marks = [m * 10.0**p for p in powers for m in ((1,) if many else (1, 2, 5))]
    inside = [v for v in marks if low * 0.999 <= v <= high * 1.001]
    return inside[:: max(1, -(-len(inside) // 7))]


def short(value: float) -> str:
    """Return a number at a tick: 0.002, 25, 1,500, 20k, 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _vertical(values: np.ndarray, log: bool | None) -> _Axis:
    low, high = float(values.min()), float(values.max())
    if log is None:
        log = low > 0 and high / low > _LOG_FROM
    if log and low > 0:
        return _Axis(low / 1.1, high * 1.1, _HEIGHT - _BOTTOM, _TOP, log=True)
    return _Axis(*_padded(low, high, 0.05), _HEIGHT - _BOTTOM, _TOP)


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    """Return a range of more than nothing around the two."""
    low, high = float(low), float(high)
    if not high - low > 1e-12 * max(abs(low), abs(high)):
        margin = 0.1 * abs(low) or 1.0
        return low - margin, high + margin
    return low - share * (high - low), high + share * (high - low)


def _frame(x: _Axis, y: _Axis, unit: str) -> Html:
    """Draw ticks, their numbers and the horizontal lines."""
    base, parts = _HEIGHT - _BOTTOM, []
    for value, at in zip(y.ticks(), y(np.array(y.ticks())), strict=True):
        where = f"{at:.1f}"
        parts.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=where, y2=where))
        shown = short(value)
        parts.append(tag("text", shown, x=_LEFT - 5, y=f"{at + 4:.1f}", text_anchor="end"))
    for value, at in zip(x.ticks(), x(np.array(x.ticks())), strict=True):
        if value == int(value):
            place = "end" if at > _WIDTH - 24 else "middle"
            parts.append(tag("text", short(value), x=f"{at:.1f}", y=base + 16, text_anchor=place))
    name = f"step{f', {unit} upward' if unit else ''}{', logarithmic' if y.log else ''}"
    middle = (_LEFT + _WIDTH - _RIGHT) // 2
    parts.append(tag("text", name, x=middle, y=_HEIGHT - 4, text_anchor="middle", class_="axis"))
    return tag("g", *parts, class_="frame")


def _path(line: Line, x: _Axis, y: _Axis) -> Html:
    return tag("path", d=_moves(x(line.x), y(line.y)), class_=f"line {line.style}")


def _moves(x: np.ndarray, y: np.ndarray) -> str:
    """Draw one M or L for each finite point; a gap lifts the pen."""
    parts, is_down = [], False
    finite = np.isfinite(y)
    for i, ok in enumerate(finite.tolist()):
        if ok:
            parts.append(f"{'L' if is_down else 'M'}{x[i]:.1f} {y[i]:.1f}")
            is_alone = not is_down and (i + 1 == len(y) or not finite[i + 1])
            parts.append("h0" if is_alone else "")  # with round ends, a point that can be seen
        is_down = ok
    return join(parts)
