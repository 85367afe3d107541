"""The held-out loss, and what every evaluator shares: rows, functions and records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.errors import UserError
from mmjax.evaluator import Pass, function, make_evaluators, row_spec
from mmjax.evaluators.held_out_loss import HeldOutLoss
from mmjax.evaluators.retrieval import Retrieval
from mmjax.modalities.image import Image, ImageInput
from mmjax.modality import Input
from mmjax.objective import Loss, Objective
from mmjax.task import Task, TaskConfig

SOURCE = {"name": "tfds", "dataset": "emoji", "split": "test_concept"}


@dataclass(frozen=True)
class Brightness(Objective):
    """A loss without parameters."""

    def reads(self) -> tuple[str, ...]:
        return ("image",)

    def fields(self) -> tuple[str, ...]:
        return ("group",)

    def heads(self, width: int, inputs: Mapping[str, Input]) -> dict[str, Any]:
        return {}

    def embed(
        self, model: Any, modality: str, arrays: Mapping[str, jax.Array], toward: str = ""
    ) -> jax.Array:
        return arrays["pixels"].mean(axis=(1, 2)) * model

    def __call__(self, model: Any, batch: Mapping[str, Any], key: jax.Array) -> Loss:
        return Loss(jnp.float32(model * 3), {"baseline": jnp.float32(5)})


def task(evaluators: dict[str, Any] | None = None) -> Task:
    image = Input("image", Image(), ImageInput(size=8))
    other = Input("depth", Image(), ImageInput(field="depth", size=16))
    config = TaskConfig({}, {}, {}, 4, evaluators=evaluators or {})
    return Task("bright", config, {"image": image, "depth": other}, Brightness(), None)  # type: ignore[arg-type]


def test_the_record_is_the_mean_over_rows_beside_the_baseline() -> None:
    rows = {"loss": np.array([1.0, 2.0, 6.0]), "baseline": np.array([4.0, 4.0, 7.0])}
    assert HeldOutLoss(source=SOURCE).score(task(), {"all": rows}) == [
        {
            "name": "held-out loss",
            "task": "bright",
            "split": "test_concept",
            "value": 3.0,
            "chance": 5.0,
            "count": 3,
            "unit": "loss",
        }
    ]


def test_a_part_of_the_loss_with_a_baseline_has_a_record_of_its_own() -> None:
    rows = {n: np.ones(2) * i for i, n in enumerate(["loss", "baseline", "text", "baseline text"])}
    whole, text = HeldOutLoss(source=SOURCE).score(task(), {"all": rows})
    assert (whole["name"], whole["value"], whole["chance"]) == ("held-out loss", 0, 1)
    assert (text["name"], text["value"], text["chance"]) == ("held-out loss text", 2, 3)


def test_an_objective_that_reports_no_baseline() -> None:
    with pytest.raises(UserError, match="tasks.bright: objective Brightness reports no 'baseline'"):
        HeldOutLoss(source=SOURCE).score(task(), {"all": {"loss": np.ones(3)}})


def test_the_pass_it_needs() -> None:
    [each] = HeldOutLoss(source=SOURCE).passes(task()).values()
    assert each.what == "loss" and each.block == SOURCE and each.fields == ()
    assert each.source.label == "test_concept"


def test_rows_of_a_pass_hold_what_its_output_needs() -> None:
    embedding = row_spec(task(), Pass("embed/depth", SOURCE, ("concept",)))
    assert set(embedding.inputs) == {"depth"} and embedding.fields == ("concept",)
    loss = row_spec(task(), Pass("loss", SOURCE, ("concept", "group")))
    assert set(loss.inputs) == {"image", "depth"} and loss.fields == ("group", "concept")


def test_functions_give_one_output_per_row() -> None:
    batch = {"inputs": {"image": {"pixels": np.ones((2, 4, 4, 3))}}, "valid": np.ones(2, bool)}
    model: Any = 2.0
    outputs = function(task(), "loss")(model, batch, jax.random.key(0))
    np.testing.assert_array_equal(outputs["loss"], [6.0, 6.0])
    np.testing.assert_array_equal(outputs["baseline"], [5.0, 5.0])
    outputs = function(task(), "embed/image")(model, batch, jax.random.key(0))
    np.testing.assert_array_equal(outputs["vector"], np.full((2, 3), 2.0))


def test_evaluators_are_built_from_their_blocks() -> None:
    blocks = {
        "one": {"name": "held_out_loss", "source": SOURCE},
        "two": {"name": "retrieval", "source": SOURCE, "at": [3]},
    }
    made = make_evaluators(task(blocks))
    assert made["one"] == HeldOutLoss(source=SOURCE)
    assert made["two"] == Retrieval(source=SOURCE, at=(3,))
    with pytest.raises(UserError, match=r"tasks.bright.evaluators.one.name: .*'retrieval'\?"):
        make_evaluators(task({"one": {"name": "retrival"}}))
    with pytest.raises(UserError, match=r"Unknown config key 'tasks.bright.evaluators.one.att'"):
        make_evaluators(task({"one": {"name": "retrieval", "att": [3]}}))
