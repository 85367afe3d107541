"""Predict a moving average's vector of a tone from a part of its samples, as BYOL does from another view."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mmjax.core.batch import Batch
from mmjax.core.bounds import FRACTION, check
from mmjax.modalities.base import Input
from mmjax.model import Model
from mmjax.nn.dense import Dense
from mmjax.nn.stream import mean_pool
from mmjax.nn.towers import Widths
from mmjax.objectives.base import Loss, Objective, row_keys
from mmjax.objectives.contrastive import unit


@dataclass(frozen=True, kw_only=True)
class Steady(Objective):
    """The teacher is in the config: `model.teachers = {"average": {"of": ["stems/tone/.*", "trunk/.*"]}}`.

    Attributes:
      teacher: its name in `model.teachers`.
      hidden: the part of the samples that the student does not see.
    """

    teacher: str = "average"
    hidden: float = 0.5

    def __post_init__(self) -> None:
        check(self, hidden=FRACTION)

    def reads(self) -> tuple[str, ...]:
        return ("tone",)

    def teachers(self) -> tuple[str, ...]:
        """Return the teachers that the loss reads; one that is an average moves with this task's updates."""
        return (self.teacher,)

    def heads(self, widths: Widths, inputs: Mapping[str, Input]) -> dict[str, Any]:
        width = widths["tone"]
        return {"predictor": Dense(width, width, ("embed", None))}

    def __call__(self, model: Model, batch: Batch, key: jax.Array) -> Loss:
        """Return the mean of `2 - 2 cos`."""
        arrays = batch.inputs["tone"]
        shape = arrays["samples"].shape[1:]
        shown_BN = jax.vmap(lambda row: jax.random.bernoulli(row, 1 - self.hidden, shape))(
            row_keys(batch, key)
        )
        part = {**arrays, "samples": jnp.where(shown_BN, arrays["samples"], 0)}
        stream, aux = model.encode([model.tokens("tone", part)], key)
        guess_BD = unit(model.heads[self.head]["predictor"](mean_pool(stream)))
        teacher = model.teacher(self.teacher)  # has no gradient; its passes have no key
        whole, _ = teacher.encode([teacher.tokens("tone", arrays)], None)
        cost_B = 2 - 2 * (guess_BD * unit(mean_pool(whole))).sum(axis=-1)
        value = jnp.where(batch.valid, cost_B, 0).sum() / jnp.maximum(batch.valid.sum(), 1)
        return Loss(value).with_aux(aux)
