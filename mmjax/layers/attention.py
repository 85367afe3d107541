"""Multi-head attention."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct

from mmjax.errors import UserError
from mmjax.layers.attend import attend, check_kernel
from mmjax.layers.dense import LayerNorm, lecun
from mmjax.layers.masks import Pairs
from mmjax.parameters import Initializer, declare
from mmjax.sharding import constrain


@struct.dataclass
class KeyValues:
    """Keys and values of tokens, `[B, T, H, K]`: what attention needs of a token that was read before."""

    k_BTHK: jax.Array
    v_BTHK: jax.Array

    def put(self, other: KeyValues, at: jax.Array | int) -> KeyValues:
        """These, with those of `other` from slot `at` on."""

        def written(x: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(x, new, at, axis=1)

        return jax.tree.map(written, self, other)


class Attention(nnx.Module):
    """Multi-head attention over what the mask allows: `[B, S, D] -> [B, S, D]`.

    `softmax(q k^T / sqrt(D / heads)) v`, projections without biases. With `qk_norm`, queries and keys are
    normalised per head (Dehghani et al. 2023). `kernel` is one of `mmjax.layers.attend`. On a mesh with a
    `sequence` axis each device attends from its own tokens to those of all: only keys and values are gathered,
    so the result is exact.
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

    def __call__(
        self, x_BSD: jax.Array, pairs: Pairs, source_BTD: jax.Array | None = None
    ) -> jax.Array:
        """Each token of `x` reads the tokens of `source` (cross-attention), or of `x` itself where it is None."""
        return self.read(x_BSD, self.key_values(x_BSD if source_BTD is None else source_BTD), pairs)

    def key_values(self, x_BTD: jax.Array) -> KeyValues:
        """What of the tokens of `x` others read."""
        k_BTHK, v_BTHK = _project(x_BTD, self.key[...]), _project(x_BTD, self.value[...])
        return KeyValues(k_BTHK if self.key_norm is None else self.key_norm(k_BTHK), v_BTHK)

    def read(self, x_BSD: jax.Array, held: KeyValues, pairs: Pairs) -> jax.Array:
        """What the tokens of `x` read of those whose keys and values are `held`."""
        q_BSHK = _project(x_BSD, self.query[...])
        if self.query_norm is not None:
            q_BSHK = self.query_norm(q_BSHK)
        gathered = ("batch", None, "heads", None)
        k_BTHK, v_BTHK = constrain(held.k_BTHK, gathered), constrain(held.v_BTHK, gathered)
        y_BSHK = attend(q_BSHK, k_BTHK, v_BTHK, pairs, self.kernel)
        y_BSHK = constrain(y_BSHK, ("batch", "tokens", "heads", None))
        out_HKD = self.out[...]
        return y_BSHK.reshape(*y_BSHK.shape[:2], -1) @ out_HKD.reshape(-1, out_HKD.shape[-1])


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
