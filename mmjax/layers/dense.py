"""Dense layers and norms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from mmjax.parameters import Initializer, declare

lecun = initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


class Dense(nnx.Module):
    """`y = x W + b` over the last axis: `[..., n_in] -> [..., n_out]`."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        axes: tuple[str | None, str | None],
        bias: bool = True,
        init: Initializer = lecun,
    ):
        self.kernel = declare((n_in, n_out), axes, init)
        self.bias = declare((n_out,), axes[1:], initializers.zeros) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...]
        return y if self.bias is None else y + self.bias[...]


class LayerNorm(nnx.Module):
    """`(x - mean) / sqrt(var + eps) * scale + bias` over the last axis, in float32 or wider."""

    def __init__(self, width: int, bias: bool = True, eps: float = 1e-6, scale: float = 1.0):
        self.scale = declare((width,), ("embed",), initializers.constant(scale), keep=True)
        self.bias = declare((width,), ("embed",), initializers.zeros, keep=True) if bias else None
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = wide - wide.mean(axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + self.eps)
        y = y * self.scale[...]
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


class Mlp(nnx.Module):
    """`gelu(x W1) W2`, GELU in its tanh form: `[..., width] -> [..., n_out or width]`."""

    def __init__(self, width: int, hidden: int, bias: bool = True, n_out: int | None = None):
        self.up = Dense(width, hidden, ("embed", "mlp"), bias)
        self.down = Dense(hidden, n_out or width, ("mlp", "embed"), bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x), approximate=True))
