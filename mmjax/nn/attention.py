"""Multi-head attention."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.nn import initializers

from mmjax.core.errors import UserError
from mmjax.core.parameters import Initializer, declare
from mmjax.core.sharding import constrain
from mmjax.nn.attention_kernels import attend, check_kernel
from mmjax.nn.by_modality import (
    NO_MODALITIES,
    SHARED,
    PerModality,
    TokenModalities,
    apply_per_modality,
)
from mmjax.nn.dense import lecun, matmul, norm_of
from mmjax.nn.masks import Pairs
from mmjax.nn.positions import rotate


@struct.dataclass
class KeyValues:
    """Keys and values of tokens, `[B, T, H, K]`: what attention needs of a token that was read before."""

    k_BTHK: jax.Array
    v_BTHK: jax.Array

    def put(self, other: KeyValues, at: jax.Array | int) -> KeyValues:
        """Return these keys and values with those of `other` from slot `at` on."""

        def written(x: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(x, new, at, axis=1)

        return jax.tree.map(written, self, other)


class Attention(nnx.Module):
    """Multi-head attention over what the mask allows: `[B, S, D] -> [B, S, D]`.

    `softmax(q k^T / sqrt(D / heads)) v`; with `bias`, all four projections have biases (a ViT's). With `qk_norm`,
    queries and keys are normalised per head (Dehghani et al. 2023): where it is True by the norm `norm` without bias,
    else by the norm that it names, a layer norm with bias (Chameleon). `kernel` is one of `attention_kernels`. On a
    mesh with a `sequence` axis each device attends from its own tokens to those of all: only keys and values are
    gathered, so the result is exact. What `per_modality` names (`query`, `key`, `value`, `out`, `qk_norm`) has a copy
    per modality, its bias as well; tokens of all modalities still attend to each other. If `rotary` is not 0, queries
    and keys are rotated by the places of their tokens (see `rotate`), and it is the base.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        qk_norm: bool | str = False,
        kernel: str = "auto",
        per_modality: PerModality = SHARED,
        norm: str = "layer",
        rotary: float = 0.0,
        bias: bool = False,
        eps: float = 1e-6,
    ):
        if heads < 1 or width % heads:
            raise UserError(f"attention: width {width} does not divide over {heads} heads.")
        check_kernel(kernel)
        size = width // heads
        # Query, key and value stay apart so that each can be routed or frozen on its own.
        self.query, self.key, self.value = (
            per_modality(part, lambda: _inner(width, heads, size))
            for part in ("query", "key", "value")
        )
        self.out = per_modality("out", lambda: _outer(width, heads, size))
        self.query_bias, self.key_bias, self.value_bias, self.out_bias = (
            per_modality(part, lambda: _bias(width)) if bias else None
            for part in ("query", "key", "value", "out")
        )
        kind = norm if qk_norm is True else str(qk_norm)
        self.query_norm, self.key_norm = (
            per_modality("qk_norm", lambda: norm_of(kind, size, qk_norm is not True, eps))
            if qk_norm
            else None
            for _ in range(2)
        )
        if rotary < 0 or (rotary and size % 2):
            raise UserError(
                f"attention: rotary is {rotary}, heads have {size} numbers; a base above 0 needs an even number."
            )
        self.kernel, self.rotary = kernel, rotary

    def __call__(
        self,
        x_BSD: jax.Array,
        pairs: Pairs,
        source_BTD: jax.Array | None = None,
        token_modalities: TokenModalities = NO_MODALITIES,
        positions_BS: jax.Array | None = None,
    ) -> jax.Array:
        """Attend from each token of `x` to `source` (cross-attention), or to `x` itself if it is None.

        `token_modalities` and `positions` are those of the tokens of `x`; a source belongs to a part that has neither
        copies nor rotations.
        """
        read = x_BSD if source_BTD is None else source_BTD
        key_values = self.key_values(
            read, token_modalities if source_BTD is None else NO_MODALITIES, positions_BS
        )
        return self.read(x_BSD, key_values, pairs, token_modalities, positions_BS)

    def key_values(
        self,
        x_BTD: jax.Array,
        token_modalities: TokenModalities = NO_MODALITIES,
        positions_BT: jax.Array | None = None,
    ) -> KeyValues:
        """Return the keys and values of the tokens of `x`."""
        k_BTHK = _with_bias(
            apply_per_modality(self.key, x_BTD, token_modalities, _project),
            self.key_bias,
            token_modalities,
        )
        v_BTHK = _with_bias(
            apply_per_modality(self.value, x_BTD, token_modalities, _project),
            self.value_bias,
            token_modalities,
        )
        if self.key_norm is not None:
            k_BTHK = apply_per_modality(self.key_norm, k_BTHK, token_modalities)
        return KeyValues(self._rotated(k_BTHK, positions_BT), v_BTHK)

    def _rotated(self, x_BSHK: jax.Array, positions_BS: jax.Array | None) -> jax.Array:
        if not self.rotary:
            return x_BSHK
        if positions_BS is None:
            raise ValueError("rotary attention of tokens without positions")
        return rotate(x_BSHK, positions_BS, self.rotary)

    def read(
        self,
        x_BSD: jax.Array,
        key_values: KeyValues,
        pairs: Pairs,
        token_modalities: TokenModalities = NO_MODALITIES,
        positions_BS: jax.Array | None = None,
    ) -> jax.Array:
        """Return the attention of the tokens of `x` over `key_values`."""
        q_BSHK = _with_bias(
            apply_per_modality(self.query, x_BSD, token_modalities, _project),
            self.query_bias,
            token_modalities,
        )
        if self.query_norm is not None:
            q_BSHK = apply_per_modality(self.query_norm, q_BSHK, token_modalities)
        q_BSHK = self._rotated(q_BSHK, positions_BS)
        gathered = ("batch", None, "heads", None)
        k_BTHK, v_BTHK = (
            constrain(key_values.k_BTHK, gathered),
            constrain(key_values.v_BTHK, gathered),
        )
        y_BSHK = attend(q_BSHK, k_BTHK, v_BTHK, pairs, self.kernel)
        y_BSHK = constrain(y_BSHK, ("batch", "tokens", "heads", None))
        return _with_bias(
            apply_per_modality(self.out, y_BSHK, token_modalities, _join_heads),
            self.out_bias,
            token_modalities,
        )


def _inner(width: int, heads: int, size: int) -> nnx.Param:
    return declare((width, heads, size), ("embed", "heads", None), _flat_init(1))


def _outer(width: int, heads: int, size: int) -> nnx.Param:
    return declare((heads, size, width), ("heads", None, "embed"), _flat_init(2))


def _bias(width: int) -> nnx.Param:
    # A vector, whatever it is added to: no optimizer may take it for a matrix.
    return declare((width,), (None,), initializers.zeros)


def _with_bias(x: jax.Array, bias: Any, token_modalities: TokenModalities) -> jax.Array:
    return x if bias is None else apply_per_modality(bias, x, token_modalities, _add)


def _add(bias: nnx.Param, x: jax.Array) -> jax.Array:
    return x + bias[...].reshape(x.shape[2:])


def _project(kernel: nnx.Param, x_BSD: jax.Array) -> jax.Array:
    # One plain matrix product: as an einsum with three output axes the CPU backend transposes first.
    kernel_DHK = kernel[...]
    d, h, k = kernel_DHK.shape
    y = matmul(x_BSD, kernel_DHK.reshape(d, h * k), 0)
    return constrain(y.reshape(*y.shape[:2], h, k), ("batch", "tokens", "heads", None))


def _join_heads(kernel: nnx.Param, y_BSHK: jax.Array) -> jax.Array:
    out_HKD = kernel[...]
    out_ED = out_HKD.reshape(-1, out_HKD.shape[-1])
    return matmul(y_BSHK.reshape(*y_BSHK.shape[:2], -1), out_ED, 1)


def _flat_init(inputs: int) -> Initializer:
    """Return `lecun` with the fan-in of the matrix that the kernel is: its first `inputs` axes are inputs."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return lecun(key, (math.prod(shape[:inputs]), math.prod(shape[inputs:])), dtype).reshape(
            shape
        )

    return init
