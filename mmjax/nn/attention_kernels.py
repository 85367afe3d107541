"""Softmax attention under any mask: one interface, several kernels.

`plain` holds the logits of all pairs; `chunked` those of a few queries at a time, and makes them again in the backward
pass, so that memory grows with the length and not with its square; `splash` is a TPU kernel that skips what a mask
forbids, `cudnn` a GPU kernel. `auto` chooses by the platform that is compiled for and by the size. A kernel that cannot
express a mask gives way to one that can, which is logged once.

A query without any allowed key gets zeros, and no gradient flows through it. The rows of queries that are not valid
hold no promise.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mmjax.core.errors import UserError, nearest
from mmjax.nn import kernels
from mmjax.nn.masks import Pairs, check

CHUNK = 256  # queries at a time
_LARGE = 1024**2  # pairs of tokens above which their logits are not all held at once

_logged: set[str] = set()
_alone: contextvars.ContextVar[bool] = contextvars.ContextVar("alone", default=False)


def attend(
    q_BSHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    pairs: Pairs | None = None,
    kernel: str = "auto",
) -> jax.Array:
    """Return `softmax(q k^T / sqrt(K)) v` over the allowed keys: `[B, S, H, K]`; softmax in float32 or wider.

    Args:
      kernel: `plain`, `chunked`, `splash`, `cudnn`, or `auto`.

    Raises:
      UserError: a mask that reads an attribute which the tokens lack.
    """
    pairs = pairs or Pairs()
    check(pairs.mask, pairs.queries or {}, pairs.keys or {})
    chosen = choose(kernel, platform(), q_BSHK, k_BTHK, pairs)
    return KERNELS[chosen](q_BSHK, k_BTHK, v_BTHK, pairs)


def check_kernel(kernel: str) -> None:
    """Raise a `UserError` for a name that is no kernel's."""
    names = ["auto", *KERNELS]
    if kernel not in names:
        raise UserError(f"Unknown attention kernel '{kernel}'.{nearest(kernel, names)}")


def choose(kernel: str, on: str, q_BSHK: jax.Array, k_BTHK: jax.Array, pairs: Pairs) -> str:
    """Return the kernel that does it: the one asked for, or its substitute, which is logged once."""
    is_large = q_BSHK.shape[1] * k_BTHK.shape[1] > _LARGE
    xla = "chunked" if is_large else "plain"
    if _alone.get():
        return xla
    native = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(on)
    chosen = (native if native and is_large else xla) if kernel == "auto" else kernel
    why = kernels.REFUSALS[chosen](on, q_BSHK, pairs) if chosen in kernels.REFUSALS else ""
    if why:
        say_once(f"attention kernel '{chosen}' gives way to '{xla}': {why}.")
        return xla
    return chosen


def say_once(text: str) -> None:
    """Log a message once per process."""
    if text not in _logged:
        _logged.add(text)
        logging.getLogger(__name__).warning("%s", text)


@contextlib.contextmanager
def xla_alone() -> Iterator[None]:
    """Allow no kernel of a platform within the block, so that a count of operations sees all of them."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def platform() -> str:
    """Return the platform that is compiled for: the platform of the mesh in force, which need not be this machine's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else str(device.platform)


# --- XLA ---------------------------------------------------------------------------------------


def _plain(q_BSHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, pairs: Pairs) -> jax.Array:
    return _rows(q_BSHK, k_BTHK, v_BTHK, pairs.allowed())


def _rows(q_BSHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, allowed: Any) -> jax.Array:
    # Not jax.nn.dot_product_attention: its softmax is float32 for float64 inputs too, and meshes could
    # then not agree to 1e-10.
    wide = jnp.promote_types(q_BSHK.dtype, jnp.float32)
    logits_BHST = jnp.einsum("BSHK,BTHK->BHST", q_BSHK, k_BTHK, preferred_element_type=wide)
    logits_BHST = logits_BHST * q_BSHK.shape[-1] ** -0.5
    if allowed is not None:
        # Finite, so that a query without any allowed key gives no NaN.
        logits_BHST = jnp.where(allowed[:, None], logits_BHST, jnp.finfo(wide).min)
    weight_BHST = _weights(logits_BHST, v_BTHK.dtype)
    y_BSHK = jnp.einsum("BHST,BTHK->BSHK", weight_BHST, v_BTHK)
    return kernels.zero_without_key(y_BSHK, allowed)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _weights(logits: jax.Array, dtype: Any) -> jax.Array:
    """Return the softmax over the last axis, cast to `dtype`; kept for the backward pass as that alone.

    JAX would keep it in the logits' dtype as well: with bfloat16, three times as much, most of what a layer keeps.
    """
    return jax.nn.softmax(logits, axis=-1).astype(dtype)


def _weights_forward(logits: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    weights = _weights(logits, dtype)
    return weights, weights


def _weights_backward(dtype: Any, weights: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    wide = jnp.promote_types(dtype, jnp.float32)
    weights, g = weights.astype(wide), g.astype(wide)
    return (weights * (g - (weights * g).sum(axis=-1, keepdims=True)),)


_weights.defvjp(_weights_forward, _weights_backward)


def _chunked(q_BSHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, pairs: Pairs) -> jax.Array:
    """Scan over chunks of queries; a chunk holds as many of each part of a sharded sequence."""
    length = q_BSHK.shape[1]
    chunks, parts = _chunks(length, jax.sharding.get_abstract_mesh().shape.get("sequence", 1))
    attributes = pairs.queries or {}
    read = {name: jnp.asarray(attributes[name]) for name in pairs.mask.reads()}

    def body(_: None, chunk: tuple[jax.Array, Any]) -> tuple[None, jax.Array]:
        q_BSHK, attributes = chunk
        return None, _rows(q_BSHK, k_BTHK, v_BTHK, pairs.allowed(attributes))

    split = jax.tree.map(lambda x: _split(x, chunks, parts), (q_BSHK, read))
    _, y_NBSHK = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), None, split)
    return _join(y_NBSHK, length, parts)


def _chunks(length: int, shards: int) -> tuple[int, int]:
    """Return the number of chunks, and of the parts of the sequence each takes from: one per shard if that divides."""
    per_shard, remainder = divmod(length, shards)
    least = -(-per_shard // CHUNK)
    even = [n for n in range(least, 2 * least + 1) if per_shard % n == 0]
    return (even[0], shards) if even and not remainder else (-(-length // CHUNK), 1)


def _split(x: jax.Array, chunks: int, parts: int) -> jax.Array:
    """Reshape `[B, S, ...] -> [chunks, B, S' / chunks, ...]`, S padded to S'; each chunk has tokens of every part."""
    b, s, *trailing = x.shape
    size = -(-s // (chunks * parts))
    x = jnp.pad(x, [(0, 0), (0, chunks * parts * size - s), *[(0, 0)] * len(trailing)])
    x = jnp.moveaxis(x.reshape(b, parts, chunks, size, *trailing), 2, 0)
    return x.reshape(chunks, b, parts * size, *trailing)


def _join(x: jax.Array, length: int, parts: int) -> jax.Array:
    """Return the inverse of `_split`."""
    chunks, b, s, *trailing = x.shape
    x = jnp.moveaxis(x.reshape(chunks, b, parts, s // parts, *trailing), 0, 2)
    return x.reshape(b, chunks * s, *trailing)[:, :length]


KERNELS = {
    "plain": _plain,
    "chunked": _chunked,
    "splash": kernels.splash,
    "cudnn": kernels.cudnn,
}
