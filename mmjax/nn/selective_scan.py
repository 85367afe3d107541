"""The selective state-space recurrence in chunks (Gu and Dao 2023, section 3).

`parallel` does a chunk's tokens at once, by an associative scan; `serial` one after the other, which is less work, and
faster where nothing runs side by side; `auto` is serial on CPUs. Both give the same.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mmjax.nn.attention_kernels import platform

CHUNK = 32  # tokens whose states are held at once
WAYS = ("auto", "parallel", "serial")

Pair = tuple[jax.Array, jax.Array]


@struct.dataclass
class Tokens:
    """The inputs of the recurrence, per token.

    Attributes:
      x_BSE: inputs.
      step_BSE: step sizes, at least 0; a token of step 0 leaves the state as it is.
      in_BSN, out_BSN: what a token writes to the state, and reads of it.
      begins_BS: tokens before which the state is zero, bool; None for only the first.
    """

    x_BSE: jax.Array
    step_BSE: jax.Array
    in_BSN: jax.Array
    out_BSN: jax.Array
    begins_BS: jax.Array | None = None


def selective_scan(
    a_EN: jax.Array, tokens: Tokens, chunk: int = CHUNK, way: str = "auto"
) -> jax.Array:
    """Return `h_s = exp(step_s a) h_(s-1) + step_s in_s x_s; y_s = out_s . h_s`: y, `[B, S, E]` in float32 or wider."""
    wide = jnp.promote_types(tokens.x_BSE.dtype, jnp.float32)
    start_BEN = jnp.zeros((tokens.x_BSE.shape[0], *a_EN.shape), wide)
    return scan_from(start_BEN, a_EN, tokens, chunk, way)[1]


def scan_from(
    start_BEN: jax.Array, a_EN: jax.Array, tokens: Tokens, chunk: int = CHUNK, way: str = "auto"
) -> tuple[jax.Array, jax.Array]:
    """Return the state after all tokens, and y, where the state before the first is `start`.

    A state is `[E, N]` for each row. Those of one chunk at a time are in memory, and recomputed in the backward
    pass, so that only inputs, outputs and one state per chunk grow with the length.
    """
    wide = jnp.promote_types(tokens.x_BSE.dtype, jnp.float32)
    tokens = jax.tree.map(lambda t: t if t.dtype == bool else t.astype(wide), tokens)
    b, s, e = tokens.x_BSE.shape
    chunk = min(chunk, s)
    count = -(-s // chunk)

    def split(t: jax.Array) -> jax.Array:
        # What is appended has step 0.
        t = jnp.pad(t, [(0, 0), (0, count * chunk - s), *[(0, 0)] * (t.ndim - 2)])
        return jnp.moveaxis(t.reshape(b, count, chunk, *t.shape[2:]), 1, 0)

    if way not in WAYS:
        raise ValueError(f"selective_scan: way is '{way}', not one of {WAYS}")
    is_serial = way == "serial" or way == "auto" and platform() == "cpu"

    def body(state_BEN: jax.Array, tokens: Tokens) -> Pair:
        return (_serial if is_serial else _chunk)(a_EN.astype(wide), state_BEN, tokens)

    chunks = jax.tree.map(split, tokens)
    last_BEN, y_CBLE = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), start_BEN, chunks)
    return last_BEN, jnp.moveaxis(y_CBLE, 0, 1).reshape(b, count * chunk, e)[:, :s]


def _chunk(a_EN: jax.Array, state_BEN: jax.Array, tokens: Tokens) -> Pair:
    """Return the state after a chunk, and the outputs within."""
    keep_BLEN = jnp.exp(tokens.step_BSE[..., None] * a_EN)
    if tokens.begins_BS is not None:
        keep_BLEN = jnp.where(tokens.begins_BS[..., None, None], 0, keep_BLEN)
    add_BLEN = (tokens.step_BSE * tokens.x_BSE)[..., None] * tokens.in_BSN[:, :, None]
    decay, added = jax.lax.associative_scan(_after, (keep_BLEN, add_BLEN), axis=1)
    state_BLEN = decay * state_BEN[:, None] + added
    return state_BLEN[:, -1], (state_BLEN * tokens.out_BSN[:, :, None]).sum(axis=-1)


def _serial(a_EN: jax.Array, state_BEN: jax.Array, tokens: Tokens) -> Pair:
    """Return the result of `_chunk`, computed token by token."""

    def body(h_BEN: jax.Array, token: Tokens) -> Pair:
        keep_BEN = jnp.exp(token.step_BSE[..., None] * a_EN)
        if token.begins_BS is not None:
            keep_BEN = jnp.where(token.begins_BS[..., None, None], 0, keep_BEN)
        add_BEN = (token.step_BSE * token.x_BSE)[..., None] * token.in_BSN[:, None]
        h_BEN = keep_BEN * h_BEN + add_BEN
        return h_BEN, (h_BEN * token.out_BSN[:, None]).sum(axis=-1)

    by_token = jax.tree.map(lambda t: jnp.moveaxis(t, 1, 0), tokens)
    state_BEN, y_LBE = jax.lax.scan(body, state_BEN, by_token)
    return state_BEN, jnp.moveaxis(y_LBE, 0, 1)


def _after(one: Any, two: Any) -> Pair:
    """Compose `h -> keep h + add` twice."""
    return two[0] * one[0], two[0] * one[1] + two[1]
