"""What the tasks of a run cost, from its `summary.json`: bars of step times, shares and FLOP/s."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmjax.monitor.report_data import Run
from mmjax.monitor.report_html import Child, Html, bar, number, table, tag
from mmjax.monitor.report_parts import colour_of, coloured, named
from mmjax.monitor.tables import human_count, human_seconds, percent, signed_seconds

# Of the whole time, in this order: phases of the log, what they are, and their colour.
_PARTS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("step",), "useful steps", "c2"),
    (("wait_data",), "waiting for data", "c6"),
    (("repeated",), "repeated steps", "c4"),
    (("compile",), "compiling", "c0"),
    (("eval",), "evaluating", "c3"),
    (("save", "restore"), "checkpoints", "c5"),
    (("init", "report", "other"), "the rest", "c7"),
)
_LEAST = 1e-4  # of the time: what is less is not told


def costs(run: Run) -> Iterator[Html]:
    """The goodput split as one bar, and a row of bars for each task."""
    if run.log and run.seconds["total"] > 0:
        yield _split(run)
    rows = run.costs.get("tasks", [])
    if rows:
        yield _tasks(run, rows)
        yield tag(
            "p", "FLOP/s count the model's dot products in forward and backward pass; MFU is their part of"
            " the chips' peak, where that is known. A switch is what the median step after another task is"
            " longer than after the same. Padding is the part of the positions that holds no token; tokens per second"
            " do not count it.", class_="remark",
        )  # fmt: skip


def _split(run: Run) -> Html:
    total = run.seconds["total"]
    found = [
        (words, colour, sum(run.seconds.get(phase, 0.0) for phase in phases) / total)
        for phases, words, colour in _PARTS
    ]
    told = [part for part in found if part[2] > _LEAST]
    bars = (
        tag("span", class_=f"fill {colour}", style=f"width:{100 * share:.2f}%")
        for _, colour, share in told
    )
    legend = (
        tag("li", coloured(words, colour), " ", number(percent(share), share))
        for words, colour, share in told
    )  # fmt: skip
    good = run.seconds.get("step", 0.0) / total
    return tag(
        "div", tag("h3", "Goodput ", number(percent(good), good)),
        tag("div", *bars, class_="split", aria_hidden="true"), tag("ul", *legend, class_="legend"),
    )  # fmt: skip


def _tasks(run: Run, rows: Sequence[Mapping[str, Any]]) -> Html:
    """Columns of which nothing is known are left out."""
    heads = ("task", "#step", "of the longest", "#share of time", "", "#waiting", "#switch", "#tokens/s",
             "#padding", "#FLOP/s", "#MFU", "")  # fmt: skip
    longest = max(row["step_seconds"] for row in rows) or 1.0
    cells = [_row(row, colour_of(run, row["task"]), longest, run) for row in rows]
    kept = [i for i in range(len(heads)) if any(row[i] is not None for row in cells)]
    chosen = [[row[i] for i in kept] for row in cells]
    return table("What a step of each task costs", [heads[i] for i in kept], chosen)


def _row(row: Mapping[str, Any], colour: str, longest: float, run: Run) -> list[Child]:
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
        None if rate is None else number(human_count(rate), rate),
        None if mfu is None else number(percent(mfu), mfu),
        None if mfu is None else bar(mfu, colour),
    ]
