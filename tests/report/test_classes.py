"""The panels of classified examples, and of what an objective shows."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mmjax.core.errors import UserError
from mmjax.evaluators.base import Predict
from mmjax.modalities.base import Input
from mmjax.objectives.base import Classifies, Objective, Shows, able
from mmjax.report import classes, pictures
from mmjax.report.classes import Guesses, guesses, mistakes
from mmjax.report.panel import EXAMPLES

Parse = Callable[[str], Any]
EVIL = "<script>alert(1)</script>"
CLASSES = 8


class _Examples(list[Any]):
    description, credits = "made", ()
    labels = {"kind": [f"{EVIL} {i}" for i in range(CLASSES - 1)]}  # one class has no name

    def __getitem__(self, index: Any) -> Any:
        example = super().__getitem__(index)
        if example is None:
            raise ValueError("corrupt")
        return example


def _examples() -> _Examples:
    made = _Examples(
        {"x": np.full((8, 8), 10 * i, np.uint8), "kind": i % CLASSES} for i in range(20)
    )
    made.insert(3, None)
    return made


class _Objective(Classifies, Shows):
    """Predicts from two modalities, and shows two pictures."""

    def fields(self) -> tuple[str, ...]:
        return ()

    def check_example(self, example: Any) -> None:
        pass

    def predicts(self) -> tuple[str, ...]:
        return ("one", "two")

    def predict(self, model: Any, inputs: Any) -> Any:
        raise AssertionError("the model is a stand-in")

    def shows(self) -> tuple[str, ...]:
        return (f"{EVIL} as it is", "dark")

    def show(self, model: Any, batch: Any, key: Any) -> Any:
        raise AssertionError("the model is a stand-in")


def _task() -> Any:
    """A task that reads one field by two modalities."""
    spec = {"x": SimpleNamespace(shape=(8, 8), dtype=np.uint8)}
    modality = SimpleNamespace(
        raw=lambda v: v, arrays=lambda s: spec, preprocess=lambda s, v, r: {"x": v}
    )
    inputs = {m: Input(m, modality, SimpleNamespace(field="x")) for m in ("one", "two")}
    return SimpleNamespace(name=EVIL, inputs=inputs, objective=_Objective())


def _model() -> Any:
    """Finds the class after the right one likeliest, then the right one."""

    def predict(inputs: Any) -> np.ndarray:
        label = np.asarray(inputs["one"]["x"])[:, 0, 0] // 10 % CLASSES
        return 2.0 * np.eye(CLASSES)[(label + 1) % CLASSES] + np.eye(CLASSES)[label]

    return SimpleNamespace(compiled=lambda function: predict)


def _pass() -> Any:
    source = SimpleNamespace(label=EVIL)
    return SimpleNamespace(computation=Predict(("one", "two")), fields=("kind",), source=source)


def test_each_example_shows_its_likeliest_classes(parse: Parse) -> None:
    task, examples = _task(), _examples()
    found = guesses(_model(), task, _pass(), examples)
    assert found.unreadable == 1 and found.index.tolist() == [0, 1, 2, *range(4, 21)]
    assert found.label.tolist() == [i % CLASSES for i in range(20)]
    panel = classes.panel(task, _pass(), examples, found, EXAMPLES)
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
    found = guesses(_model(), _task(), _pass(), _Examples([None] * 3))
    panel = classes.panel(_task(), _pass(), _Examples([None] * 3), found, EXAMPLES)
    assert panel.title.endswith("3 held-out examples; 3 could not be read") and not panel.body


def test_mistakes_are_counted_by_pairs(parse: Parse) -> None:
    label = np.array([0, 0, 0, 0, 1, 1, 2])
    guess = np.array([1, 1, 1, 0, 0, 1, 5])
    found = Guesses(np.arange(7), label, np.eye(6)[guess], 0)
    cells = parse(mistakes(found, ["<b>zero", "one"]) or "").text.split()
    assert cells[-4:] == ["<b>zero", "one", "3", "4"]
    right = Guesses(np.arange(7), label, np.eye(6)[label], 0)
    assert mistakes(right, []) is None


def test_an_objective_shows_what_it_makes_of_examples(parse: Parse) -> None:
    def show(batch: Any) -> Any:
        picture = np.asarray(batch["inputs"]["one"]["x"])
        return {f"{EVIL} as it is": picture, "dark": picture // 2}

    task = _task()
    task.rows = lambda: classes.row_spec(task, _pass())
    model = SimpleNamespace(compiled=lambda function: show)
    panel = pictures.panel(model, task, _examples(), "split", 21)
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
