"""Check what an objective itself shows of held-out examples."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from guessing import EVIL, Parse, drawn_examples, guessing_pass, guessing_task

from mmjax.core.errors import UserError
from mmjax.objectives.base import Objective, Shows, able
from mmjax.report import classes, pictures


def test_an_objective_shows_what_it_makes_of_examples(parse: Parse) -> None:
    def show(batch: Any) -> Any:
        picture = np.asarray(batch.inputs["one"]["x"])
        return {f"{EVIL} as it is": picture, "dark": picture // 2}

    task = guessing_task()
    task.rows = lambda: classes.row_spec(task, guessing_pass())
    model = SimpleNamespace(compiled=lambda function: show)
    panel = pictures.panel(model, task, drawn_examples(), "split", 21)
    page = parse(panel.body)
    page.assert_is_harmless()
    assert panel.title == "split: 21 held-out examples; 1 could not be read"
    assert len(page.all("img")) == 2 * 20 and EVIL not in panel.body
    assert [th for th in page.texts if th[0] == "th"] == [
        ("th", f"{EVIL} as it is"),
        ("th", "dark"),
    ]


def test_an_objective_that_shows_nothing_says_so() -> None:
    class Plain(Objective):
        reads = heads = __call__ = None  # type: ignore[assignment]

    task: Any = SimpleNamespace(objective=Plain())
    assert list(pictures.pictured(None, task, 1)) == []  # type: ignore[arg-type]
    with pytest.raises(UserError, match="Plain is none that shows"):
        able(Plain(), Shows)
