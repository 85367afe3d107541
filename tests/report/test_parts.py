"""Sections of the report, from made-up runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from etils import epath

from mmjax.report import parts
from mmjax.report.data import Run, Visits
from mmjax.report.html import join

Parse = Callable[[str], Any]
EVIL = "<b>task"


def visits(steps: list[int], **values: list[float]) -> Visits:
    arrays = {name: np.asarray(each, float) for name, each in values.items()}
    return Visits(np.asarray(steps), arrays, np.full(len(steps), 8.0))


def run(**changes: Any) -> Run:
    """Return a run of 8 steps: two of three by the first task; the third task never ran."""
    tasks = {
        EVIL: visits([0, 2, 4, 6], loss=[4, 3, 2, 1], seconds=[2] * 4, learning_rate=[0.1] * 4),
        "two": visits([1, 3, 5, 7], loss=[1, 1, 1, 1], seconds=[4] * 4, learning_rate=[0.1] * 4),
        "three": visits([]),
    }
    summary = {
        "seconds": {"total": 60.0, "attempts": 2.0, "unfinished": 0.0, "step": 30.0},
        "tasks": [{"task": EVIL, "loss": 1.5, "skipped": 2}, {"task": "two", "loss": 1.0}],
        "goodput": 0.5,
    }
    config = {"steps": 8, "seed": 7, "tasks": {EVIL: {"weight": 1}, "two": {"weight": 1}}}
    fields: dict[str, Any] = {
        "workdir": epath.Path("/run"), "config": config, "meta": None, "meta_step": 0, "tasks": tasks,
        "order": [EVIL, "two"] * 4, "records": [{"name": "a"}], "records_step": 8, "history": {},
        "log": [{"time": 0.0, "line": "start"}, {"time": 3600.0, "line": "end"}], "summary": summary,
    }  # fmt: skip
    return Run(**{**fields, **changes})


def read(parse: Parse, html: Any) -> Any:
    page = parse(join(html) if not isinstance(html, str) else html)
    page.assert_is_harmless()
    return page


def test_facts_say_how_far_the_run_is(parse: Parse) -> None:
    page = read(parse, parts.facts(run(), 1234567))
    for words in ("8 of 8 steps over 3 tasks; finished.", "1970-01-01 01:00", "1,234,567", "7"):
        assert words in page.text
    page = read(parse, parts.facts(run(records=[], log=[], config={}), 0))
    assert "8 steps over 3 tasks; not finished when this page was written." in page.text
    assert "parameters" not in page.text and "attempts" not in page.text


def test_a_task_has_one_colour_everywhere_and_an_unknown_one_has_that_of_the_rest() -> None:
    colours = [parts.colour_of(run(), name) for name in (EVIL, "two", "three", "absent")]
    assert len(set(colours[:3])) == 3 and colours[3] == "c7"
    assert f'class="dot {colours[1]}"' in parts.named(run(), "two")


def test_losses_have_first_and_latest_value_and_the_steps_without_update(parse: Parse) -> None:
    page = read(parse, parts.losses(run()))
    words = "4.00 at first, 1.50 over the last"
    assert words in page.text and "4 visits, 2 without update (not finite)" in page.text
    assert "has not run yet" in page.text and len(page.all("figure")) == 3


def test_the_schedule_shows_lanes_and_shares_beside_those_that_were_asked_for(parse: Parse) -> None:
    page = read(parse, parts.schedule(run()))
    assert "The first 8 steps" in page.text and "step 7" in page.text
    assert page.text.count("50.0 %") == 4 and page.text.count("+0.00") == 2
    assert list(parts.schedule(run(order=[]))) == []


def test_rates_are_examples_over_seconds(parse: Parse) -> None:
    assert np.unique(run().tasks[EVIL].rates).tolist() == [4.0]
    page = read(parse, parts.rates(run()))
    legend = " ".join(page.text.split())
    assert f"{EVIL} 4" in legend and "two 2" in legend


def test_optimisation_has_a_picture_of_each_measure_that_was_taken(parse: Parse) -> None:
    page = read(parse, parts.optimisation(run()))
    assert "Learning rate" in page.text and "Gradient norm" not in page.text
    tasks = {
        "one": visits([0, 1], learning_rate=[0.1, 0.2], grad_norm=[3, 5], accuracy=[0.25, 0.5])
    }
    page = read(parse, parts.optimisation(run(tasks=tasks)))
    assert "Gradient norm" in page.text and "accuracy: 0.25 at first" in page.text
    assert list(parts.optimisation(run(tasks={"one": visits([])}))) == []


def test_parameters_stand_by_size_with_their_share(parse: Parse) -> None:
    rows = [{"part": "a", "total": 250}, {"part": "b", "total": 750, "active_per_token": 1000}]
    cells = read(parse, parts.parameters(rows)).text.split("\n")
    text = " ".join(" ".join(cells).split())
    assert text.index("b 750 75.0 %") < text.index("a 250 25.0 %") < text.index("all 1,000 100")
    assert "1,000" in text


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"line": "event", "name": "quarantine", "text": f"task {EVIL}"}, f"quarantine task {EVIL}"),
        ({"line": "start", "attempt": 1}, "1 started again"),
        ({"line": "end", "phase": "save", "error": "OSError: full"}, "save ended with an error OSError: full"),
    ],
)  # fmt: skip
def test_what_a_run_noted_is_a_row(parse: Parse, line: dict[str, Any], words: str) -> None:
    page = read(parse, parts.events(run(log=[{"time": 60.0, **line}])))
    assert words in " ".join(page.text.split()) and "1970-01-01 00:01" in page.text


def test_what_is_usual_is_no_event_and_only_the_last_50_are_shown(parse: Parse) -> None:
    usual = [
        {"time": 0.0, "line": "start", "attempt": 0},
        {"time": 1.0, "line": "end", "phase": "step"},
    ]
    assert list(parts.events(run(log=usual))) == []
    many = [{"time": 0.0, "line": "event", "name": f"event {i}", "text": ""} for i in range(60)]
    page = read(parse, parts.events(run(log=many)))
    assert "The last 50 of 60." in page.text
    assert "event 10\n" in page.text and "event 9\n" not in page.text
