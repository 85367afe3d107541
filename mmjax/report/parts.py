"""The sections of the report, each from the run's files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from mmjax.monitor.summary import LATEST, latest
from mmjax.monitor.tables import human_count, human_seconds, loss_text, percent
from mmjax.report.data import Run, Visits, wanted_shares
from mmjax.report.html import Child, Html, bar, table, tag
from mmjax.report.svg import Line, chart, colour, smoothed, strip
from mmjax.schedule.schedule import numbers_of

LANE = 200  # steps of the strip
_MOST_EVENTS = 50
_SHOWN_APART = ("loss", "baseline", "learning_rate", "seconds", "wait", "busy", "flops_per_second", "mfu",
                "examples", "tokens", "valid_tokens")  # fmt: skip
_NOW = f"over the last {LATEST} visits"  # as in the tables: see `tally.latest`


def facts(run: Run, parameters: int) -> Iterator[Html]:
    """Yield the facts below the title: how far the run is, and what it is."""
    steps = run.config.get("steps")
    ended = "finished" if run.is_done else "not finished when this page was written"
    of = f" of {steps:,}" if isinstance(steps, int) else ""
    yield tag(
        "p", f"{run.step:,}{of} steps over {_count(run.tasks, 'task')}; {ended}.", class_="lead"
    )
    shown = {
        "began (UTC)": _moment(run.log[0]["time"]) if run.log else None,
        "last sign (UTC)": _moment(run.log[-1]["time"]) if run.log else None,
        "time in all": human_seconds(run.seconds["total"]) if run.log else None,
        "attempts": f"{run.seconds['attempts']:.0f}" if run.log else None,
        "parameters": f"{parameters:,}" if parameters else None,
        "seed": str(run.config["seed"]) if "seed" in run.config else None,
        **_environment((run.meta or {}).get("environment", {})),
    }
    pairs = [(name, value) for name, value in shown.items() if value]
    terms = (
        tag("div", tag("dt", n), tag("dd", v), class_="whole" if len(v) > 60 else None)
        for n, v in pairs
    )
    yield tag("section", tag("dl", *terms), aria_label="Facts")


def named(run: Run, task: str) -> Html:
    """Return a task's name beside its colour."""
    return coloured(task, colour_of(run, task))


def coloured(words: str, style: str) -> Html:
    """Return words beside a dot of the colour (a class) that they have in a picture."""
    dot = tag("span", class_=f"dot {style}", aria_hidden="true")
    return tag("span", dot, tag("span", words), class_="named")


def colour_of(run: Run, task: str) -> str:
    """Return the class of a task's colour, the same in every part of the page."""
    names = list(run.tasks)
    return colour(names.index(task)) if task in names else "c7"


def losses(run: Run) -> Html:
    """Return a panel for each task: each loss light, their running mean dark, the baseline dashed."""
    return _panels(_loss_panel(run, name, visits) for name, visits in run.tasks.items())


def schedule(run: Run) -> Iterator[Html]:
    """Yield the first steps as lanes, and the realised shares."""
    if not run.order:
        return
    planned = run.schedule()
    shown = min(LANE, len(run.order))
    lanes = [part for name in run.tasks for part in _lane(run, name, shown)]
    ends = tag("span", tag("span", "step 0"), tag("span", f"step {shown - 1}"), class_="ends")
    yield tag("h3", f"The first {shown} steps")
    yield tag("div", *lanes, ends, class_="lanes")
    target_shares = wanted_shares(planned, len(run.order)) if planned else {}
    yield _shares_table(run, target_shares)
    if planned:
        rows = [
            (f"{s.start:,}", s.rule, ", ".join(f"{t} {w}" for t, w in s.weights.items()))
            for s in planned.segments
        ]
        yield table("Segments of the schedule", ("from step", "rule", numbers_of(planned)), rows)


def optimisation(run: Run) -> Iterator[Html]:
    """Yield charts of learning rate, gradient norms, and whatever else the objectives measure."""
    ran = {name: visits for name, visits in run.tasks.items() if len(visits.step)}
    if not ran:
        return
    rates = {name: visits.of("learning_rate") for name, visits in ran.items()}
    norms = {n: v.of("grad_norm") for n, v in ran.items() if "grad_norm" in v.values}
    figures = [_together(run, "learning rate", rates, 0)]
    if norms:
        figures.append(_together(run, "gradient norm", norms, 1 / 30, log=True))
    yield _panels(figures)
    measures = [
        _measure(run, name, measure, measure.replace("_", " "))
        for name, visits in ran.items()
        for measure in visits.values
        if measure not in _SHOWN_APART
    ]
    if measures:
        yield tag("details", tag("summary", "Training metrics of each task"), _panels(measures))


def rates(run: Run) -> Html:
    """Return a chart of examples per second of each task's steps."""
    rates_by_task = {n: v.rates for n, v in run.tasks.items() if len(v.step)}
    return _panels([_together(run, "examples per second", rates_by_task, 1 / 30)])


def parameters(rows: Sequence[Mapping[str, Any]]) -> Html:
    """Return a table of parameters by part of the model, the largest first."""
    total = sum(row["total"] for row in rows)
    ordered = sorted(rows, key=lambda row: -row["total"])
    cells: list[Sequence[Child]] = [
        (
            row["part"],
            f"{row['total']:,}",
            percent(row["total"] / total),
            bar(row["total"] / total),
            _maybe(row.get("active_per_token"), "{:,}"),
        )
        for row in ordered
    ]
    cells.append(("all", f"{total:,}", percent(1.0), None, None))
    return table("By part", ("part", "#total", "#share", "", "#active per token"), cells)


def events(run: Run) -> Iterator[Html]:
    """Yield a list of restarts, signals, steps without update, and errors."""
    rows = [row for line in run.log if (row := _event(line)) is not None]
    if len(rows) > _MOST_EVENTS:
        yield tag("p", f"The last {_MOST_EVENTS} of {len(rows)}.", class_="remark")
    if rows:
        heads = ("when (UTC)", "#attempt", "what", "")
        yield table("Events", heads, rows[-_MOST_EVENTS:])


def _environment(known: Mapping[str, Any]) -> dict[str, str]:
    """Return mesh, machine and versions, as the checkpoint holds them."""
    if not known:
        return {}
    mesh = {axis: size for axis, size in known.get("mesh", {}).items() if size != 1}
    apart = ("device_kind", "processor")
    versions = [f"{n} {v}" for n, v in known.items() if isinstance(v, str) and n not in apart]
    return {
        "mesh": " x ".join(f"{axis} {size}" for axis, size in mesh.items()) or "one device",
        "devices": f"{known.get('devices')} x {known.get('device_kind')}",
        "processes": str(known.get("processes")),
        "processor": f"{known.get('processor')}, {known.get('cores')} cores",
        "versions": ", ".join(versions),
    }


def _loss_panel(run: Run, name: str, visits: Visits) -> Html:
    loss, baseline, style = visits.of("loss"), visits.of("baseline"), colour_of(run, name)
    count = len(visits.step)
    if not count:
        return _figure(named(run, name), "has not run yet", Html(""))
    raw = Line(visits.step, loss, f"raw {style}")
    flat = smoothed(Line(visits.step, baseline, ""), 3 * _span(count), "flat")
    dark = smoothed(raw, _span(count), f"smooth {style}")
    row = run.row(name)
    words = f"{loss_text(_first(loss))} at first, {loss_text(row.get('loss'))} {_NOW}"
    if np.isfinite(baseline).any():
        words += f"; {loss_text(_last(flat.y))} uninformed (dashed)"
    words += f"; {_count(visits.step, 'visit')}"
    if row.get("skipped"):
        words += f", {row['skipped']:,} without update (not finite)"
    picture = chart([raw, flat, dark], f"Loss of {name} over steps: {words}", run.step, "loss")
    return _figure(named(run, name), words, picture)


def _measure(run: Run, task: str, key: str, words: str) -> Html:
    """Return a panel of one measure of one task."""
    visits, style = run.tasks[task], colour_of(run, task)
    raw = Line(visits.step, visits.of(key), f"raw {style}")
    dark = smoothed(raw, _span(len(raw.x)), f"smooth {style}")
    caption = f"{words}: {_short(_first(raw.y))} at first, {_short(_latest(raw.y))} {_NOW}"
    picture = chart([raw, dark], f"{task}, {caption}", run.step, words)
    return _figure(named(run, task), caption, picture)


def _together(
    run: Run, words: str, values: Mapping[str, np.ndarray], part: float, log: bool = False
) -> Html:
    """Return a panel of one measure of all tasks, smoothed over a `part` of each task's visits.

    The legend has the mean of each task's latest visits; the very last value where nothing is smoothed.
    """
    lines, legend = [], []
    for name, series in values.items():
        raw = Line(run.tasks[name].step, series, "")
        lines.append(smoothed(raw, part * len(series), f"smooth {colour_of(run, name)}"))
        legend.append(
            tag("li", named(run, name), f" {_short(_latest(series) if part else _last(series))}")
        )
    picture = chart(lines, f"{words} over steps, by task", run.step, words, log)
    heads = (tag("h3", words.capitalize()), tag("ul", *legend, class_="legend"))
    return tag("figure", tag("figcaption", *heads), picture)


def _lane(run: Run, name: str, shown: int) -> tuple[Html, Html]:
    places = [int(step) for step in run.tasks[name].step if step < shown]
    label = f"{name} runs at {len(places)} of the first {shown} steps"
    return named(run, name), strip(places, shown, colour_of(run, name), label)


def _shares_table(run: Run, configured: Mapping[str, float]) -> Html:
    total = len(run.order)
    rows = []
    for name, visits in run.tasks.items():
        share = len(visits.step) / total
        asked = configured.get(name)
        away = None if asked is None else f"{len(visits.step) - asked * total:+.2f}"
        rows.append(
            (
                named(run, name),
                f"{len(visits.step):,}",
                percent(share),
                bar(share, colour_of(run, name), {} if asked is None else {"wanted": asked}),
                None if asked is None else percent(asked),
                away,
            )
        )
    heads = ("task", "#visits", "#share", "", "#wanted", "#visits off")
    return table("Shares of the steps, realised and wanted", heads, rows)


def _event(line: Mapping[str, Any]) -> Sequence[Child] | None:
    """Return a row for each remarkable entry: events, later attempts, activities that ended with an error."""
    when, attempt = _moment(line["time"]), str(line.get("attempt", ""))
    if line.get("line") == "event":
        return when, attempt, str(line.get("name")), str(line.get("text", ""))
    if line.get("line") == "start" and line.get("attempt"):
        return when, attempt, "started again", ""
    if line.get("line") == "end" and "error" in line:
        return when, attempt, f"{line.get('phase')} ended with an error", str(line["error"])
    return None


def _panels(figures: Any) -> Html:
    return tag("div", *figures, class_="grid")


def _figure(name: Html, words: str, picture: Html) -> Html:
    caption = tag("figcaption", tag("h3", name), tag("p", words))
    return tag("figure", caption, picture)


def _span(count: int) -> float:
    """Return the number of visits over which a curve is smoothed: a thirtieth, but at least five."""
    return max(5.0, count / 30)


def _first(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known[0]) if len(known) else math.nan


def _last(values: np.ndarray) -> float:
    return _first(values[::-1])


def _latest(values: np.ndarray) -> float:
    mean = latest(values.tolist())
    return math.nan if mean is None else mean


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 or not math.isfinite(value) else human_count(value)


def _maybe(value: Any, form: str) -> str | None:
    return None if value is None else form.format(value)


def _count(things: Any, name: str) -> str:
    return f"{len(things):,} {name}{'' if len(things) == 1 else 's'}"


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
