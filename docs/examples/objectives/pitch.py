"""Regression of the pitch of a tone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mmjax.core.batch import Batch
from mmjax.core.bounds import COUNT, check
from mmjax.modalities.base import Input
from mmjax.model import Model
from mmjax.nn.dense import Dense
from mmjax.nn.stream import Aux, mean_pool
from mmjax.objectives.base import Embeds, Loss, Objective
from mmjax.objectives.contrastive import unit


@dataclass(frozen=True, kw_only=True)
class Pitch(Objective, Embeds):
    """The keys of the objective; the base `Embeds` lets `mmjax.load(...).embed(tone=...)` use it.

    Attributes:
      most: scale of the prediction, in semitones.
    """

    most: int = 4

    def __post_init__(self) -> None:
        check(self, most=COUNT)

    def reads(self) -> tuple[str, ...]:
        """Return the modalities that a task must give."""
        return ("tone",)

    def fields(self) -> tuple[str, ...]:
        """Return the integer fields of an example that the loss reads."""
        return ("pitch",)

    def heads(self, width: int, inputs: Mapping[str, Input]) -> dict[str, Any]:
        """Return the parameters of the objective itself; they become `model.heads[self.head]`."""
        return {"out": Dense(width, 1, ("embed", None))}

    def pooled(self, model: Model, arrays: Any, key: jax.Array) -> tuple[jax.Array, Aux]:
        stream, aux = model.encode([model.tokens("tone", arrays)], key)
        return mean_pool(stream), aux

    def __call__(self, model: Model, batch: Batch, key: jax.Array) -> Loss:
        """Return the mean over the valid rows; an unreadable example is a row that is not valid."""
        pooled_BD, aux = self.pooled(model, batch.inputs["tone"], key)
        guess_B = model.heads[self.head]["out"](pooled_BD)[:, 0] * self.most
        error_B = jnp.where(batch.valid, jnp.square(guess_B - batch.fields["pitch"]), 0)
        return Loss(
            error_B.sum() / jnp.maximum(batch.valid.sum(), 1) + aux.loss, proposals=aux.proposals
        )

    def embeds(self) -> tuple[str, ...]:
        return ("tone",)

    def embed(
        self, model: Model, modality: str, arrays: Mapping[str, jax.Array], relative_to: str = ""
    ) -> jax.Array:
        return unit(self.pooled(model, arrays, jax.random.key(0))[0])
