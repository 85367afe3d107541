"""Dense layers and norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from mmjax.core.errors import UserError, nearest
from mmjax.core.parameters import Initializer, declare
from mmjax.core.sharding import whole_along

lecun = initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def matmul_of(
    function: Callable[..., jax.Array],
    gathered_dim: int | None,
    arguments: tuple[jax.Array, ...],
    kernel: jax.Array,
) -> jax.Array:
    """Return `function(*arguments) @ kernel`: `[..., n_in], [n_in, n_out] -> [..., n_out]`.

    The function's result is not saved: the backward pass recomputes it from `arguments`. A kernel whose `gathered_dim`
    lies on several devices is gathered before the product, and saved as it was. (By itself, the compiler gathers a
    reshaped kernel, such as attention's, once for each product.)

    The kernel's gradient is `x^T g` where x is the narrower of the two, and else the transpose of `g^T x`, which JAX's
    own always is. The left factor is laid out by columns, with all that is fused into it; on a CPU, where that is
    slow, JAX's way takes a fifth of a ViT's step.
    """
    return function(*arguments) @ _whole(kernel, gathered_dim)


def _whole(kernel: jax.Array, gathered_dim: int | None) -> jax.Array:
    return kernel if gathered_dim is None else whole_along(kernel, gathered_dim)


def _forward(
    function: Any, gathered_dim: int | None, arguments: Any, kernel: jax.Array
) -> tuple[jax.Array, Any]:
    return function(*arguments) @ _whole(kernel, gathered_dim), (arguments, kernel)


def _backward(
    function: Any, gathered_dim: int | None, residuals: Any, g: jax.Array
) -> tuple[Any, jax.Array]:
    inputs, kernel = residuals
    kernel = _whole(kernel, gathered_dim)
    x, back = jax.vjp(function, *inputs)
    rows = tuple(range(x.ndim - 1))
    over = ((rows, rows), ((), ()))
    to_given = back((g @ kernel.T).astype(x.dtype))
    if kernel.shape[0] <= kernel.shape[1]:
        return to_given, jax.lax.dot_general(x, g, over)
    return to_given, jax.lax.dot_general(g, x, over).T


matmul_of.defvjp(_forward, _backward)


def matmul(x: jax.Array, kernel: jax.Array, gathered_dim: int | None = None) -> jax.Array:
    """Return `x @ kernel`: `[..., n_in], [n_in, n_out] -> [..., n_out]`, as `matmul_of` does it."""
    return matmul_of(identity, gathered_dim, (x,), kernel)


def identity(x: jax.Array) -> jax.Array:
    return x


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
        return self.of(identity, x)

    def of(self, function: Callable[..., jax.Array], *arguments: jax.Array) -> jax.Array:
        """Return the layer's product with `function(*given)`, which is not kept for the backward pass."""
        y = matmul_of(function, None, arguments, self.kernel[...])
        return y if self.bias is None else y + self.bias[...]


# Only the input of a norm is saved; the backward pass recomputes the norm.
@partial(jax.checkpoint, prevent_cse=False, static_argnums=(3, 4))
def _normalised(
    x: jax.Array, scale: jax.Array, bias: jax.Array | None, eps: float, centre: bool
) -> jax.Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if centre:
        wide = wide - wide.mean(axis=-1, keepdims=True)
    y = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + eps) * scale
    return (y if bias is None else y + bias).astype(x.dtype)


class LayerNorm(nnx.Module):
    """`(x - mean) / sqrt(var + eps) * scale + bias` over the last axis, in float32 or wider."""

    def __init__(self, width: int, bias: bool = True, eps: float = 1e-6, scale: float = 1.0):
        self.scale = declare((width,), ("embed",), initializers.constant(scale), keep_dtype=True)
        self.bias = (
            declare((width,), ("embed",), initializers.zeros, keep_dtype=True) if bias else None
        )
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        bias = None if self.bias is None else self.bias[...]
        return _normalised(x, self.scale[...], bias, self.eps, True)


class RmsNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, in float32 or wider (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float = 1e-6):
        self.scale = declare((width,), ("embed",), initializers.ones, keep_dtype=True)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return _normalised(x, self.scale[...], None, self.eps, False)


NORMS = ("layer", "rms")


def norm_of(kind: str, width: int, bias: bool = True, eps: float = 1e-6) -> LayerNorm | RmsNorm:
    """Return the norm of that name; `bias` is a layer norm's.

    Raises:
      UserError: no such norm, or an eps that is not above 0.
    """
    if kind not in NORMS:
        raise UserError(f"Unknown norm '{kind}'.{nearest(kind, NORMS)}")
    if not eps > 0:
        raise UserError(f"eps of a norm is {eps}; it must be above 0.")
    return RmsNorm(width, eps) if kind == "rms" else LayerNorm(width, bias, eps)


_gelu = partial(jax.nn.gelu, approximate=True)
_gelu_exact = partial(jax.nn.gelu, approximate=False)


def _quick_gelu(x: jax.Array) -> jax.Array:
    """Return `x sigmoid(1.702 x)`, the GELU of OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


def _swish_times(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


def _gelu_times(gate: jax.Array, up: jax.Array) -> jax.Array:
    return _gelu(gate) * up


# Only the products of the hidden layer are saved, where JAX would save every step on the way to the next product.
class Mlp(nnx.Module):
    """`f(x W1) W2`, by default with f a GELU in its tanh form: `[..., width] -> [..., n_out or width]`."""

    def __init__(
        self,
        width: int,
        hidden: int,
        bias: bool = True,
        n_out: int | None = None,
        activation: Callable[[jax.Array], jax.Array] = _gelu,
    ):
        self.activation = activation
        self.up = Dense(width, hidden, ("embed", "mlp"), bias)
        self.down = Dense(hidden, n_out or width, ("mlp", "embed"), bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down.of(self.activation, self.up(x))


class GatedMlp(nnx.Module):
    """`(f(x G) * x W1) W2` (Shazeer 2020): `[..., width] -> [..., width]`."""

    def __init__(self, times: Callable[..., jax.Array], width: int, hidden: int, bias: bool = True):
        self.gate = Dense(width, hidden, ("embed", "mlp"), bias)
        self.up = Dense(width, hidden, ("embed", "mlp"), bias)
        self.down = Dense(hidden, width, ("mlp", "embed"), bias)
        self.times = times

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down.of(self.times, self.gate(x), self.up(x))


MLPS: Mapping[str, Callable[..., Mlp | GatedMlp]] = {
    "gelu": Mlp,
    "gelu_exact": partial(Mlp, activation=_gelu_exact),
    "quick_gelu": partial(Mlp, activation=_quick_gelu),
    "swiglu": partial(GatedMlp, _swish_times),
    "geglu": partial(GatedMlp, _gelu_times),
}


def mlp_of(kind: str, width: int, hidden: int, bias: bool) -> Mlp | GatedMlp:
    """Return the MLP of that name: `gelu` (tanh), `gelu_exact`, `quick_gelu`, or gated by a swish (`swiglu`) or a GELU
    (`geglu`).

    Raises:
      UserError: no such MLP.
    """
    if kind not in MLPS:
        raise UserError(f"Unknown MLP '{kind}'.{nearest(kind, MLPS)}")
    return MLPS[kind](width, hidden, bias)
