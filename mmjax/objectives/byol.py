"""Predict a moving average's projection of another view of the same picture (BYOL, Grill et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.core.batch import Batch
from mmjax.core.bounds import COUNT, check
from mmjax.core.errors import UserError
from mmjax.modalities.base import PRESENT, Input
from mmjax.model import Model
from mmjax.nn.dense import Dense, LayerNorm
from mmjax.nn.stream import Aux, mean_pool
from mmjax.nn.towers import Widths
from mmjax.objectives.base import Embeds, Loss, Objective
from mmjax.objectives.contrastive import unit

VIEWS = 2


class Projector(nnx.Module):
    """Linear, layer norm, ReLU, linear.

    Published with batch norm; a layer norm keeps the value of a row whatever micro-batch it is in.
    """

    def __init__(self, width: int, hidden: int, out: int):
        self.up = Dense(width, hidden, ("embed", "mlp"))
        self.norm = LayerNorm(hidden)
        self.down = Dense(hidden, out, ("mlp", "joint"))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.relu(self.norm(self.up(x))))


@dataclass(frozen=True, kw_only=True)
class Views(Objective, Embeds):
    """An objective of two views of a modality, `instances: 2` of its input, and a teacher.

    Attributes:
      modality: that of the views.
      teacher: its name in `model.teachers`.
    """

    modality: str = "image"
    teacher: str = "target"

    def reads(self) -> tuple[str, ...]:
        return (self.modality,)

    def teachers(self) -> tuple[str, ...]:
        return (self.teacher,)

    def check_inputs(self, inputs: Mapping[str, Input]) -> None:
        check_views(self, inputs[self.modality])

    def embeds(self) -> tuple[str, ...]:
        return (self.modality,)

    def embed(
        self, model: Model, modality: str, arrays: Mapping[str, jax.Array], relative_to: str = ""
    ) -> jax.Array:
        """Return unit vectors of the pooled trunk, without the projector."""
        return unit(pooled_views(model, modality, arrays, None)[0][:, 0])


@dataclass(frozen=True, kw_only=True)
class Byol(Views):
    """The mean over both directions of `2 - 2 cos` between a prediction and the teacher's projection of the other view.

    Its input has `instances: 2`, the two views. The teacher copies stem, trunk and projector:
    `model.teachers.NAME.of = ["stems/image/.*", "trunk/.*", "heads/TASK/projector/.*"]`.

    Attributes:
      hidden: units of projector and predictor.
      embed_dim: size of a projection.
    """

    hidden: int = 4096
    embed_dim: int = 256

    def __post_init__(self) -> None:
        check(self, hidden=COUNT, embed_dim=COUNT)

    def heads(self, widths: Widths, inputs: Mapping[str, Input]) -> dict[str, Any]:
        return {
            "projector": Projector(widths[self.modality], self.hidden, self.embed_dim),
            "predictor": Projector(self.embed_dim, self.hidden, self.embed_dim),
        }

    def __call__(self, model: Model, batch: Batch, key: jax.Array) -> Loss:
        arrays, teacher = batch.inputs[self.modality], model.teacher(self.teacher)
        x_BVD, aux = pooled_views(model, self.modality, arrays, key)
        head = model.heads[self.head]
        predicted_BVE = unit(_precise(head.predictor(head.projector(x_BVD))))
        seen_BVD, _ = pooled_views(teacher, self.modality, arrays, None)
        target_BVE = unit(_precise(teacher.heads[self.head].projector(seen_BVD)))
        cosine_BV = (predicted_BVE * target_BVE[:, ::-1]).sum(axis=-1)
        cost_B = jnp.where(batch.valid, (2 - 2 * cosine_BV).mean(axis=1), 0)
        value = cost_B.sum() / jnp.maximum(batch.valid.sum(), 1)
        return Loss(value, {"baseline": jnp.float32(2)}).with_aux(aux)  # of orthogonal vectors


def _precise(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def check_views(objective: Objective, input_: Input) -> None:
    """Raise `UserError` unless an input has two views."""
    if input_.instances != VIEWS:
        raise UserError(
            f"objective {type(objective).__name__} compares two views of '{input_.name}', and its input has "
            f"{input_.instances or 1}. Set instances to {VIEWS}."
        )


def pooled_views(
    model: Model, modality: str, arrays: Mapping[str, jax.Array], key: jax.Array | None
) -> tuple[jax.Array, Aux]:
    """Return the mean over the tokens of each view, `[B, V, D]`; evaluation has one view."""
    stream, aux = model.encode([model.tokens(modality, arrays)], key)
    views = arrays[PRESENT].shape[1] if PRESENT in arrays else 1
    x_ND = mean_pool(stream)
    return x_ND.reshape(-1, views, x_ND.shape[-1]), aux
