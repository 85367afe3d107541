"""Losses that are not a mean over rows: sums of the whole batch, and rows that are paired again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toyrun
from toyrun import host

from mmjax.core.batch import Batch
from mmjax.core.sharding import MeshConfig, batch_sharding, make_mesh
from mmjax.engine.gradient import loss_and_gradient
from mmjax.experiment import Experiment, make_experiment
from mmjax.modalities.base import Input
from mmjax.model import Model
from mmjax.nn.stream import add_up, mean_pool
from mmjax.objectives.base import (
    PAIRING,
    Loss,
    Objective,
    Repaired,
    Represented,
    Summed,
    row_keys,
)
from mmjax.objectives.sum import Member, Sum

ROWS = 8
VALID = np.array([1, 1, 1, 0, 1, 1, 0, 1], bool)  # uneven over the parts
CONCEPTS = np.array([0, 1, 0, 1, 2, 1, 2, 0])

pytestmark = pytest.mark.usefixtures("x64")


def pooled(model: Model, modality: str, batch: Batch) -> tuple[jax.Array, Any]:
    """Return the mean of a modality's tokens, `[B, D]`."""
    stream, aux = model.encode([model.tokens(modality, batch.inputs[modality])], None)
    return mean_pool(stream), aux


@dataclass(frozen=True)
class Variance(Summed):
    """Minus the logarithm of the variance of the batch's features, by sums of them and of their squares."""

    def reads(self) -> tuple[str, ...]:
        return ("a",)

    def heads(self, width: Any, inputs: Mapping[str, Input]) -> dict[str, Any]:
        return {}

    def represent(self, model: Model, batch: Batch, key: jax.Array) -> Represented:
        x_BD, aux = pooled(model, "a", batch)
        x_BD = jnp.where(batch.valid[:, None], x_BD, 0)
        sums = {"count": batch.valid.sum().astype(x_BD.dtype), "x": x_BD.sum(axis=0)}
        return Represented({**sums, "square": jnp.square(x_BD).sum(axis=0)}, aux)

    def compare(self, model: Model, rows: Any, batch: Batch) -> Loss:
        mean_D = rows["x"] / rows["count"]
        return Loss(-jnp.log(rows["square"] / rows["count"] - jnp.square(mean_D)).sum())


@dataclass(frozen=True)
class Matched(Repaired):
    """A contrast of a and b, then the squared distance of each a to its hardest b and to a drawn one, by terms."""

    fields_: tuple[str, ...] = ("concept",)

    def reads(self) -> tuple[str, ...]:
        return ("a", "b")

    def fields(self) -> tuple[str, ...]:
        return self.fields_

    def heads(self, width: Any, inputs: Mapping[str, Input]) -> dict[str, Any]:
        return {}

    def represent(self, model: Model, batch: Batch, key: jax.Array) -> Represented:
        (a_BD, aux_a), (b_BD, aux_b) = (pooled(model, m, batch) for m in ("a", "b"))
        return Represented((a_BD, b_BD), add_up([aux_a, aux_b]))

    def compare(self, model: Model, rows: Any, batch: Batch) -> Loss:
        a_BD, b_BD = rows
        logits_BB = jnp.where(batch.valid[None], a_BD @ b_BD.T, -1e9)
        cost_B = jax.nn.logsumexp(logits_BB, axis=1) - jnp.diagonal(logits_BB)
        value = jnp.where(batch.valid, cost_B, 0).sum() / batch.valid.sum()
        return Loss(value, {"baseline": jnp.log(batch.valid.sum().astype(value.dtype))})

    def pairings(
        self, model: Model, rows: Any, batch: Batch, key: jax.Array
    ) -> dict[str, jax.Array]:
        similar_BB = rows[0] @ rows[1].T
        concept_B = batch.fields["concept"]
        wrong_BB = (concept_B[:, None] != concept_B[None]) & batch.valid[None]
        draws = jax.vmap(lambda k: jax.random.gumbel(k, (ROWS,)))(row_keys(batch, key))
        chosen = [
            jnp.where(wrong_BB, scores_BB, -jnp.inf).argmax(axis=1)
            for scores_BB in (similar_BB, similar_BB + draws)
        ]
        return {"b": jnp.where(wrong_BB.any(axis=1), jnp.stack(chosen), -1)}

    def row_loss(self, model: Model, batch: Batch, key: jax.Array) -> Loss:
        a_BD, b_BD = (pooled(model, m, batch)[0] for m in ("a", "b"))
        terms_B = jnp.where(batch.valid, batch.fields["concept"] + 1, 0)
        weight_B = (1 + batch.fields[PAIRING]) * jnp.square(a_BD - b_BD).sum(axis=1)
        value = (terms_B * weight_B).sum() / jnp.maximum(terms_B.sum(), 1)
        return Loss(value, {"baseline": value * 0 + 2}, count=terms_B.sum())


@pytest.fixture(scope="module")
def built() -> Experiment:
    block = toyrun.block()
    layer = {"name": "transformer", "num_heads": 2, "mlp_dim": 8}
    block["model"] = {"width": 8, "layers": [{"repeat": 1, "blocks": [layer]}]}
    block["modalities"] = {"a": {"name": "toy"}, "b": {"name": "toy"}}
    pair = {"name": "contrastive", "modalities": ["a", "b"], "positive_key": "concept"}
    inputs = {"a": {"tokens": 2}, "b": {"tokens": 3}}
    task = {"source": {"name": "toy"}, "inputs": inputs, "objective": pair, "batch": ROWS}
    block["tasks"] = {"pairs": task}
    return make_experiment(block)


def batch_of(built: Experiment) -> Batch:
    rng = np.random.default_rng(3)
    shapes = built.tasks["pairs"].rows().batch(ROWS)
    drawn = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape).astype(s.dtype)), shapes)
    fields = {"concept": jnp.asarray(CONCEPTS, jnp.int32)}
    return replace(drawn, fields=fields, valid=jnp.asarray(VALID))


def loss(built: Experiment, objective: Objective, count: int) -> tuple[Loss, Any]:
    """Return the loss of a batch and its gradient, in `count` micro-batches."""
    task = built.tasks["pairs"]
    task = replace(task, config=replace(task.config, microbatches=count), objective=objective)
    parameters = built.declaration.initialise(0, jnp.float64)
    merge, key = built.declaration.merge, jax.random.key(1)
    of = jax.jit(lambda p, batch: loss_and_gradient(task, merge, p, batch, key))
    return host(of(parameters, batch_of(built)))


def features(built: Experiment) -> tuple[np.ndarray, np.ndarray]:
    """Return the features of each row alone."""

    @jax.jit
    def of(parameters: Any, batch: Batch) -> Any:
        model = built.declaration.merge(parameters)
        return tuple(pooled(model, m, batch)[0] for m in ("a", "b"))

    parameters = built.declaration.initialise(0, jnp.float64)
    a, b = of(parameters, batch_of(built))
    return np.asarray(a), np.asarray(b)


BOTH = Sum(
    head="s",
    members={"spread": Member(Variance(head="v"), 0.5), "match": Member(Matched(head="m"), 2.0)},
)


def test_micro_batches_keep_value_and_gradient(built: Experiment) -> None:
    (whole, gradient), (parts, summed) = (loss(built, BOTH, n) for n in (1, 4))
    np.testing.assert_allclose(parts.value, whole.value, rtol=1e-11)
    assert parts.metrics.keys() == whole.metrics.keys()
    for name, metric in whole.metrics.items():
        np.testing.assert_allclose(parts.metrics[name], metric, rtol=1e-11, err_msg=name)
    assert any(np.abs(g).max() > 1e-3 for g in gradient.values())
    for path, found in summed.items():
        np.testing.assert_allclose(found, gradient[path], rtol=1e-9, atol=1e-12, err_msg=path)

    assert "baseline" not in whole.metrics  # `spread` has none
    found = {name: float(whole.metrics[name]) for name in ("spread", "match", "pairs match")}
    weights = {name: part.weight for name, part in whole.parts.items()}
    assert weights == {"spread": 0.5, "match": 2.0, "pairs match": 2.0}
    total = sum(weights[name] * value for name, value in found.items())
    np.testing.assert_allclose(whole.value, total, rtol=1e-11)


def test_rows_are_paired_on_eight_devices_as_on_one(built: Experiment) -> None:
    objective, batch = Matched(head="m"), batch_of(built)
    parameters = built.declaration.initialise(0, jnp.float64)

    def value(rows: Batch) -> Any:
        return objective(built.declaration.merge(parameters), rows, jax.random.key(1)).value

    mesh = make_mesh(MeshConfig())
    placed = jax.device_put(batch, batch_sharding(mesh, ROWS, "test"))
    with jax.set_mesh(mesh):
        spread = jax.jit(value)(placed)
    np.testing.assert_allclose(spread, loss(built, objective, 1)[0].value, rtol=1e-10)


def test_sums_are_of_the_whole_batch(built: Experiment) -> None:
    expected = -np.log(features(built)[0][VALID].var(axis=0)).sum()
    np.testing.assert_allclose(loss(built, Variance(head="v"), 4)[0].value, expected, rtol=1e-10)


def test_rows_are_paired_with_the_hardest_of_the_whole_batch(built: Experiment) -> None:
    a, b = features(built)
    keys = row_keys(batch_of(built), jax.random.key(1))
    total, terms = 0.0, 0
    for i in np.flatnonzero(VALID):
        wrong = [j for j in np.flatnonzero(VALID) if CONCEPTS[j] != CONCEPTS[i]]
        draw = np.asarray(jax.random.gumbel(keys[i], (ROWS,)))
        for k, bonus in enumerate((np.zeros(ROWS), draw)):
            hardest = wrong[int(np.argmax([a[i] @ b[j] + bonus[j] for j in wrong]))]
            weight = CONCEPTS[i] + 1
            total += weight * (k + 1) * ((a[i] - b[hardest]) ** 2).sum()
            terms += weight
    found = loss(built, Matched(head="m"), 4)[0]
    np.testing.assert_allclose(found.metrics["pairs"], total / terms, rtol=1e-9)
    parts = {name: (part.weight, float(part.count)) for name, part in found.parts.items()}
    assert parts == {"compared": (1.0, VALID.sum()), "pairs": (1.0, terms)}
    np.testing.assert_allclose(
        found.value, found.metrics["compared"] + found.metrics["pairs"], rtol=1e-12
    )
    assert found.metrics["baseline"] == np.log(VALID.sum()) + 2
