"""Agree with a moving average on another view, and spread over all directions (SimDINO, Wu et al. 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.core.batch import Batch
from mmjax.core.bounds import AMOUNT, COUNT, POSITIVE, check
from mmjax.modalities.base import Input
from mmjax.model import Model
from mmjax.nn.dense import Dense
from mmjax.nn.towers import Widths
from mmjax.objectives.base import Coupled, Loss, Part, Represented
from mmjax.objectives.byol import Views, pooled_views
from mmjax.objectives.contrastive import unit


class Projector(nnx.Module):
    """Three layers with GELU between them, then unit vectors in float32 or wider."""

    def __init__(self, width: int, hidden: int, out: int):
        self.first = Dense(width, hidden, ("embed", "mlp"))
        self.second = Dense(hidden, hidden, ("mlp", "embed"))
        self.last = Dense(hidden, out, ("embed", "joint"))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.last(jax.nn.gelu(self.second(jax.nn.gelu(self.first(x)))))
        return unit(y.astype(jnp.promote_types(y.dtype, jnp.float32)))


@dataclass(frozen=True, kw_only=True)
class Simdino(Views, Coupled):
    """`-c cos(teacher of one view, student of the other) - R`, R the coding rate of the batch (see `coding_rate`).

    R is of the mean of student and teacher, as in the published code; its rows are those of the whole batch, whatever
    devices and micro-batches. Its input has `instances: 2`, both global views. The teacher copies stem, trunk
    and projector, as that of `byol`.

    Attributes:
      hidden: units of the projector.
      embed_dim: size of a projection.
      align: c, the weight of agreement.
      eps: distortion of the coding rate.
    """

    hidden: int = 2048
    embed_dim: int = 256
    align: float = 1.0
    eps: float = 0.5

    def __post_init__(self) -> None:
        check(self, hidden=COUNT, embed_dim=COUNT, align=AMOUNT, eps=POSITIVE)

    def heads(self, widths: Widths, inputs: Mapping[str, Input]) -> dict[str, Any]:
        return {"projector": Projector(widths[self.modality], self.hidden, self.embed_dim)}

    def represent(self, model: Model, batch: Batch, key: jax.Array) -> Represented:
        arrays, teacher = batch.inputs[self.modality], model.teacher(self.teacher)
        x_BVD, aux = pooled_views(model, self.modality, arrays, key)
        seen_BVD, _ = pooled_views(teacher, self.modality, arrays, None)
        student_BVE = model.heads[self.head].projector(x_BVD)
        teacher_BVE = teacher.heads[self.head].projector(seen_BVD)
        return Represented((student_BVE, teacher_BVE), aux)

    def compare(self, model: Model, rows: Any, batch: Batch) -> Loss:
        student_BVE, teacher_BVE = rows
        valid_B = batch.valid
        count = jnp.maximum(valid_B.sum(), 1)
        cosine_B = (student_BVE * teacher_BVE[:, ::-1]).sum(axis=-1).mean(axis=1)
        cosine = jnp.where(valid_B, cosine_B, 0).sum() / count
        rate = coding_rate((student_BVE + teacher_BVE) / 2, valid_B, self.eps)
        dim = student_BVE.shape[-1]
        # The loss of a model that projects all pictures to one point.
        blind = -self.align - (dim + count) / (2 * dim * count) * jnp.log1p(dim / self.eps)
        metrics = {"cosine": cosine, "coding_rate": rate, "baseline": blind}
        value = -self.align * cosine - rate
        return Loss(value, metrics, parts={"": Part(1.0, valid_B.sum(), compares=True)})


def coding_rate(z_BVE: jax.Array, valid_B: jax.Array, eps: float) -> jax.Array:
    """Return `(p + m) / (p m)` times the mean over views of `1/2 log det(I + p / (m eps) Z^T Z)`.

    p is the size of a vector, m the number of valid rows of the whole batch.
    """
    dim, rows = z_BVE.shape[-1], jnp.maximum(valid_B.sum(), 1).astype(z_BVE.dtype)
    z_BVE = jnp.where(valid_B[:, None, None], z_BVE, 0)
    products_VEE = jnp.einsum("bve,bvf->vef", z_BVE, z_BVE)
    whole_VEE = jnp.eye(dim, dtype=z_BVE.dtype) + dim / (rows * eps) * products_VEE
    diagonal_VE = jnp.diagonal(jnp.linalg.cholesky(whole_VEE), axis1=1, axis2=2)
    return (dim + rows) / (dim * rows) * jnp.log(diagonal_VE).sum(axis=1).mean()
