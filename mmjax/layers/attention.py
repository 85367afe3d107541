"""Multi-head attention."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.errors import UserError
from mmjax.layers.dense import LayerNorm, lecun
from mmjax.parameters import Initializer, declare
from mmjax.sharding import constrain


class Attention(nnx.Module):
    """Multi-head self-attention over the valid tokens: `[B, S, D] -> [B, S, D]`.

    `softmax(q k^T / sqrt(D / heads)) v`, projections without biases. With `qk_norm`, queries and keys are
    normalised per head (Dehghani et al. 2023). On a mesh with a `sequence` axis each device attends from its
    own tokens to those of all: only keys and values are gathered, so the result is exact.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool = False):
        if heads < 1 or width % heads:
            raise UserError(f"attention: width {width} does not divide over {heads} heads.")
        size = width // heads
        # Query, key and value stay apart so that each can be routed or frozen on its own.
        self.query = declare((width, heads, size), ("embed", "heads", None), _flat_init(1))
        self.key = declare((width, heads, size), ("embed", "heads", None), _flat_init(1))
        self.value = declare((width, heads, size), ("embed", "heads", None), _flat_init(1))
        self.out = declare((heads, size, width), ("heads", None, "embed"), _flat_init(2))
        self.query_norm = LayerNorm(size, bias=False) if qk_norm else None
        self.key_norm = LayerNorm(size, bias=False) if qk_norm else None

    def __call__(self, x_BSD: jax.Array, valid_BS: jax.Array | None) -> jax.Array:
        q_BSHK = _project(x_BSD, self.query[...])
        k_BSHK = _project(x_BSD, self.key[...])
        v_BSHK = _project(x_BSD, self.value[...])
        if self.query_norm is not None and self.key_norm is not None:
            q_BSHK, k_BSHK = self.query_norm(q_BSHK), self.key_norm(k_BSHK)
        gathered = ("batch", None, "heads", None)
        k_BSHK, v_BSHK = constrain(k_BSHK, gathered), constrain(v_BSHK, gathered)
        y_BSHK = _attend(q_BSHK, k_BSHK, v_BSHK, valid_BS)
        y_BSHK = constrain(y_BSHK, ("batch", "tokens", "heads", None))
        out_HKD = self.out[...]
        return y_BSHK.reshape(*y_BSHK.shape[:2], -1) @ out_HKD.reshape(-1, out_HKD.shape[-1])


def _attend(
    q_BSHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, valid_BT: jax.Array | None
) -> jax.Array:
    # Not jax.nn.dot_product_attention: its softmax is float32 for float64 inputs too, and meshes could
    # then not agree to 1e-10.
    wide = jnp.promote_types(q_BSHK.dtype, jnp.float32)
    logits_BHST = jnp.einsum("BSHK,BTHK->BHST", q_BSHK, k_BTHK, preferred_element_type=wide)
    logits_BHST = logits_BHST * q_BSHK.shape[-1] ** -0.5
    if valid_BT is not None:
        # Finite, so that a row without any valid token gives no NaN.
        least = jnp.finfo(wide).min
        logits_BHST = jnp.where(valid_BT[:, None, None, :], logits_BHST, least)
    weight_BHST = jax.nn.softmax(logits_BHST, axis=-1).astype(v_BTHK.dtype)
    return jnp.einsum("BHST,BTHK->BSHK", weight_BHST, v_BTHK)


def _project(x_BSD: jax.Array, kernel_DHK: jax.Array) -> jax.Array:
    # One plain matrix product: as an einsum with three output axes the CPU backend transposes first.
    d, h, k = kernel_DHK.shape
    y = x_BSD @ kernel_DHK.reshape(d, h * k)
    return constrain(y.reshape(*y.shape[:2], h, k), ("batch", "tokens", "heads", None))


def _flat_init(inputs: int) -> Initializer:
    """`lecun` with the fan-in of the matrix that the kernel is: its first `inputs` axes are inputs."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return lecun(key, (math.prod(shape[:inputs]), math.prod(shape[inputs:])), dtype).reshape(
            shape
        )

    return init
