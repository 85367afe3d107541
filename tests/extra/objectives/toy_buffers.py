"""Regression of an example's label beside a running mean of the labels, a buffer of the head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.core.batch import Batch
from mmjax.core.parameters import declare_buffer
from mmjax.modalities.base import Input
from mmjax.model import Model
from mmjax.nn.dense import Dense
from mmjax.nn.stream import add_proposals, mean_pool
from mmjax.nn.towers import Widths
from mmjax.objectives.base import Loss, Objective


def running(old: jax.Array, statistics: dict[str, jax.Array], key: jax.Array) -> jax.Array:
    """Return 0.75 of the old mean and 0.25 of the new."""
    del key
    return 0.75 * old + 0.25 * statistics["sum"] / jnp.maximum(statistics["count"], 1)


def last_rows(old: jax.Array, statistics: dict[str, jax.Array], key: jax.Array) -> jax.Array:
    """Return the labels of the first rows of the batch."""
    del key
    return statistics["label"][: old.shape[0]]


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.zeros(shape, dtype)


class Labels(nnx.Module):
    def __init__(self) -> None:
        self.mean = declare_buffer((), (), zeros, running, {"sum": ((), ()), "count": ((), ())})
        self.rows = declare_buffer(
            (3,), (None,), zeros, last_rows, {"label": ((), ())}, replace=True
        )


@dataclass(frozen=True, kw_only=True)
class ToyBuffers(Objective):
    """Attributes:
    bad_loss: ids that make the loss NaN.
    unknown: a buffer that it proposes to, though no module declares it.
    rows: how often it proposes the rows of the batch.
    """

    bad_loss: tuple[int, ...] = ()
    unknown: str = ""
    rows: int = 0

    def reads(self) -> tuple[str, ...]:
        return ("toy",)

    def fields(self) -> tuple[str, ...]:
        return ("id", "label")

    def heads(self, widths: Widths, inputs: Mapping[str, Input]) -> dict[str, Any]:
        return {"out": Dense(widths["toy"], 1, ("embed", None)), "labels": Labels()}

    def __call__(self, model: Model, batch: Batch, key: jax.Array) -> Loss:
        stream, aux = model.encode([model.tokens("toy", batch.inputs["toy"])], key)
        head, valid_B = model.heads[self.head], batch.valid
        label_B = batch.fields["label"].astype(stream.x_BSD.dtype)
        predicted_B = head.out(mean_pool(stream))[:, 0] + head.labels.mean[...]
        error_B = jnp.where(valid_B, jnp.square(predicted_B - label_B), 0)
        value = error_B.sum() / jnp.maximum(valid_B.sum(), 1)
        bad = [((batch.fields["id"] == i) & valid_B).any() for i in self.bad_loss]
        value = jnp.where(jnp.stack([*bad, jnp.zeros((), bool)]).any(), jnp.nan, value)
        sums = {"sum": jnp.where(valid_B, label_B, 0).sum(), "count": valid_B.sum()}
        each = [aux.proposals, head.labels.mean.propose(sums)]
        each += [head.labels.rows.propose({"label": label_B})] * self.rows
        each += [{self.unknown: sums}] if self.unknown else []
        return Loss(value + aux.loss, {"baseline": jnp.float32(6)}, add_proposals(each))
