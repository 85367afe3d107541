"""Dense layers and norms."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from mmjax.errors import UserError, nearest
from mmjax.parameters import Initializer, declare

lecun = initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x @ kernel`: `[..., n_in], [n_in, n_out] -> [..., n_out]`.

    The kernel's gradient is `x^T g` where x is the narrower of the two, and else the transpose of `g^T x`, which JAX's
    own always is. What stands first is laid out by columns, with all that is fused into it; on a CPU, where that is
    slow, JAX's way takes a fifth of a ViT's step.
    """
    return x @ kernel


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ kernel, (x, kernel)


def _backward(held: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = held
    rows = tuple(range(x.ndim - 1))
    over = ((rows, rows), ((), ()))
    if kernel.shape[0] <= kernel.shape[1]:
        return g @ kernel.T, jax.lax.dot_general(x, g, over)
    return g @ kernel.T, jax.lax.dot_general(g, x, over).T


product.defvjp(_forward, _backward)


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
        y = product(x, self.kernel[...])
        return y if self.bias is None else y + self.bias[...]


@partial(jax.checkpoint, prevent_cse=False, static_argnums=(1, 2))
def _normalised(x: jax.Array, eps: float, centre: bool) -> jax.Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if centre:
        wide = wide - wide.mean(axis=-1, keepdims=True)
    return wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + eps)


class LayerNorm(nnx.Module):
    """`(x - mean) / sqrt(var + eps) * scale + bias` over the last axis, in float32 or wider."""

    def __init__(self, width: int, bias: bool = True, eps: float = 1e-6, scale: float = 1.0):
        self.scale = declare((width,), ("embed",), initializers.constant(scale), keep=True)
        self.bias = declare((width,), ("embed",), initializers.zeros, keep=True) if bias else None
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = _normalised(x, self.eps, True) * self.scale[...]
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


class RmsNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, in float32 or wider (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float = 1e-6):
        self.scale = declare((width,), ("embed",), initializers.ones, keep=True)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return (_normalised(x, self.eps, False) * self.scale[...]).astype(x.dtype)


NORMS = ("layer", "rms")


def norm_of(kind: str, width: int, bias: bool = True) -> LayerNorm | RmsNorm:
    """The norm of that name; `bias` is a layer norm's.

    Raises:
      UserError: no such norm.
    """
    if kind not in NORMS:
        raise UserError(f"There is no norm '{kind}'.{nearest(kind, NORMS)}")
    return RmsNorm(width) if kind == "rms" else LayerNorm(width, bias)


# What stands between the products of an MLP is computed again in the backward pass: of the hidden layer only what
# the products gave is kept, where JAX would keep every step on the way, several times as much.
_gelu = jax.checkpoint(partial(jax.nn.gelu, approximate=True), prevent_cse=False)


@partial(jax.checkpoint, prevent_cse=False)
def _swish_times(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


class Mlp(nnx.Module):
    """`gelu(x W1) W2`, GELU in its tanh form: `[..., width] -> [..., n_out or width]`."""

    def __init__(self, width: int, hidden: int, bias: bool = True, n_out: int | None = None):
        self.up = Dense(width, hidden, ("embed", "mlp"), bias)
        self.down = Dense(hidden, n_out or width, ("mlp", "embed"), bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(_gelu(self.up(x)))


class GatedMlp(nnx.Module):
    """`(silu(x G) * x W1) W2`, SwiGLU (Shazeer 2020): `[..., width] -> [..., width]`."""

    def __init__(self, width: int, hidden: int, bias: bool = True):
        self.gate = Dense(width, hidden, ("embed", "mlp"), bias)
        self.up = Dense(width, hidden, ("embed", "mlp"), bias)
        self.down = Dense(hidden, width, ("mlp", "embed"), bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(_swish_times(self.gate(x), self.up(x)))


MLPS = {"gelu": Mlp, "swiglu": GatedMlp}


def mlp_of(kind: str, width: int, hidden: int, bias: bool) -> Mlp | GatedMlp:
    """The MLP of that name.

    Raises:
      UserError: no such MLP.
    """
    if kind not in MLPS:
        raise UserError(f"There is no MLP '{kind}'.{nearest(kind, MLPS)}")
    return MLPS[kind](width, hidden, bias)
