"""A task that predicts and shows, and its examples, for the report."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from mmjax.evaluators.base import Predict
from mmjax.modalities.base import Input
from mmjax.objectives.base import Classifies, Shows

Parse = Callable[[str], Any]


EVIL = "<script>alert(1)</script>"


CLASSES = 8


class Drawn(list[Any]):
    """Examples in a list; those that are None cannot be read."""

    description, credits = "made", ()
    labels = {"kind": [f"{EVIL} {i}" for i in range(CLASSES - 1)]}  # one class has no name

    def __getitem__(self, index: Any) -> Any:
        example = super().__getitem__(index)
        if example is None:
            raise ValueError("corrupt")
        return example


def drawn_examples() -> Drawn:
    result = Drawn({"x": np.full((8, 8), 10 * i, np.uint8), "kind": i % CLASSES} for i in range(20))
    result.insert(3, None)
    return result


class Guesser(Classifies, Shows):
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


def guessing_task() -> Any:
    """Return a task that reads one field by two modalities."""
    spec = {"x": SimpleNamespace(shape=(8, 8), dtype=np.uint8)}
    modality = SimpleNamespace(
        raw=lambda v: v, arrays=lambda s: spec, preprocess=lambda s, v, r: {"x": v}
    )
    inputs = {m: Input(m, modality, SimpleNamespace(field="x")) for m in ("one", "two")}
    return SimpleNamespace(name=EVIL, inputs=inputs, objective=Guesser())


def guessing_pass() -> Any:
    source = SimpleNamespace(label=EVIL)
    return SimpleNamespace(computation=Predict(("one", "two")), fields=("kind",), source=source)
