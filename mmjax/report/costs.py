"""The report's section on time: the activities of a run and the costs of its tasks, each number in one place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmjax.monitor import goodput
from mmjax.monitor.tables import human_count, human_flops, human_seconds, percent, signed_seconds
from mmjax.report.data import Run
from mmjax.report.html import Child, Html, bar, join, number, table, tag
from mmjax.report.parts import colour_of, coloured, named, rates

_COLOURS = {
    "step": "c2", "repeated": "c4", "wait_data": "c6", "compile": "c0", "eval": "c3", "save": "c5", "restore": "c8",
    "init": "c9", "report": "c1",
}  # fmt: skip
_OTHER = "c7"


def costs(run: Run) -> Iterator[Html]:
    """Yield goodput and the activities of the run, then what each task did and what its steps cost."""
    if run.log and run.seconds["total"] > 0:
        yield from _phases(run)
    rows = run.summary["tasks"]
    if rows:
        yield _steps(run, rows)
        yield tag(
            "p", "A task's share of time is the time of its steps, waiting for data included, over the time of all"
            " attempts. FLOP/s count the model's dot products in forward and backward pass; MFU is their ratio to"
            " the chips' peak, if that is known. The switch cost is how much longer the median step is after another"
            " task than after the same task. Padding is the fraction of positions without a token; tokens per second"
            " exclude it.", class_="remark",
        )  # fmt: skip
        yield _tasks(run, rows)
        yield rates(run)


def _phases(run: Run) -> Iterator[Html]:
    """Yield a bar of all activities, and a row for each, with the colour that it has in the bar."""
    rows = goodput.rows(run.seconds)
    bars = (
        tag("span", class_=f"fill {_colour(row)}", style=f"width:{100 * row['share']:.2f}%")
        for row in rows
    )
    good = run.summary["goodput"]
    yield tag("h3", "Goodput ", number(percent(good), good))
    yield tag("div", *bars, class_="split", aria_hidden="true")
    cells: list[Sequence[Child]] = [
        (
            coloured(row["label"], _colour(row)),
            number(human_seconds(row["seconds"]), row["seconds"]),
            number(percent(row["share"]), row["share"]),
        )
        for row in rows
    ]
    total = run.seconds["total"]
    cells.append(("all", number(human_seconds(total), total), percent(1.0)))
    yield table(_caption(run), ("phase", "#time", "#share"), cells)


def _caption(run: Run) -> str:
    words, count = "Time by activity, over all attempts", run.seconds["unfinished"]
    if not count:
        return words
    # An attempt that has no end yet may be under way, but not in a run that is at its end.
    return f"{words} ({count:.0f} killed{'' if run.is_done else ' or still going'})"


def _colour(row: Mapping[str, Any]) -> str:
    return _COLOURS.get(row["phase"], _OTHER)


def _steps(run: Run, rows: Sequence[Mapping[str, Any]]) -> Html:
    """Return the costs of steps; columns without any value are omitted."""
    heads = ("task", "#step", "of the longest", "#share of time", "", "#waiting", "#switch", "#tokens/s",
             "#padding", "#FLOP/s", "#MFU", "")  # fmt: skip
    longest = max(row["step_seconds"] for row in rows) or 1.0
    cells = [_step(row, colour_of(run, row["task"]), longest, run) for row in rows]
    shown = [i for i in range(len(heads)) if any(row[i] is not None for row in cells)]
    chosen = [[row[i] for i in shown] for row in cells]
    return table("Cost of a step of each task", [heads[i] for i in shown], chosen)


def _step(row: Mapping[str, Any], colour: str, longest: float, run: Run) -> list[Child]:
    step, mfu, switch = row["step_seconds"], row.get("mfu"), row.get("switch_seconds")
    rate = row.get("flops_per_second")
    return [
        named(run, row["task"]),
        number(human_seconds(step), step),
        bar(step / longest, colour),
        number(percent(row["share"]), row["share"]),
        bar(row["share"], colour),
        number(human_seconds(row["wait_seconds"]), row["wait_seconds"]),
        None if switch is None else number(signed_seconds(switch), switch),
        number(human_count(row["tokens_per_second"]), row["tokens_per_second"])
        if "tokens_per_second" in row
        else None,
        number(percent(row["padding"]), row["padding"]) if "padding" in row else None,
        None if rate is None else number(human_flops(rate), rate),
        None if mfu is None else number(percent(mfu), mfu),
        None if mfu is None else bar(mfu, colour),
    ]


def _tasks(run: Run, rows: Sequence[Mapping[str, Any]]) -> Html:
    invalid = (run.meta or {}).get("clock", {}).get("invalid", {})
    cells: list[Sequence[Child]] = [
        (
            named(run, row["task"]),
            f"{row['visits']:,}",
            number(human_count(row["examples"]), row["examples"]),
            number(human_count(row["tokens"]), row["tokens"]),
            f"{row['skipped']:,}",
            f"{invalid[row['task']]:,}" if row["task"] in invalid else None,
        )
        for row in rows
    ]
    heads = ("task", "#visits", "#examples", "#tokens", "#skipped", "#invalid")
    words = (
        "Skipped: steps without an update, since their loss or gradient was not finite. Invalid:"
    )
    words += f" examples that could not be read, up to the checkpoint of step {run.meta_step:,}."
    return join([table("Work of each task", heads, cells), tag("p", words, class_="remark")])
