"""The report's section on time, from made-up runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from mmjax.report.costs import costs
from mmjax.report.data import Run, Visits
from mmjax.report.html import join

Parse = Callable[[str], Any]
SECONDS = {
    "step": 60.0,
    "compile": 30.0,
    "mine": 10.0,
    "total": 100.0,
    "attempts": 2.0,
    "unfinished": 0.0,
}
ROW = {
    "task": "<b>one", "step_seconds": 0.5, "share": 0.25, "wait_seconds": 0.125, "visits": 1200,
    "examples": 9600.0, "tokens": 96000.0, "skipped": 3,
}  # fmt: skip


def run(rows: list[dict[str, Any]], seconds: Any = SECONDS, **changes: Any) -> Run:
    summary = {"seconds": seconds, "tasks": rows, "goodput": 0.6}
    tasks = {row["task"]: Visits(np.arange(2), {}, np.full(2, 8.0)) for row in rows}
    values: dict[str, Any] = {
        "workdir": epath.Path("/run"), "config": {"steps": 9}, "meta": None, "meta_step": 0, "tasks": tasks,
        "order": [], "records": [], "records_step": None, "history": {}, "log": [{"time": 0.0}], "summary": summary,
    }  # fmt: skip
    return Run(**{**values, **changes})


def read(parse: Parse, of: Run) -> Any:
    page = parse(join(costs(of)))
    page.assert_is_harmless()
    return page, " ".join(page.text.split())


def test_phases_are_listed_with_their_share_and_drawn_as_wide(parse: Parse) -> None:
    page, text = read(parse, run([]))
    assert "Goodput 60.0 %" in text
    widths = [a["style"] for a in page.all("span") if "fill" in a.get("class", "")]
    assert sorted(widths) == ["width:10.00%", "width:30.00%", "width:60.00%"]
    for words in ("60.0 %", "30.0 %", "mine 10.0s 10.0 %", "100.0 %"):
        assert words in text
    assert "Time by activity, over all attempts" in text and "killed" not in text


def test_an_attempt_without_an_end_was_killed_or_is_still_going(parse: Parse) -> None:
    cut = {**SECONDS, "unfinished": 2.0}
    assert "(2 killed or still going)" in read(parse, run([], cut))[1]
    ended = run([], cut, meta_step=9, records=[{"name": "a"}])
    assert "(2 killed)" in read(parse, ended)[1]


def test_a_run_without_a_log_has_no_phases(parse: Parse) -> None:
    assert list(costs(run([], log=[]))) == []
    assert list(costs(run([], {**SECONDS, "total": 0.0}))) == []


def test_columns_of_which_nothing_is_known_are_left_out(parse: Parse) -> None:
    heads = [t for kind, t in read(parse, run([ROW]))[0].texts if kind == "th"]
    assert "waiting" in heads and not {"MFU", "FLOP/s", "switch", "padding", "tokens/s"} & set(
        heads
    )
    known = {
        **ROW,
        "mfu": 0.4,
        "flops_per_second": 2e12,
        "switch_seconds": 0.01,
        "padding": 0.5,
        "tokens_per_second": 10.0,
    }
    page, text = read(parse, run([ROW, {**known, "task": "two"}]))
    heads = [t for kind, t in page.texts if kind == "th"]
    assert {"MFU", "FLOP/s", "switch", "padding", "tokens/s"} <= set(heads)
    assert "40.0 %" in text and "50.0 %" in text


def test_what_each_task_did_is_counted_with_examples_that_could_not_be_read(parse: Parse) -> None:
    meta = {"clock": {"invalid": {"<b>one": 1234}}}
    _, text = read(parse, run([ROW, {**ROW, "task": "two"}], meta=meta, meta_step=5))
    assert "1,200" in text and "1,234" in text
    assert "up to the checkpoint of step 5." in text
    assert "1,234" not in read(parse, run([ROW]))[1]
