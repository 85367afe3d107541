"""Tables and numbers for people: within 80 columns, numbers whole and to the right."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmjax.monitor import goodput

WIDTH = 80  # columns where the stream is no terminal
_NUMBER = re.compile(
    r"[-+]?(\d[\d.,]*(e[-+]?\d+)?|nan|inf)( ?[A-Za-z%/]{0,8})"
    r"|\d+[dhm]\d+[hms]"  # durations
    r"|[-?]?"
)
_CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # colours and cursor movements
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)"  # titles and links
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)
_RULED = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
_TEXT_CELLS = 8  # a column of text is folded down to this before a table becomes a list


def console_for(stream: TextIO | None = None) -> Console:
    """Return a console that writes control codes to terminals only; standard output if None."""
    stream = stream or sys.stdout
    plain = {"markup": False, "emoji": False, "highlight": False, "force_jupyter": False}
    if getattr(stream, "isatty", lambda: False)():
        return Console(file=stream, **plain)  # type: ignore[arg-type]
    # Set explicitly: variables such as FORCE_COLOR must not colour a log file.
    fixed = {"force_terminal": False, "color_system": None, "width": WIDTH}
    return Console(file=stream, **plain, **fixed)  # type: ignore[arg-type]


def without_control_codes(text: str) -> str:
    """Return `text` without escape sequences and control characters; newlines and tabs stay."""
    return _CONTROL.sub("", text)


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    stream: TextIO | None = None,
) -> None:
    """Print a table no wider than the terminal, or than 80 columns in a log file.

    Columns of numbers stand to the right and are never broken; text is folded. Where the numbers
    alone are too wide, each row becomes a short list.

    Args:
      title: the line above; may be empty.
      columns: their heads.
      rows: a cell for each column: text, numbers, truth values or None.
      stream: standard output if None.
    """
    console = console_for(stream)
    cells = [[_cell(cell) for cell in row] for row in rows]
    numeric = [_is_numeric([row[i] for row in cells]) for i in range(len(columns))]
    needed = sum(
        max(len(text) for text in (head, *(row[i] for row in cells))) if numeric[i] else _TEXT_CELLS
        for i, head in enumerate(columns)
    )
    is_wide = needed + 2 * (len(columns) - 1) > console.width
    renderable = (
        _as_lists(columns, cells) if is_wide else _as_table(console, columns, cells, numeric)
    )
    with console.capture() as capture:
        if title:
            console.print(Text(without_control_codes(title), style="bold"))
        console.print(renderable)
    lines = [line.rstrip() for line in capture.get().rstrip().split("\n")]
    console.file.write("\n".join(lines) + "\n\n")
    console.file.flush()


def program_table(rows: Sequence[Mapping[str, Any]], stream: TextIO | None = None) -> None:
    """Print the compiled programs.

    Args:
      rows: name (the task), kind (train, embed/MODALITY), shape (a short text), bytes (at the peak), flops,
        compile_seconds, cached (a truth value), tokens (positions of a training step, padding included). What is not
        known is None or missing. Where a task's `update_scope` is not shared, a second table shows views and
        `optimizer_bytes`.
      stream: standard output if None.
    """
    heads = ("task", "for", "shape", "positions", "memory", "FLOPs", "compile")
    cells = [
        (
            row["name"],
            # For several modalities, the shape shows it.
            row["kind"].split("/")[0] if "+" in row["kind"] else row["kind"],
            row.get("shape"),
            _known(human_count, row.get("tokens")),
            _known(human_bytes, row.get("bytes")),
            _known(human_flops, row.get("flops")),
            "cached" if row.get("cached") else _known(human_seconds, row.get("compile_seconds")),
        )
        for row in rows
    ]
    table(f"Programs ({len(rows)})", heads, cells, stream)
    if any(row.get("view", "shared") != "shared" for row in rows):
        views = [
            (row["name"], row["view"], _known(human_bytes, row.get("optimizer_bytes")))
            for row in rows
            if "view" in row
        ]
        table("Optimizer", ("task", "view", "memory"), views, stream)


def results_table(records: Sequence[Mapping[str, Any]], stream: TextIO | None = None) -> None:
    """Print the results of evaluations by task, beside those of chance and of the largest class.

    Args:
      records: name, task, split, value, chance, majority (optional), count, unit (optional), evaluator and
        step (optional; older runs have none).
        Fractions are shown in percent, and so are records without the key `unit`, which older runs have; a loss is
        a number, of which the lower is the better; other units stand beside their number. With `better: lower` the
        lower value is the better one, whatever the unit.
      stream: standard output if None.
    """
    heads = ["measure", "split", "value", "chance", "majority", "examples"]
    cells: list[list[Any]] = []
    group = ""
    for record in records:
        name = ", ".join(filter(None, [record["task"], record.get("evaluator")]))
        if name != group:
            group = name
            cells.append([group, *[None] * (len(heads) - 1)])
        unit = record.get("unit", "fraction")
        measure = f"  {record['name']}" + (" (lower is better)" if is_better_lower(record) else "")
        against = [_amount(record.get(key), unit) for key in ("value", "chance", "majority")]
        cells.append([measure, record["split"], *against, record.get("count")])
    if not any(row[4] for row in cells):
        heads.pop(4)
        cells = [row[:4] + row[5:] for row in cells]
    steps = {record.get("step") for record in records} - {None}
    title = f"Results after {steps.pop():,} steps" if len(steps) == 1 else "Results"
    table(title, heads, cells, stream)


def is_better_lower(record: Mapping[str, Any]) -> bool:
    """Return whether a smaller value of a record is the better one: as it states, else for losses."""
    return bool(record.get("better", "lower" if record.get("unit") == "loss" else "") == "lower")


def parameter_table(rows: Sequence[Mapping[str, Any]], stream: TextIO | None = None) -> None:
    """Print the parameters by part of the model, and their sum.

    Args:
      rows: part, total, active_per_token (optional), share (a fraction of all; worked out if
        missing).
      stream: standard output if None.
    """
    total = sum(row["total"] for row in rows)
    cells = [
        (
            row["part"],
            row["total"],
            row.get("active_per_token"),
            percent(row["total"] / total if row.get("share") is None else row["share"]),
        )
        for row in rows
    ]
    active = [row["active_per_token"] for row in rows if row.get("active_per_token") is not None]
    cells.append(("all", total, sum(active) if active else None, percent(1.0)))
    table("Parameters", ("part", "total", "active per token", "share"), cells, stream)


def summary_tables(data: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Print the work of each task, the cost of its steps, and how the run spent its time.

    Args:
      data: as `tally.summary` makes it.
      stream: standard output if None.
    """
    done = [
        (
            row["task"],
            row["visits"],
            human_count(row["examples"]),
            _known(human_count, row.get("valid_tokens")),
            _known(percent, row.get("padding")),
            loss_text(row["loss"]),
            loss_text(row["grad_norm"]),
            row["skipped"] or None,
        )
        for row in data["tasks"]
    ]
    heads = ("task", "visits", "examples", "tokens", "padding", "loss", "gradient", "skipped")
    words = "Tasks (tokens without padding; loss, gradient norm: mean of last 10 visits)"
    table(words, heads, done, stream)
    cost = [
        (
            row["task"],
            *(_known(human_seconds, row[name]) for name in ("step_seconds", "wait_seconds")),
            _known(signed_seconds, row.get("switch_seconds")),
            _known(human_count, row.get("tokens_per_second")),
            *_rates(row),
            percent(row["share"]),
        )
        for row in data["tasks"]
    ]
    heads = ("task", "a step", "wait", "switch", "tokens/s", "FLOP/s", "MFU", "of time")
    table("Steps (switch: longer after another task than after the same)", heads, cost, stream)
    seconds, total = data["seconds"], data["seconds"]["total"]
    spent = [
        (row["label"], human_seconds(row["seconds"]), percent(row["share"]))
        for row in goodput.rows(seconds)
    ]
    attempts = f"{seconds['attempts']:.0f} attempt{'s' if seconds['attempts'] != 1 else ''}"
    table(f"Time ({human_seconds(total)} in {attempts})", ("spent on", "time", "share"), spent, stream)  # fmt: skip


def _rates(row: Mapping[str, Any]) -> tuple[str, str]:
    return _known(human_flops, row.get("flops_per_second")), _known(percent, row.get("mfu"))


def signed_seconds(seconds: float) -> str:
    return f"-{human_seconds(-seconds)}" if seconds < 0 else human_seconds(seconds)


def human_bytes(count: float) -> str:
    """Format bytes as 512 B or 1.5 MiB."""
    return _scaled(count, 1024, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def human_count(count: float) -> str:
    """Format a count as 950, 12.3k, 1.2M or 7.0B: thousands, millions, billions."""
    return _scaled(count, 1000, ("", "k", "M", "B", "T"))


def human_flops(count: float) -> str:
    """Format FLOPs as 950, 12.3 k, 1.2 M or 7.0 G: decimal prefixes."""
    return _scaled(count, 1000, ("", " k", " M", " G", " T", " P", " E"))


def human_seconds(seconds: float) -> str:
    """Format seconds as 12ms, 3.2s, 1m40s, 1h02m or 2d05h."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f}ms"
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    hours = round(seconds / 3600)
    return f"{hours // 24}d{hours % 24:02d}h"


def percent(fraction: float) -> str:
    """Format 0.123 as 12.3 %; use two digits after the point below one percent."""
    value = 100 * fraction
    return f"{value:.{2 if 0 < abs(value) < 1 else 1}f} %"


def loss_text(loss: float | None) -> str:
    """Format a loss in few characters: 4.12, 0.0831, 1.2e+05."""
    if loss is None:
        return "-"
    size = abs(loss)
    if not math.isfinite(size):
        return str(float(loss))
    if size >= 1e5 or 0 < size < 1e-4:
        return f"{loss:.1e}"
    return f"{loss:.0f}" if size >= 1000 else f"{loss:.3g}" if 0 < size < 0.1 else f"{loss:.2f}"


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
    if not math.isfinite(value):
        return "?"
    for unit in units:
        is_whole = abs(value) >= 99.95 or value == int(value) and unit == units[0]
        text = f"{value:.0f}" if is_whole else f"{value:.1f}"
        if abs(float(text)) < base or unit == units[-1]:
            break
        value /= base
    return text + unit


def _known(form: Any, value: float | None) -> str:
    return "-" if value is None else form(value)


def _amount(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "fraction":
        return percent(value)
    return loss_text(value) if unit in ("", "loss") else f"{loss_text(value)} {unit}"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else without_control_codes(str(value))


def _is_numeric(cells: Sequence[str]) -> bool:
    return any(cells) and all(_NUMBER.fullmatch(cell) for cell in cells)


def _as_table(
    console: Console,
    columns: Sequence[str],
    cells: Sequence[Sequence[str]],
    numeric: Sequence[bool],
) -> Table:
    rule = box.SIMPLE_HEAD if console.is_terminal and not console.options.ascii_only else _RULED
    result = Table(
        box=rule, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold"
    )
    for head, is_number in zip(columns, numeric, strict=True):
        side = "right" if is_number else "left"
        result.add_column(Text(head), justify=side, no_wrap=is_number, overflow="fold")  # type: ignore[arg-type]
    for row in cells:
        result.add_row(*(Text(cell) for cell in row))
    return result


def _as_lists(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> Table:
    result = Table.grid(padding=(0, 2, 0, 0))
    result.add_column(no_wrap=True)
    result.add_column(overflow="fold")
    for row in cells:
        for head, cell in zip(columns, row, strict=True):
            result.add_row(Text(f"  {head}"), Text(cell))
        result.add_row("", "")
    return result
