"""Multi-head attention."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.errors import UserError
from mmjax.layers.attend import attend, check_kernel
from mmjax.layers.dense import LayerNorm, lecun
from mmjax.layers.masks import Pairs
from mmjax.parameters import Initializer, declare
from mmjax.sharding import constrain


class Attention(nnx.Module):
    """Multi-head self-attention over what the mask allows: `[B, S, D] -> [B, S, D]`.

    `softmax(q k^T / sqrt(D / heads)) v`, projections without biases. With `qk_norm`, queries and keys are
    normalised per head (Dehghani et al. 2023). `kernel` is one of `mmjax.layers.attend`.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool = False, kernel: str = "auto"):
        if heads < 1 or width % heads:
            raise UserError(f"attention: width {width} does not divide over {heads} heads.")
        check_kernel(kernel)
        size = width // heads
        # Query, key and value stay apart so that each can be routed or frozen on its own.
        self.query = declare((width, heads, size), ("embed", "heads", None), _flat_init(1))
        self.key = declare((width, heads, size), ("embed", "heads", None), _flat_init(1))
        self.value = declare((width, heads, size), ("embed", "heads", None), _flat_init(1))
        self.out = declare((heads, size, width), ("heads", None, "embed"), _flat_init(2))
        self.query_norm = LayerNorm(size, bias=False) if qk_norm else None
        self.key_norm = LayerNorm(size, bias=False) if qk_norm else None
        self.kernel = kernel

    def __call__(self, x_BSD: jax.Array, pairs: Pairs) -> jax.Array:
        q_BSHK = _project(x_BSD, self.query[...])
        k_BSHK = _project(x_BSD, self.key[...])
        v_BSHK = _project(x_BSD, self.value[...])
        if self.query_norm is not None and self.key_norm is not None:
            q_BSHK, k_BSHK = self.query_norm(q_BSHK), self.key_norm(k_BSHK)
        y_BSHK = attend(q_BSHK, k_BSHK, v_BSHK, pairs, self.kernel)
        y_BSHK = constrain(y_BSHK, ("batch", None, "heads", None))
        out_HKD = self.out[...]
        return y_BSHK.reshape(*y_BSHK.shape[:2], -1) @ out_HKD.reshape(-1, out_HKD.shape[-1])


def _project(x_BSD: jax.Array, kernel_DHK: jax.Array) -> jax.Array:
    # One plain matrix product: as an einsum with three output axes the CPU backend transposes first.
    d, h, k = kernel_DHK.shape
    y = x_BSD @ kernel_DHK.reshape(d, h * k)
    return constrain(y.reshape(*y.shape[:2], h, k), ("batch", None, "heads", None))


def _flat_init(inputs: int) -> Initializer:
    """`lecun` with the fan-in of the matrix that the kernel is: its first `inputs` axes are inputs."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return lecun(key, (math.prod(shape[:inputs]), math.prod(shape[inputs:])), dtype).reshape(
            shape
        )

    return init
