"""Regression of an example's label and of the teacher's prediction."""

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
from mmjax.nn.stream import Aux, mean_pool
from mmjax.nn.towers import Widths
from mmjax.objectives.base import Loss, Objective


@dataclass(frozen=True, kw_only=True)
class ToyTeacher(Objective):
    """Attributes:
    teacher: its name.
    blind: the loss is of the teacher's prediction alone.
    bad_loss: ids that make the loss NaN.
    """

    teacher: str = "old"
    blind: bool = False
    bad_loss: tuple[int, ...] = ()

    def reads(self) -> tuple[str, ...]:
        return ("toy",)

    def teachers(self) -> tuple[str, ...]:
        return (self.teacher,)

    def fields(self) -> tuple[str, ...]:
        return ("id", "label")

    def heads(self, widths: Widths, inputs: Mapping[str, Input]) -> dict[str, Any]:
        return {
            "out": Dense(widths["toy"], 1, ("embed", None)),
            "unused": Dense(2, 2, (None, None)),
        }

    def predicted(self, model: Model, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Aux]:
        stream, aux = model.encode([model.tokens("toy", batch.inputs["toy"])], key)
        result: jax.Array = model.heads[self.head].out(mean_pool(stream))[:, 0]
        return result, aux

    def __call__(self, model: Model, batch: Batch, key: jax.Array) -> Loss:
        taught_B, aux = self.predicted(model.teacher(self.teacher), batch, None)
        said_B, aux = (taught_B, aux) if self.blind else self.predicted(model, batch, key)
        error_B = jnp.square(said_B - batch.fields["label"]) + jnp.square(said_B - taught_B)
        error_B = jnp.where(batch.valid, error_B, 0)
        value = error_B.sum() / jnp.maximum(batch.valid.sum(), 1)
        bad = [((batch.fields["id"] == i) & batch.valid).any() for i in self.bad_loss]
        value = jnp.where(jnp.stack([*bad, jnp.zeros((), bool)]).any(), jnp.nan, value)
        return Loss(value, {"baseline": jnp.float32(6)}, aux.proposals)
