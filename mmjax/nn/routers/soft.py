"""Soft mixtures: slots that hold a mean of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct

from mmjax.core.bounds import COUNT, check
from mmjax.nn.routers.base import Dispatch, Router, widened


@struct.dataclass
class Mixture(Dispatch):
    """Slots that hold a mean of all tokens, and tokens that are one of all slots.

    Attributes:
      dispatch_GTEC: weight of each token in each slot.
      combine_GTEC: weight of each slot's output in each token.
    """

    dispatch_GTEC: jax.Array
    combine_GTEC: jax.Array

    def gather(self, x_GTD: jax.Array) -> jax.Array:
        return jnp.einsum("gtec,gtd->gecd", self.dispatch_GTEC.astype(x_GTD.dtype), x_GTD)

    def combine(self, y_GECD: jax.Array, tokens: int) -> jax.Array:
        del tokens
        return jnp.einsum("gtec,gecd->gtd", self.combine_GTEC.astype(y_GECD.dtype), y_GECD)

    def parts(self, tokens: int) -> jax.Array:
        del tokens
        return self.combine_GTEC.sum(axis=-1)


@dataclass(frozen=True)
class Soft(Router):
    """Soft mixtures (Puigcerver et al. 2023): each slot is a mean of tokens, each token's sum a mean of slots.

    Logits of token and slot are exponentiated and normalised over the valid tokens of the group for what a slot gets,
    over all slots for what a token gets. Nothing is dropped.

    Attributes:
      slots_per_expert: slots of each expert (IMP's configuration: 32).
      normalise: tokens and slots' vectors are made unit vectors, times a learned scale (section 2.3 there).
    """

    has_losses = False
    slots_per_expert: int = 32
    normalise: bool = True

    def __post_init__(self) -> None:
        check(self, slots_per_expert=COUNT)

    def slots(self, tokens: int, experts: int) -> int:
        del tokens, experts
        return self.slots_per_expert

    def experts_per_token(self, experts: int) -> float:
        return experts

    def route(self, logits_GTL: jax.Array, valid_GT: jax.Array) -> Mixture:
        # Two softmaxes read the logits: without the barrier the TPU's compiler makes the product once for each.
        wide_GTL = jax.lax.optimization_barrier(widened(logits_GTL))
        there_GT1 = valid_GT[..., None]
        # Finite: a group without any token must give zeros, not NaN, also backwards.
        masked_GTL = jnp.where(there_GT1, wide_GTL, jnp.finfo(wide_GTL.dtype).min)
        weights = jax.nn.softmax(masked_GTL, axis=1), jax.nn.softmax(wide_GTL, axis=2)
        shape = (*wide_GTL.shape[:2], -1, self.slots_per_expert)
        return Mixture(*(jnp.where(there_GT1, w, 0).reshape(shape) for w in weights))
