"""The selective state-space block (Mamba, Gu and Dao 2023), its projections shared or by modality."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from mmjax.errors import UserError
from mmjax.layers.by_modality import Modalities, apply, kinds, untied
from mmjax.layers.dense import Dense, LayerNorm
from mmjax.layers.masks import Causal, Mask, Or, Same, factors
from mmjax.layers.selective_scan import Tokens, selective_scan
from mmjax.layers.stream import Aux, Stream, no_aux
from mmjax.parameters import declare
from mmjax.sharding import constrain

PARTS = ("norm", "in", "conv", "x", "dt", "out")
ITEM = "item"  # the attribute that tells packed items apart


class Mamba(nnx.Module):
    """`x += mixer(norm(x))`: a recurrence over the tokens, causal by nature.

        u, z = in(x);  u = silu(conv(u));  step, b, c = x(u);  step = softplus(dt(step))
        h_s = exp(step_s A) h_(s-1) + step_s b_s u_s;  y_s = c_s . h_s + D u_s;  out(y silu(z))

    Tokens that are not valid are passed over, as if they were not there. A token whose attribute `item` differs from
    the one before begins with an empty state. The recurrence runs in float32 or wider.

    Args:
      width: size of a token.
      state: numbers of the state per inner channel (N).
      expand: inner channels per channel.
      taps: tokens that the causal depthwise convolution sees.
      rank: inner size of the step's projection; by default width / 16, rounded up.
      untie: which of `PARTS` have a copy per modality. `in`, `x`, `dt` and `out`: Mixture-of-Mamba (Liang et al.
        2025); it shares the convolution, A and D.
      modalities: which have one; see `mmjax.layers.by_modality`.
    """

    def __init__(
        self,
        width: int,
        state: int = 16,
        expand: int = 2,
        taps: int = 4,
        rank: int | None = None,
        untie: Sequence[str] = (),
        modalities: Modalities = (),
    ):
        self.rank = math.ceil(width / 16) if rank is None else rank
        sizes = {"state": state, "expand": expand, "taps": taps, "rank": self.rank}
        for name, size in sizes.items():
            if size < 1:
                raise UserError(f"mamba: {name} is {size}; it must be at least 1.")
        inner, self.state, self.taps = expand * width, state, taps
        copies = untied(untie, modalities, PARTS)
        self.norm = copies("norm", lambda: LayerNorm(width, bias=False))
        self.inner, self.gate = (copies("in", lambda: _dense(width, inner)) for _ in range(2))
        self.conv = copies("conv", lambda: Taps(taps, inner))
        self.x = copies("x", lambda: Dense(inner, self.rank + 2 * state, ("mlp", None), bias=False))
        self.dt = copies("dt", lambda: Step(self.rank, inner))
        self.out = copies("out", lambda: Dense(inner, width, ("mlp", "embed"), bias=False))
        self.a_log = declare((inner, state), ("mlp", None), _a_log, keep=True, decay=False)
        self.skip = declare((inner,), ("mlp",), initializers.ones, keep=True)

    def __call__(self, stream: Stream, key: jax.Array) -> tuple[Stream, Aux]:
        del key  # no dropout
        check_mask(stream.mask)
        of = kinds(stream)
        x_BSD = apply(self.norm, stream.x_BSD, of)
        u_BSE, z_BSE = apply(self.inner, x_BSD, of), apply(self.gate, x_BSD, of)
        u_BSE = constrain(u_BSE, ("batch", None, "mlp"))
        u_BSE = jax.nn.silu(apply(self.conv, _windows(u_BSE, self.taps, stream), of))
        y_BSE = self._recurrence(u_BSE, stream) * jax.nn.silu(z_BSE)
        return replace(stream, x_BSD=stream.x_BSD + apply(self.out, y_BSE, of)), no_aux()

    def _recurrence(self, u_BSE: jax.Array, stream: Stream) -> jax.Array:
        of, wide = kinds(stream), jnp.promote_types(u_BSE.dtype, jnp.float32)
        parts = apply(self.x, u_BSE, of)
        step_BSR, in_BSN, out_BSN = jnp.split(parts, [self.rank, self.rank + self.state], axis=-1)
        step_BSE = apply(self.dt, step_BSR, of)
        if stream.valid_BS is not None:
            step_BSE = jnp.where(stream.valid_BS[..., None], step_BSE, 0)
        tokens = Tokens(u_BSE, step_BSE, in_BSN, out_BSN, _begins(stream))
        y_BSE = selective_scan(-jnp.exp(self.a_log[...].astype(wide)), tokens)
        return (y_BSE + self.skip[...] * u_BSE).astype(u_BSE.dtype)


class Taps(nnx.Module):
    """The weights of a depthwise convolution, for windows `[B, S, taps, E]` whose last tap is the token's own."""

    def __init__(self, taps: int, inner: int):
        bound = taps**-0.5
        self.kernel = declare((taps, inner), (None, "mlp"), _uniform(bound))
        self.bias = declare((inner,), ("mlp",), initializers.zeros)

    def __call__(self, window_BSKE: jax.Array) -> jax.Array:
        return (window_BSKE * self.kernel[...]).sum(axis=2) + self.bias[...]


class Step(nnx.Module):
    """`softplus(r W + b)`: step sizes, in float32 or wider; they begin around exp(U(log 0.001, log 0.1))."""

    def __init__(self, rank: int, inner: int):
        self.kernel = declare((rank, inner), (None, "mlp"), _uniform(rank**-0.5))
        self.bias = declare((inner,), ("mlp",), _step_bias, keep=True)

    def __call__(self, r_BSR: jax.Array) -> jax.Array:
        wide = jnp.promote_types(r_BSR.dtype, jnp.float32)
        return jax.nn.softplus((r_BSR @ self.kernel[...]).astype(wide) + self.bias[...])


def check_mask(mask: Mask) -> None:
    """Raise a `UserError` for a mask that keeps a token from one before it, but for packing."""
    for factor in factors(mask):
        allows = factor in (Causal(), Same(ITEM)) or isinstance(factor, Or) and _has_causal(factor)
        if not allows:
            raise UserError(
                f"Layer mamba carries every token to all that come after; it cannot keep to {factor}. "
                f"Use attention there, or a mask of Causal() and Same('{ITEM}')."
            )


def _has_causal(mask: Mask) -> bool:
    if isinstance(mask, Or):
        return _has_causal(mask.left) or _has_causal(mask.right)
    return mask == Causal()


def _windows(x_BSE: jax.Array, taps: int, stream: Stream) -> jax.Array:
    """Each token after the `taps - 1` valid ones before it, `[B, S, taps, E]`; zero where its item has none."""
    window_BSKE = _behind(x_BSE, taps, stream.valid_BS)
    item_BS = _items(stream)
    if item_BS is None:
        return window_BSKE
    same_BSK = _behind(item_BS[..., None], taps, stream.valid_BS)[..., 0] == item_BS[..., None]
    return jnp.where(same_BSK[..., None], window_BSKE, 0)


def _begins(stream: Stream) -> jax.Array | None:
    """The valid tokens whose item is not that of the valid one before; None where there are no items."""
    item_BS = _items(stream)
    if item_BS is None:
        return None
    before_BS = _behind(item_BS[..., None], 2, stream.valid_BS)[:, :, 0, 0]
    return (before_BS != item_BS) & stream.mask_BS()


def _items(stream: Stream) -> jax.Array | None:
    item_BS = stream.attributes.get(ITEM)
    return None if item_BS is None else jnp.broadcast_to(item_BS, stream.x_BSD.shape[:2])


def _behind(x_BSE: jax.Array, taps: int, valid_BS: jax.Array | None) -> jax.Array:
    """`[B, S, taps, E]`: for a valid token the last `taps` valid ones up to itself, zero where there are fewer."""
    s = x_BSE.shape[1]
    if valid_BS is None:
        padded = jnp.pad(x_BSE, [(0, 0), (taps - 1, 0), (0, 0)])
        return jnp.stack([padded[:, k : k + s] for k in range(taps)], axis=2)
    place_BS = jnp.argsort(~valid_BS, axis=1, stable=True)  # of the n-th valid token
    nth_BSK = jnp.cumsum(valid_BS, axis=1)[..., None] - jnp.arange(taps, 0, -1)
    flat = jnp.maximum(nth_BSK, 0).reshape(len(x_BSE), -1)
    from_BM = jnp.take_along_axis(place_BS, flat, axis=1)
    found = jnp.take_along_axis(x_BSE, from_BM[..., None], axis=1)
    return jnp.where(nth_BSK[..., None] >= 0, found.reshape(*nth_BSK.shape, -1), 0)


def _dense(width: int, inner: int) -> Dense:
    return Dense(width, inner, ("embed", "mlp"), bias=False)


def _uniform(bound: float) -> Any:
    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def _a_log(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """A begins at -1, ..., -N in each channel (S4D-Real)."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype)), shape)


def _step_bias(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """The inverse of softplus at exp(U(log 0.001, log 0.1))."""
    step = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(1e-3), math.log(1e-1)))
    return step + jnp.log(-jnp.expm1(-step))
