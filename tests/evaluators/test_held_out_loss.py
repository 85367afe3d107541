"""The held-out loss, and what every evaluator shares: rows, functions and records."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brightness import SOURCE, Brightness, task

from mmjax.core.batch import Batch
from mmjax.core.errors import UserError
from mmjax.core.parameters import Declaration
from mmjax.core.sharding import MeshConfig, make_mesh
from mmjax.engine.steps import ModelSpec, eval_request
from mmjax.evaluators.base import Record, function
from mmjax.evaluators.held_out_loss import HeldOutLoss, LossAndBaseline
from mmjax.modalities.base import Input
from mmjax.modalities.image import Image, ImageInput
from mmjax.modalities.text import Text, TextInput
from mmjax.model import ModelConfig, declare_model
from mmjax.nn.towers import Widths
from mmjax.nn.trunk import GroupConfig
from mmjax.objectives.base import Loss, with_rows
from mmjax.objectives.classification import Classification
from mmjax.objectives.transfusion import Transfusion
from mmjax.task import Task, TaskConfig


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


def columns(**given: Any) -> dict[str, np.ndarray]:
    """Return columns of five rows, of batches of 2, 2 and 1: a value for each batch, or for all."""
    return {
        name.replace("_", " "): np.repeat(np.broadcast_to(np.asarray(x, np.float64), 3), [2, 2, 1])
        for name, x in given.items()
    }


def test_a_mean_over_terms_is_over_those_of_all_batches() -> None:
    """Of 6, 2 and 10 tokens: each row stands for its batch's share of them."""
    rows = columns(loss=[1, 2, 3], baseline=[4, 4, 5], terms=[3, 1, 10], weight=1, compared=0)
    [record] = HeldOutLoss(source=SOURCE).score(task(), {"all": rows})
    assert record["value"] == pytest.approx((6 * 1 + 2 * 2 + 10 * 3) / 18)
    assert record["chance"] == pytest.approx((8 * 4 + 10 * 5) / 18)
    assert record["count"] == 5 and "compared" not in record


def test_rows_that_are_compared_with_each_other_are_those_of_the_fullest_batches() -> None:
    rows = columns(loss=[1, 2, 50], baseline=[4, 6, 0], terms=1, weight=1, compared=[2, 2, 1])
    [record] = HeldOutLoss(source=SOURCE).score(task(), {"all": rows})
    assert (record["value"], record["chance"]) == (1.5, 5.0)
    assert (record["count"], record["compared"]) == (4, 2)


def test_a_loss_of_several_means_is_their_sum_with_what_is_in_none() -> None:
    """3 one + 0.5 two + an auxiliary loss of 0.25, the first compared; each part has its record."""
    one, two = np.array([1.0, 2.0, 9.0]), np.array([4.0, 8.0, 2.0])
    rows = columns(
        loss=3 * one + 0.5 * two + 0.25, baseline=0, one=one, two=two, baseline_one=[5, 5, 0],
        baseline_two=[6, 6, 7], terms_one=1, terms_two=[1, 3, 4], weight_one=3, weight_two=0.5,
        compared_one=[2, 2, 1], compared_two=0,
    )  # fmt: skip
    whole, first, second = HeldOutLoss(source=SOURCE).score(task(), {"all": rows})
    mean = (2 * 4 + 6 * 8 + 4 * 2) / 12
    assert (first["value"], first["chance"], first["count"], first["compared"]) == (1.5, 5, 4, 2)
    assert second["value"] == pytest.approx(mean) and second["count"] == 5
    assert second["chance"] == pytest.approx((8 * 6 + 4 * 7) / 12) and "compared" not in second
    assert whole["value"] == pytest.approx(3 * 1.5 + 0.5 * mean + 0.25)
    assert whole["chance"] == pytest.approx(3 * 5 + 0.5 * second["chance"])
    assert (whole["count"], whole["compared"]) == (4, 2)


def test_a_loss_of_no_terms_is_not_a_number() -> None:
    rows = columns(loss=0, baseline=0, terms=0, weight=1, compared=0)
    [record] = HeldOutLoss(source=SOURCE).score(task(), {"all": rows})
    assert np.isnan(record["value"])
    # Of several means, the others are the loss.
    rows = columns(
        loss=2, baseline=5, one=2, baseline_one=5, terms_one=1, weight_one=1, two=0, baseline_two=0,
        terms_two=0, weight_two=3,
    )  # fmt: skip
    whole, first, second = HeldOutLoss(source=SOURCE).score(task(), {"all": rows})
    assert whole["value"] == first["value"] == 2 and np.isnan(second["value"])


LENGTHS = (1, 1, 15, 15, 4)
MODALITIES = {
    "text": Text(vocabulary=11, max_positions=16),
    "image": Image(patch=2, max_positions=2),
}


def sequences(*order: str) -> tuple[Task, Declaration, dict[str, jax.Array]]:
    """Return a task of texts of very different lengths (and pictures), and a tiny model of it."""
    inputs = {"text": Input("text", MODALITIES["text"], TextInput(length=15))}
    inputs["image"] = Input("image", MODALITIES["image"], ImageInput(size=4))
    objective = Transfusion(modalities=order, head="h", condition_dropout=0.5)
    block = {"name": "transformer", "num_heads": 2, "mlp_dim": 8}
    config = ModelConfig(8, (GroupConfig(1, (block,)),))
    chosen = {m: inputs[m] for m in order}
    heads = [("h", objective.heads(Widths.same(8), chosen))]
    declaration = declare_model(config, {m: MODALITIES[m] for m in order}, heads)
    rng = np.random.default_rng(0)
    p = {n: jnp.asarray(rng.normal(size=s.shape)) for n, s in declaration.specs.items()}
    source: Any = None
    return Task("t", TaskConfig({}, {}, {}, 4), chosen, objective, source), declaration, p


@cache
def program(order: tuple[str, ...], size: int) -> tuple[Task, Any]:
    """Return the task, and its evaluation of a batch of a size."""
    made, declaration, p = sequences(*order)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    request = eval_request(
        ModelSpec(declaration, jnp.float64, jnp.float64, 0), made, LossAndBaseline(), size, p, mesh
    )
    return made, jax.jit(partial(request.function, p))


def evaluated(order: Sequence[str], size: int, rows: Sequence[int]) -> list[Record]:
    """Return the records of a split of these rows, by the program of an evaluation with batches of a size."""
    made, call = program(tuple(order), size)
    rng, columns = np.random.default_rng(1), []
    ids = rng.integers(4, 11, (len(LENGTHS), 15)).astype(np.int32)
    pixels = rng.integers(0, 256, (len(LENGTHS), 4, 4, 3)).astype(np.uint8)
    for index, start in enumerate(range(0, len(rows), size)):
        at = list(rows[start : start + size])
        valid = np.arange(size) < len(at)
        at += [0] * (size - len(at))
        lengths = np.array(LENGTHS)[at]
        text = {"ids": ids[at], "valid": np.arange(15) < lengths[:, None]}
        inputs = {m: {"text": text, "image": {"pixels": pixels[at]}}[m] for m in order}
        batch = Batch(inputs=inputs, fields={}, valid=valid)
        found = jax.device_get(call(batch, {"batch": np.int32(index)}))
        columns.append({n: x[valid] for n, x in found.items()})
    outputs = {n: np.concatenate([c[n] for c in columns]) for n in columns[0] if n != "valid"}
    return HeldOutLoss(source=SOURCE).score(made, {"all": outputs})


@pytest.mark.parametrize("order", [("text",), ("text", "image")])
def test_it_does_not_depend_on_the_batch_of_the_evaluation(order: tuple[str, ...]) -> None:
    """Nor do the times, the noise and the choices that are drawn for each example."""
    with jax.enable_x64(True):
        wanted = evaluated(order, 5, range(5))
        for one, other in zip(evaluated(order, 2, range(5)), wanted, strict=True):
            assert one == {
                **other,
                "value": pytest.approx(other["value"], rel=1e-6),
                "chance": pytest.approx(other["chance"], rel=1e-6),
            }


def test_it_is_the_cost_of_all_tokens_over_their_number() -> None:
    """Of a language model: each text alone, weighted by its tokens."""
    with jax.enable_x64(True):
        alone = [evaluated(("text",), 1, [row])[0]["value"] for row in range(5)]
        [whole, _] = evaluated(("text",), 2, range(5))
    assert whole["value"] == pytest.approx(np.average(alone, weights=LENGTHS), rel=1e-6)
    assert abs(whole["value"] - np.mean(alone)) > 1e-2


def test_an_objective_that_reports_no_baseline() -> None:
    """It is refused where the program is traced, which comes before the first step."""
    batch = Batch({"image": {"pixels": np.ones((2, 4, 4, 3))}}, {}, jnp.ones(2, bool))
    silent = mock.patch.object(Brightness, "__call__", lambda *_: Loss(jnp.float32(1)))
    error = "tasks.bright.evaluators: objective Brightness reports no 'baseline'"
    with silent, pytest.raises(UserError, match=error):
        jax.eval_shape(
            lambda key: function(task(), LossAndBaseline())(2.0, batch, key), jax.random.key(0)
        )


def test_outputs_without_a_baseline_are_refused_too() -> None:
    """Another evaluator of the loss, which needs none, may share its program."""
    with pytest.raises(UserError, match="objective Brightness reports no 'baseline'"):
        HeldOutLoss(source=SOURCE).score(task(), {"all": {"loss": np.ones(3)}})


def test_the_pass_it_needs() -> None:
    [each] = HeldOutLoss(source=SOURCE).passes(task()).values()
    assert each.computation == LossAndBaseline() and each.block == SOURCE and each.fields == ()
    assert each.source.label == "test_concept"


def test_it_compares_the_loss_without_auxiliary_losses_with_the_baseline() -> None:
    """The value is the cross-entropy of the predicted classes by NumPy, whatever the balance of experts costs."""
    experts = {"count": 3, "router": {"name": "token_choice"}, "losses": {"balance": 7.0}}
    block = {"name": "transformer", "num_heads": 1, "mlp_dim": 4, "experts": experts}
    objective = Classification(head="h", label="label", classes=5, modalities=("image",))
    inputs = {"image": Input("image", MODALITIES["image"], ImageInput(size=4))}
    config = ModelConfig(8, (GroupConfig(1, (block,)),))
    declaration = declare_model(
        config, MODALITIES, [("h", objective.heads(Widths.same(8), inputs))]
    )
    rng = np.random.default_rng(0)
    source: Any = None
    p = {n: jnp.asarray(rng.normal(size=s.shape)) for n, s in declaration.specs.items()}
    pixels = {"pixels": rng.integers(0, 256, (3, 4, 4, 3)).astype(np.uint8)}
    label = np.array([1, 4, 0])
    batch = Batch({"image": pixels}, {"label": label}, np.ones(3, bool))
    made = Task("t", TaskConfig({}, {}, {}, 3), inputs, objective, source)
    with jax.enable_x64(True):
        model = declaration.merge(p)
        key = jax.random.key(0)
        outputs = jax.device_get(function(made, LossAndBaseline())(model, batch, key))
        x = np.asarray(objective.predict(model, with_rows(batch).inputs))
    cost = np.log(np.exp(x).sum(axis=1)) - x[np.arange(3), label]
    [record] = HeldOutLoss(source=SOURCE).score(made, {"all": outputs})
    assert record["value"] == pytest.approx(cost.mean(), rel=1e-6)
    assert record["chance"] == pytest.approx(np.log(5), rel=1e-6)
    assert record["auxiliary"] > 6  # 7 where experts are used evenly, at most 21
    assert outputs["loss"][0] == pytest.approx(cost.mean() + record["auxiliary"], rel=1e-6)
