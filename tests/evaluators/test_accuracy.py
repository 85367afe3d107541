"""Accuracy: counted by hand, ties against us, and a trained task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toyrun
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.core import config as configs
from mmjax.core.errors import UserError
from mmjax.evaluators.accuracy import Accuracy, rank
from mmjax.evaluators.base import Predict, row_spec
from mmjax.experiment import make_experiment
from mmjax.modalities.image import Image
from mmjax.modalities.text import Text
from mmjax.task import Task, make_task

SOURCE = {"name": "tfds", "dataset": "emoji", "split": "test_drawing"}
OBJECTIVE = {"name": "classification", "classes": 3, "label": "group"}


def task(**more: Any) -> Task:
    block = {
        "source": SOURCE,
        "inputs": {"image": {"size": 16}, "text": {"length": 8}},
        "objective": OBJECTIVE,
        "batch": 4,
        **more,
    }
    return make_task("groups", block, {"image": Image(), "text": Text()})


def score(logits: Any, labels: Any) -> list[dict[str, Any]]:
    outputs = {
        "all": {"logits": np.asarray(logits, np.float32), "group": np.asarray(labels, np.int32)}
    }
    return Accuracy(source=SOURCE).score(task(), outputs)


def test_by_hand() -> None:
    logits = [[3, 1, 0], [0, 1, 2], [5, 1, 0], [0, 2, 1]]
    (record,) = score(logits, [0, 2, 1, 0])
    assert record == {
        "name": "top-1 accuracy",
        "task": "groups",
        "split": "test_drawing",
        "value": 0.5,
        "chance": 1 / 3,
        "majority": 0.5,
        "count": 4,
        "unit": "fraction",
    }


def test_with_many_classes_the_five_best_count_too() -> None:
    labels = np.array([0, 4, 5, 0, 11, 3])
    logits = np.tile(-np.arange(12.0), (6, 1))
    one, five = score(logits, labels)
    assert (one["name"], one["value"], one["chance"]) == ("top-1 accuracy", 2 / 6, 1 / 12)
    assert (five["name"], five["value"], five["chance"]) == ("top-5 accuracy", 4 / 6, 5 / 12)
    assert (one["majority"], five["majority"]) == (2 / 6, 6 / 6)
    assert len(score(np.zeros((2, 10)), [0, 1])) == 1 and len(score(np.zeros((2, 11)), [0, 1])) == 2


@given(
    rows=st.lists(st.lists(st.integers(-2, 2), min_size=12, max_size=12), min_size=1, max_size=8)
)
@settings(max_examples=50, deadline=None)
def test_ranks_against_sorting_with_ties_against_us(rows: list[list[int]]) -> None:
    logits = np.array(rows, np.float32)
    labels = np.arange(len(rows))
    for found, row, label in zip(rank(logits, labels), rows, labels, strict=True):
        before = sorted(range(12), key=lambda c: (-row[c], c == label))
        assert found == before.index(label)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, -np.inf])
def test_a_model_that_says_the_same_of_every_class_is_never_right(value: float) -> None:
    (record,) = score(np.full((4, 3), value), [0, 0, 1, 2])
    assert record["value"] == 0


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_out_of_range_is_not_scored(label: int) -> None:
    with pytest.raises(
        UserError, match=rf"tasks.groups.*'test_drawing'.*'group' has the value {label}, .*\[0, 3\)"
    ):
        score(np.zeros((2, 3)), [0, label])


def test_nothing_to_score() -> None:
    with pytest.raises(UserError, match="no example that could be read"):
        score(np.zeros((0, 3)), [])


def test_a_pass_reads_only_what_is_classified() -> None:
    made = task()
    each = Accuracy(source=SOURCE).passes(made)["all"]
    assert (each.computation, each.fields) == (Predict(("image",)), ("group",))
    assert list(row_spec(made, each).inputs) == ["image"]
    two = row_spec(made, type(each)(Predict(("text", "image")), SOURCE, ()))
    assert list(two.inputs) == ["text", "image"]


def test_an_objective_that_predicts_no_classes() -> None:
    other = {"name": "masked_image"}
    with pytest.raises(UserError, match="tasks.groups: accuracy needs an objective that predicts"):
        Accuracy(source=SOURCE).passes(task(objective=other))


# --- through the mains -------------------------------------------------------------------------

CONFIG = """
import importlib.util
from ml_collections import ConfigDict

def get_config():
    spec = importlib.util.spec_from_file_location("tiny", {tiny!r})
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    config = tiny.get_config()
    emoji = {{"name": "tfds", "dataset": "emoji"}}
    with config.unlocked():
        config.tasks = ConfigDict({{"groups": {{
            "source": {{**emoji, "split": "train"}},
            "inputs": {{"image": {{"size": 16}}}},
            "objective": {{"name": "classification", "classes": {classes}, "label": "group"}},
            "batch": 64,
            "evaluators": {{
                "drawings": {{"name": "accuracy", "source": {{**emoji, "split": "test_drawing"}}}},
                "loss": {{"name": "held_out_loss", "source": {{**emoji, "split": "test_drawing"}}}},
            }},
        }}}})
    config.optimizer = {{
        "algorithm": {{"name": "adamw"}}, "learning_rate": 3e-3, "warmup": 5, "weight_decay": 0.0,
    }}
    config.checkpoint = {{"every": 0}}
    config.steps = {steps}
    return config
"""
TINY = Path(__file__).resolve().parent.parent / "configs" / "tiny.py"


def config(folder: Path, classes: int, steps: int) -> str:
    path = folder / f"classes_{classes}.py"
    path.write_text(CONFIG.format(tiny=str(TINY), classes=classes, steps=steps))
    return str(path)


def test_groups_of_drawings_are_learnt(
    emoji_dir: epath.Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = configs.read_file(config(tmp_path, classes=9, steps=60))
    toyrun.run(tmp_path / "run", config=made)
    assert "predict/image" in capsys.readouterr().out
    records = json.loads((tmp_path / "run" / "results.json").read_text())
    (top,) = [r for r in records if r["name"] == "top-1 accuracy"]
    (loss,) = [r for r in records if r["name"] == "held-out loss"]
    assert top["split"] == "test_drawing" and top["chance"] == pytest.approx(1 / 9)
    assert 0.1 < top["majority"] < 0.4 and top["count"] > 100
    assert top["value"] > 1.2 * top["chance"]
    assert loss["value"] < loss["chance"] == pytest.approx(np.log(9))
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if "accuracy" in line)
    assert first["loss"] == pytest.approx(np.log(9), rel=1e-5)


def test_the_experiment_compiles_one_program_for_it(emoji_dir: epath.Path, tmp_path: Path) -> None:
    from mmjax.core import flags

    block = flags.read_config(config(tmp_path, classes=9, steps=2), [])
    passes = make_experiment(block).passes()
    assert sorted(str(each.computation) for _, each in passes) == ["loss", "predict/image"]


def test_of_some_modalities_only() -> None:
    objective = {
        "name": "classification",
        "classes": 9,
        "label": "group",
        "modalities": ["image", "text"],
    }
    made = task(objective=objective)
    one = Accuracy(source=SOURCE, modalities=("text",))
    assert one.passes(made)["all"].computation == Predict(("text",))
    (record,) = one.score(made, {"all": {"logits": np.eye(9), "group": np.arange(9)}})
    assert record["name"] == "top-1 accuracy of text"
    with pytest.raises(UserError, match="accuracy of 'txt'.*'text'"):
        Accuracy(source=SOURCE, modalities=("txt",)).passes(made)
