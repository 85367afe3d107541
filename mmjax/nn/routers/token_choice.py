"""Tokens that choose their experts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mmjax.core.bounds import AMOUNT, COUNT, check
from mmjax.core.errors import UserError
from mmjax.nn.routers.base import Limited, Slots


@dataclass(frozen=True)
class TokenChoice(Limited):
    """Each token goes to the experts that score highest with it (Shazeer et al. 2017), if they have a slot left.

    First choices come before second ones; among these earlier tokens come first, or with `batch_priority` those whose
    best score is highest (batch priority routing, Riquelme et al. 2021). Ties go to the first expert.

    Attributes:
      top_k: experts of a token.
      batch_priority: sort tokens by their best score.
      noise: standard deviation of what training adds to the logits, as a multiple of 1 / experts (V-MoE: 1).
    """

    top_k: int = 1
    batch_priority: bool = False
    noise: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, top_k=COUNT, noise=AMOUNT)

    def slots(self, tokens: int, experts: int) -> int:
        return min(tokens, math.ceil(self.capacity * self.top_k * tokens / experts))

    def experts_per_token(self, experts: int) -> float:
        return min(self.top_k, experts)

    def route(self, logits_GTL: jax.Array, valid_GT: jax.Array) -> Slots:
        groups, tokens, experts = logits_GTL.shape
        if self.top_k > experts:
            raise UserError(f"router: top_k is {self.top_k}, of {experts} experts.")
        gate_GTK, expert_GTK = jax.lax.top_k(self.scores(logits_GTL), self.top_k)
        order_GT = jnp.broadcast_to(jnp.arange(tokens), (groups, tokens))
        if self.batch_priority:
            best_GT = jnp.where(valid_GT, gate_GTK[..., 0], -1)
            order_GT = jnp.argsort(-best_GT, axis=1, stable=True)
        count = self.slots(tokens, experts)
        # Choices in the order in which they are served: first ones of all tokens, then second ones.
        served = [
            jnp.take_along_axis(x, order_GT[..., None], axis=1).swapaxes(1, 2).reshape(groups, -1)
            for x in (gate_GTK, expert_GTK)
        ]
        gate_GM, expert_GM = served
        token_GM = jnp.tile(order_GT, (1, self.top_k))
        there_GM = jnp.take_along_axis(valid_GT, token_GM, axis=1)
        asks_GME = jax.nn.one_hot(expert_GM, experts, dtype=jnp.int32) * there_GM[..., None]
        before_GME = jnp.cumsum(asks_GME, axis=1) - asks_GME
        place_GM = jnp.take_along_axis(before_GME, expert_GM[..., None], axis=2)[..., 0]
        kept_GM = there_GM & (place_GM < count)
        # Dropped ones write to a slot beyond the last, which is cut off.
        slot_GM = jnp.where(kept_GM, expert_GM * count + place_GM, experts * count)
        return Slots(
            *(_scattered(x, slot_GM, experts, count) for x in (token_GM.astype(jnp.int32), gate_GM))
        )


def _scattered(x_GM: jax.Array, slot_GM: jax.Array, experts: int, count: int) -> jax.Array:
    """Scatter each value to its slot of `[G, E, C]`, zero in the others."""
    empty_GS = jnp.zeros((x_GM.shape[0], experts * count + 1), x_GM.dtype)
    filled_GS = jax.vmap(lambda row, slot, x: row.at[slot].set(x))(empty_GS, slot_GM, x_GM)
    return filled_GS[:, :-1].reshape(-1, experts, count)
