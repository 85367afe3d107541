"""The results of a run against chance: what is good at a glance, then every measure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmjax.monitor.tables import is_better_lower, loss_text, percent
from mmjax.report.data import Run, key_of
from mmjax.report.html import Child, Html, bar, grouped_table, join, number, tag
from mmjax.report.parts import colour_of, named
from mmjax.report.svg import spark

Record = Mapping[str, Any]
_MARGIN = 2.0  # standard errors of a fraction at chance
_ROOM = 1.25  # of a loss's bar: its end, in losses of an uninformed prediction


def results(run: Run) -> Iterator[Html]:
    """Yield a tile for each task with the first measure of each split, and a table of all."""
    if run.records:
        yield from _newest(run)
    elif run.step:
        yield tag("p", "No evaluation yet.", class_="none")
    if run.evaluations:
        yield _later(run)


def _newest(run: Run) -> Iterator[Html]:
    """Yield the run's own newest results."""
    when = "of results.json" if run.records_step is None else f"after {run.records_step:,} steps"
    yield tag(
        "p", f"On held-out data, {when}. ", tag("span", "Green", class_="chip good"),
        " is better than chance and than always predicting the largest class, by more than"
        f" {_MARGIN:.0f} standard errors; a loss is lower than that of a prediction independent of the input.",
        class_="remark",
    )  # fmt: skip
    tasks: dict[str, list[Record]] = {name: [] for name in run.tasks}
    for record in run.records:
        tasks.setdefault(str(record.get("task")), []).append(record)
    evaluated = {name: records for name, records in tasks.items() if records}
    yield tag("div", *(_tile(run, n, rows) for n, rows in evaluated.items()), class_="tiles")
    summary = tag("summary", f"All {len(run.records)} measures")
    yield tag("details", summary, _table(run, evaluated), open="")


def _later(run: Run) -> Html:
    """Return the table of the records of `mmjax evaluate`, grouped by command, in the order of time."""
    heads = ("measure", "evaluator", "#step", "split", "#value", "#chance")
    groups: dict[str, list[list[Child]]] = defaultdict(list)
    for record in run.evaluations:
        stamp = [str(record.get(name, "")) for name in ("time", "command")]
        unit = _unit(record)
        groups[", ".join(stamp)].append([
            join([named(run, str(record.get("task", ""))), ", ", _measure(record)]),
            str(record.get("evaluator", "")),
            str(record.get("step", "")),
            str(record.get("split", "")),
            *(_amount(number_of(record, name), unit) for name in ("value", "chance")),
        ])  # fmt: skip
    summary = tag("summary", f"By mmjax evaluate ({len(run.evaluations)})")
    return tag("details", summary, grouped_table("By mmjax evaluate", heads, groups))


def is_good(record: Record) -> bool:
    """Return whether a value beats chance: a fraction by more than luck, and the largest class too."""
    value, chance = number_of(record, "value"), number_of(record, "chance")
    if value is None or chance is None:
        return False
    if is_better_lower(record):
        return value < chance
    if _unit(record) != "fraction":
        return value > chance
    against = max(chance, number_of(record, "majority") or 0.0)
    count = number_of(record, "count") or 0.0
    error = math.sqrt(max(against * (1 - against), 0.0) / count) if count > 0 else math.inf
    return value > against + _MARGIN * error


def number_of(record: Record, name: str) -> float | None:
    value = record.get(name)
    return float(value) if isinstance(value, int | float) else None


def _tile(run: Run, task: str, records: Sequence[Record]) -> Html:
    firsts: dict[str, Record] = {}
    for record in records:
        firsts.setdefault(str(record.get("split", "")), record)
    lines = (_line(split, record) for split, record in firsts.items())
    return tag("div", tag("h3", named(run, task)), tag("ul", *lines), class_="tile")


def _line(split: str, record: Record) -> Html:
    unit = _unit(record)
    against = [_against(record, "chance", "uninformed" if unit == "loss" else "chance")]
    against.append(_against(record, "majority", "largest class"))
    words = ", ".join(filter(None, [_measure(record), split, *against]))
    value = tag("span", _amount(number_of(record, "value"), unit), class_="value")
    return tag("li", value, _chip(record, " chance"), tag("span", words, class_="note"))


def _against(record: Record, name: str, words: str) -> str | None:
    value = number_of(record, name)
    # With a space that does not break: a percent sign stays with its number.
    return (
        None if value is None else f"{words} {_shown(value, _unit(record))}".replace(" %", "\xa0%")
    )


def _table(run: Run, tasks: Mapping[str, Sequence[Record]]) -> Html:
    """Return rows by task and split; columns that would be empty are omitted."""
    heads = ("measure", "#value", "against chance", "", "#chance", "#majority", "#examples",
             "so far")  # fmt: skip
    groups: dict[str, list[list[Child]]] = defaultdict(list)
    for task, records in tasks.items():
        for record in records:
            parts = [
                named(run, task),
                str(record.get("evaluator", "")),
                str(record.get("split", "")),
            ]
            title = join([parts[0], *(f", {part}" for part in parts[1:] if part)])
            groups[title].append(_row(run, task, record))
    every = [row for rows in groups.values() for row in rows]
    shown = [i for i in range(len(heads)) if any(row[i] for row in every)]
    chosen = {title: [[row[i] for i in shown] for row in rows] for title, rows in groups.items()}
    remark = (
        "In the bars, a full line is chance (for a loss, a prediction independent of the input), "
        "a dotted one the largest class."
    )
    return join(
        [
            grouped_table("Every measure", [heads[i] for i in shown], chosen),
            tag("p", remark, class_="remark"),
        ]
    )


def _row(run: Run, task: str, record: Record) -> list[Child]:
    unit = _unit(record)
    return [
        _measure(record),
        _amount(number_of(record, "value"), unit),
        _chip(record),
        _bar(record, colour_of(run, task)),
        _amount(number_of(record, "chance"), unit),
        _amount(number_of(record, "majority"), unit),
        f"{record['count']:,}" if record.get("count") is not None else None,
        spark(run.history.get(key_of(record), [])),
    ]


def _bar(record: Record, style: str) -> Html | None:
    unit, value, chance = _unit(record), number_of(record, "value"), number_of(record, "chance")
    if value is None or unit not in ("fraction", "loss"):
        return None
    scale = chance * _ROOM if unit == "loss" and chance else 1.0
    against = {"chance": chance, "majority": number_of(record, "majority")}
    return bar(value / scale, style, {n: x / scale for n, x in against.items() if x is not None})


def _chip(record: Record, than: str = "") -> Html | None:
    """Return how many times chance, or how far below the uninformed loss; green if that is good."""
    value, chance = number_of(record, "value"), number_of(record, "chance")
    if value is None or not chance or not math.isfinite(value):
        return None
    words = f"{value / chance:.1f} times{than}"
    if is_better_lower(record):
        words = f"{percent(abs(value / chance - 1))} {'lower' if value < chance else 'higher'}"
    return tag("span", words, class_="chip good" if is_good(record) else "chip")


def _unit(record: Record) -> str:
    """Return the unit of a record; older runs have fractions without one."""
    return str(record.get("unit", "fraction"))


def _measure(record: Record) -> str:
    name = str(record.get("name"))
    return f"{name} (lower is better)" if is_better_lower(record) else name


def _shown(value: float, unit: str) -> str:
    shown = percent(value) if unit == "fraction" else loss_text(value)
    return shown if unit in ("", "fraction", "loss") else f"{shown} {unit}"


def _amount(value: float | None, unit: str) -> Html | None:
    return None if value is None else number(_shown(value, unit), value)
