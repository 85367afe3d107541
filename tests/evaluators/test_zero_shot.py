"""Zero-shot classification by the mean vector of a class's names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.evaluators.base import Embed
from mmjax.evaluators.zero_shot import ZeroShot, class_means
from mmjax.objectives.contrastive import Contrastive
from mmjax.task import Task, TaskConfig

SOURCE = {"name": "array_record", "path": "data/pairs", "glob": "held_out*"}
NAMES = {"name": "array_record", "path": "data/pairs", "glob": "train*"}


def task() -> Task:
    objective: Any = Contrastive(modalities=("image", "text"), head="pairs")
    return Task("pairs", TaskConfig({}, {}, {}, 4), {}, objective, None)  # type: ignore[arg-type]


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=8), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_class_means_one_class_at_a_time(labels: list[int], seed: int) -> None:
    vectors = np.random.default_rng(seed).normal(size=(len(labels), 3))
    classes, means = class_means(vectors, np.array(labels))
    assert classes.tolist() == sorted(set(labels))
    for label, mean in zip(classes, means, strict=True):
        own = sum(v for v, i in zip(vectors, labels, strict=True) if i == label)
        np.testing.assert_allclose(mean, own / np.linalg.norm(own), rtol=1e-9)


def test_a_class_whose_vectors_cancel_out_is_zero_not_nan() -> None:
    _, means = class_means(np.array([[1.0, 0.0], [-1.0, 0.0]]), np.array([2, 2]))
    np.testing.assert_array_equal(means, 0)


def outputs() -> dict[str, Any]:
    names = {"vector": np.array([[1, 0], [0.8, 0.6], [0, 1], [-1, 0]]), "group": np.array([4, 4, 6, 9])}  # fmt: skip
    examples = {
        "vector": np.array([[1, 0.1], [0.1, 1], [0.9, 0.4], [-1, 0.1], [0, 1]]),
        "group": np.array([4, 6, 6, 9, 6]),
    }
    return {"names": names, "examples": examples}


def test_the_record() -> None:
    evaluator = ZeroShot(source=SOURCE, names=NAMES)
    [record] = evaluator.score(task(), outputs())
    assert record == {
        "name": "zero-shot group",
        "task": "pairs",
        "split": "held_out",
        "value": pytest.approx(4 / 5),  # the third lies near the mean of group 4
        "chance": pytest.approx(1 / 3),
        "majority": pytest.approx(3 / 5),
        "unit": "fraction",
        "count": 5,
    }
    assert type(record["value"]) is float and type(record["majority"]) is float


def test_a_class_counts_once_however_many_names_it_has() -> None:
    made = outputs()
    many = np.repeat([[0.0, 1.0]], 50, axis=0)
    made["names"]["vector"] = np.concatenate([made["names"]["vector"], many])
    made["names"]["group"] = np.concatenate([made["names"]["group"], np.full(50, 6)])
    [record] = ZeroShot(source=SOURCE, names=NAMES).score(task(), made)
    assert record["value"] == pytest.approx(4 / 5) and record["chance"] == pytest.approx(1 / 3)


def test_an_example_of_a_class_without_a_name_is_wrong_and_counts() -> None:
    made = outputs()
    made["examples"]["group"] = np.array([4, 6, 6, 9, 77])
    [record] = ZeroShot(source=SOURCE, names=NAMES).score(task(), made)
    assert record["value"] == pytest.approx(3 / 5) and record["count"] == 5
    assert record["chance"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("value", [0.5, 0.0, np.nan])
def test_a_model_that_maps_everything_to_one_point_is_never_right(value: float) -> None:
    """Of 100 examples, 70 are of the first class; a guess by position would be right of these."""
    labels = np.repeat([0, 1, 2], [70, 20, 10])
    alike = np.full((100, 7), value, np.float32)
    made = {"vector": alike, "group": labels}
    [record] = ZeroShot(source=SOURCE, names=NAMES).score(task(), {"names": made, "examples": made})
    assert record["value"] == 0 and record["majority"] == 0.7


def test_the_passes_it_needs() -> None:
    passes = ZeroShot(source=SOURCE, names=NAMES, label="subgroup").passes(task())
    assert passes["names"].computation == Embed("text") and passes["names"].block == NAMES
    assert passes["examples"].computation == Embed("image") and passes["examples"].block == SOURCE
    assert {p.fields for p in passes.values()} == {("subgroup",)}
