"""Regression of an example's label, which turns non-finite where a test wants it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mmjax.core.batch import Batch
from mmjax.modalities.base import Input
from mmjax.model import Model
from mmjax.nn.dense import Dense
from mmjax.nn.stream import mean_pool
from mmjax.objectives.base import Loss, Objective


@dataclass(frozen=True, kw_only=True)
class Toy(Objective):
    """Attributes:
    hidden: probability that a number is hidden by the visit's key.
    bad_loss: ids that make the loss NaN.
    bad_gradient: ids that make the gradient infinite and leave the loss as it is.
    climbs: go up the slope of the loss, which soon has no bound.
    """

    hidden: float = 0.2
    bad_loss: tuple[int, ...] = ()
    bad_gradient: tuple[int, ...] = ()
    climbs: bool = False

    def reads(self) -> tuple[str, ...]:
        return ("toy",)

    def fields(self) -> tuple[str, ...]:
        return ("id", "label")

    def heads(self, width: int, inputs: Mapping[str, Input]) -> dict[str, Any]:
        return {"out": Dense(width, 1, ("embed", None))}

    def __call__(self, model: Model, batch: Batch, key: jax.Array) -> Loss:
        rows = batch.inputs["toy"]["rows"]
        seen = jax.random.bernoulli(key, 1 - self.hidden, rows.shape)
        stream, aux = model.encode([model.tokens("toy", {"rows": rows * seen})], key)
        predicted_B = model.heads[self.head].out(mean_pool(stream))[:, 0]
        valid_B = batch.valid
        error_B = jnp.square(predicted_B - batch.fields["label"])
        value = jnp.where(valid_B, error_B, 0).sum() / jnp.maximum(valid_B.sum(), 1)
        value = 2 * jax.lax.stop_gradient(value) - value if self.climbs else value
        value = jnp.where(self._holds(batch, self.bad_loss), jnp.nan, value)
        # The square root has value 0 and an infinite slope at 0.
        bad = self._holds(batch, self.bad_gradient)
        edge = jnp.sqrt(jnp.where(bad, 0 * predicted_B.sum(), 1.0))
        value = value + edge - jax.lax.stop_gradient(edge)
        baseline = jnp.float32(6)  # mean of the squared labels
        return Loss(value + aux.loss, {"baseline": baseline})  # without proposals of buffers

    def _holds(self, batch: Batch, ids: tuple[int, ...]) -> jax.Array:
        held = [((batch.fields["id"] == i) & batch.valid).any() for i in ids]
        return jnp.stack([*held, jnp.zeros((), bool)]).any()
