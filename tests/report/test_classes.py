"""The panels of classified examples, and of what an objective shows."""

from types import SimpleNamespace
from typing import Any

import numpy as np
from guessing import CLASSES, EVIL, Drawn, Parse, drawn_examples, guessing_pass, guessing_task

from mmjax.report import classes
from mmjax.report.classes import Guesses, guesses, mistakes
from mmjax.report.panel import EXAMPLES


def _model() -> Any:
    """Return a model that finds the class after the right one likeliest, then the right one."""

    def predict(inputs: Any) -> np.ndarray:
        label = np.asarray(inputs["one"]["x"])[:, 0, 0] // 10 % CLASSES
        return 2.0 * np.eye(CLASSES)[(label + 1) % CLASSES] + np.eye(CLASSES)[label]

    return SimpleNamespace(compiled=lambda function: predict)


def test_each_example_shows_its_likeliest_classes(parse: Parse) -> None:
    task, examples = guessing_task(), drawn_examples()
    found = guesses(_model(), task, guessing_pass(), examples)
    assert found.unreadable == 1 and found.index.tolist() == [0, 1, 2, *range(4, 21)]
    assert found.label.tolist() == [i % CLASSES for i in range(20)]
    panel = classes.panel(task, guessing_pass(), examples, found, EXAMPLES)
    page = parse(panel.body)
    page.assert_is_harmless()
    assert panel.title == f"{EVIL}: 21 held-out examples; 1 could not be read"
    assert (
        EVIL not in panel.body and f"{EVIL} 3" in page.text and f"class {CLASSES - 1}" in page.text
    )
    assert "8 of 8 have the right one among the 5 likeliest of 8 classes." in page.text
    # One picture a card, though two modalities read it; the right class is marked, in second place.
    assert len(page.all("img")) == 8 and page.text.count("right\n") == 8
    assert len([d for d in page.all("li") if d.get("class") == "right"]) == 8
    shares = np.exp([2.0, 1.0, 0.0])
    first = f"{100 * shares[0] / (shares[0] + shares[1] + 6):.1f} %"
    assert page.text.count(first) == 8


def test_nothing_to_read_is_said(parse: Parse) -> None:
    found = guesses(_model(), guessing_task(), guessing_pass(), Drawn([None] * 3))
    panel = classes.panel(guessing_task(), guessing_pass(), Drawn([None] * 3), found, EXAMPLES)
    assert panel.title.endswith("3 held-out examples; 3 could not be read") and not panel.body


def test_mistakes_are_counted_by_pairs(parse: Parse) -> None:
    label = np.array([0, 0, 0, 0, 1, 1, 2])
    guess = np.array([1, 1, 1, 0, 0, 1, 5])
    found = Guesses(np.arange(7), label, np.eye(6)[guess], 0)
    cells = parse(mistakes(found, ["<b>zero", "one"]) or "").text.split()
    assert cells[-4:] == ["<b>zero", "one", "3", "4"]
    right = Guesses(np.arange(7), label, np.eye(6)[label], 0)
    assert mistakes(right, []) is None
