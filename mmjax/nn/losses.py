"""Losses of predicted tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def next_token_losses(logits_BLV: jax.Array, ids_BL: jax.Array) -> jax.Array:
    """Return `-log softmax(logits)[id]` of each token, `[B, L]`, in float32 or wider."""
    logs_BLV = jax.nn.log_softmax(wide(logits_BLV), axis=-1)
    return -jnp.take_along_axis(logs_BLV, ids_BL[..., None], axis=-1)[..., 0]


def wide(x: jax.Array) -> jax.Array:
    """Return `x` in float32, or as it is where it is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
