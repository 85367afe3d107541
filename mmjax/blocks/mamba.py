"""The selective state-space block (Mamba, Gu and Dao 2023), its projections shared or by modality."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.nn import initializers

from mmjax.core.bounds import COUNT, POSITIVE, check, check_choices
from mmjax.core.errors import UserError
from mmjax.core.parameters import declare
from mmjax.core.sharding import constrain
from mmjax.nn.by_modality import SHARED, PerModality, apply_per_modality, check_parts, modality_of
from mmjax.nn.dense import NORMS, Dense, norm_of
from mmjax.nn.masks import Causal, Mask, Or, Same, factors
from mmjax.nn.selective_scan import Tokens, scan_from, selective_scan
from mmjax.nn.stream import Aux, Stream, no_aux

PARTS = ("norm", "in", "conv", "x", "dt", "out")
ITEM = "item"  # the attribute that distinguishes packed items


@dataclass(frozen=True)
class Mamba:
    """`x += mixer(norm(x))`: a recurrence over the tokens, causal by nature.

        u, z = in(x);  u = silu(conv(u));  step, b, c = x(u);  step = softplus(dt(step))
        h_s = exp(step_s A) h_(s-1) + step_s b_s u_s;  y_s = c_s . h_s + D u_s;  out(y silu(z))

    Tokens are read in the order of their attribute `position` where they have one, else as they lie. Those that are
    not valid are passed over, as if they were not there. A token whose `item` differs from the one before begins with
    an empty state. The recurrence runs in float32 or wider.

    Attributes:
      state: numbers of the state per inner channel (N).
      expand: inner channels per channel.
      taps: tokens that the causal depthwise convolution sees.
      rank: inner size of the step's projection; by default width / 16, rounded up.
      per_modality: which of `norm`, `in`, `conv`, `x`, `dt` and `out` have a copy for which modalities, see
        `mmjax.nn.by_modality`. `in`, `x`, `dt` and `out`: Mixture-of-Mamba (Liang et al. 2025); it shares the
        convolution, A and D.
      norm: `rms` (as all published models have it) or `layer`, without bias.
      eps: of the norm.
      depth: number of such blocks that add to one residual stream; `out` is initialised `1 / sqrt(depth)` times as
        large (Radford et al. 2019, as in Mamba's code).
    """

    state: int = 16
    expand: int = 2
    taps: int = 4
    rank: int | None = None
    per_modality: PerModality = SHARED
    norm: str = "rms"
    eps: float = 1e-6
    depth: int = 1

    def __post_init__(self) -> None:
        check(self, state=COUNT, expand=COUNT, taps=COUNT, rank=COUNT, depth=COUNT, eps=POSITIVE)
        check_choices(self, norm=NORMS)
        check_parts(self, PARTS)

    def build(self, width: int) -> MambaBlock:
        """Return the block for tokens of a width."""
        return MambaBlock(width, self)


class MambaBlock(nnx.Module):
    """The block that `Mamba` describes."""

    def __init__(self, width: int, config: Mamba):
        self.rank = math.ceil(width / 16) if config.rank is None else config.rank
        inner, self.state, self.taps = config.expand * width, config.state, config.taps
        copies, depth = config.per_modality, config.depth
        self.norm = copies("norm", lambda: norm_of(config.norm, width, False, config.eps))
        self.inner, self.gate = (copies("in", lambda: _dense(width, inner)) for _ in range(2))
        self.conv = copies("conv", lambda: DepthwiseConv(config.taps, inner))
        parts = self.rank + 2 * config.state
        self.x = copies("x", lambda: _dense(inner, parts, ("mlp", None)))
        self.dt = copies("dt", lambda: StepSize(self.rank, inner))
        self.out = copies("out", lambda: _dense(inner, width, ("mlp", "embed"), depth**-0.5))
        shape = (inner, config.state)
        self.a_log = declare(shape, ("mlp", None), _a_log, keep_dtype=True, decay=False)
        self.skip = declare((inner,), ("mlp",), initializers.ones, keep_dtype=True)

    def __call__(self, stream: Stream, key: jax.Array | None) -> tuple[Stream, Aux]:
        del key  # no dropout
        check_mask(stream.mask)
        token_modalities, order = modality_of(stream), token_order(stream)
        u_BSE, z_BSE = self._enter(stream)
        window_BSKE = _windows(u_BSE, self.taps, stream, order)
        u_BSE = jax.nn.silu(apply_per_modality(self.conv, window_BSKE, token_modalities))
        tokens = self._tokens(u_BSE, stream, _begins(stream, order))
        if order is not None and "position" in stream.attributes:
            y_BSE = order.invert(selective_scan(self._a(tokens), jax.tree.map(order.apply, tokens)))
        else:
            y_BSE = selective_scan(self._a(tokens), tokens)
        return self._leave(stream, u_BSE, y_BSE, z_BSE), no_aux()

    def init_cache(self, stream: Stream, slots: int) -> Cache:
        """Return an empty state and no tokens before, see `Trunk.init_cache`."""
        del slots  # the state does not grow
        rows, dtype = stream.x_BSD.shape[0], stream.x_BSD.dtype
        inner = self.a_log[...].shape[0]
        wide = jnp.promote_types(dtype, jnp.float32)
        shapes = jax.eval_shape(lambda: self._enter(stream)[0])
        window = jnp.zeros((rows, self.taps - 1, inner), shapes.dtype)
        return Cache(window, jnp.zeros((rows, inner, self.state), wide))

    def decode(self, stream: Stream, cache: Cache, at: jax.Array | int) -> tuple[Stream, Cache]:
        """Apply the block to further tokens, as they lie, given the state after those before; see `Trunk.decode`."""
        del at  # no token knows its place
        own_BS = stream.mask_BS()
        u_BSE, z_BSE = self._enter(stream)
        # What was before, these, and one to come, which sees what the next tokens will have behind them.
        valid_BS = jnp.pad(own_BS, [(0, 0), (self.taps - 1, 1)], constant_values=True)
        all_BSE = jnp.pad(
            jnp.concatenate([cache.window_BKE, u_BSE], axis=1), [(0, 0), (0, 1), (0, 0)]
        )
        window_BSKE = _causal_windows(
            all_BSE, self.taps, _order(valid_BS, jnp.arange(valid_BS.shape[1]))
        )
        windows_BSKE = window_BSKE[:, self.taps - 1 : -1]
        u_BSE = jax.nn.silu(apply_per_modality(self.conv, windows_BSKE, modality_of(stream)))
        tokens = self._tokens(u_BSE, stream, None)
        state_BEN, y_BSE = scan_from(cache.state_BEN, self._a(tokens), tokens)
        return self._leave(stream, u_BSE, y_BSE, z_BSE), Cache(window_BSKE[:, -1, :-1], state_BEN)

    def _enter(self, stream: Stream) -> tuple[jax.Array, jax.Array]:
        """Return the inputs of the convolution, and the gates."""
        token_modalities = modality_of(stream)
        x_BSD = apply_per_modality(self.norm, stream.x_BSD, token_modalities)
        u_BSE, z_BSE = (
            apply_per_modality(self.inner, x_BSD, token_modalities),
            apply_per_modality(self.gate, x_BSD, token_modalities),
        )
        return constrain(u_BSE, ("batch", None, "mlp")), z_BSE

    def _a(self, tokens: Tokens) -> jax.Array:
        wide = jnp.promote_types(tokens.x_BSE.dtype, jnp.float32)
        return -jnp.exp(self.a_log[...].astype(wide))

    def _tokens(self, u_BSE: jax.Array, stream: Stream, begins_BS: jax.Array | None) -> Tokens:
        token_modalities = modality_of(stream)
        parts = apply_per_modality(self.x, u_BSE, token_modalities)
        step_BSR, in_BSN, out_BSN = jnp.split(parts, [self.rank, self.rank + self.state], axis=-1)
        step_BSE = apply_per_modality(self.dt, step_BSR, token_modalities)
        if stream.valid_BS is not None:
            step_BSE = jnp.where(stream.valid_BS[..., None], step_BSE, 0)
        return Tokens(u_BSE, step_BSE, in_BSN, out_BSN, begins_BS)

    def _leave(
        self, stream: Stream, u_BSE: jax.Array, y_BSE: jax.Array, z_BSE: jax.Array
    ) -> Stream:
        y_BSE = (y_BSE + self.skip[...] * u_BSE).astype(u_BSE.dtype) * jax.nn.silu(z_BSE)
        return replace(
            stream, x_BSD=stream.x_BSD + apply_per_modality(self.out, y_BSE, modality_of(stream))
        )


@struct.dataclass
class Cache:
    """The cache of the block: the last inputs of the convolution, `[B, taps - 1, E]`, and the state `[B, E, N]`."""

    window_BKE: jax.Array
    state_BEN: jax.Array


@struct.dataclass
class Permutation:
    """The order in which a row's tokens are read, invalid ones last.

    Attributes:
      source_BS: where the n-th token lies.
      rank_BS: which one, from 0 on, the token at a place is.
    """

    source_BS: jax.Array
    rank_BS: jax.Array

    def apply(self, x: jax.Array) -> jax.Array:
        """Return `[B, S, ...]` in the order in which it is read."""
        return _picked(x, self.source_BS)

    def invert(self, x: jax.Array) -> jax.Array:
        """Return the inverse of `apply`: from the order in which it is read to the order of the tokens."""
        return _picked(x, self.rank_BS)


def _picked(x: jax.Array, index_BS: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, index_BS.reshape(index_BS.shape + (1,) * (x.ndim - 2)), axis=1)


def token_order(stream: Stream) -> Permutation | None:
    """Return the order of a stream's tokens; None if all are read as they lie."""
    if stream.valid_BS is None and "position" not in stream.attributes:
        return None
    return _order(stream.mask_BS(), stream.positions())


def _order(valid_BS: jax.Array, positions: jax.Array) -> Permutation:
    last = jnp.iinfo(jnp.int32).max
    source_BS = jnp.argsort(jnp.where(valid_BS, positions, last), axis=1, stable=True)
    return Permutation(source_BS, jnp.argsort(source_BS, axis=1))


class DepthwiseConv(nnx.Module):
    """The weights of a depthwise convolution, for windows `[B, S, taps, E]` whose last tap is the token's own."""

    def __init__(self, taps: int, inner: int):
        bound = taps**-0.5
        self.kernel = declare((taps, inner), (None, "mlp"), _uniform(bound))
        self.bias = declare((inner,), ("mlp",), _uniform(bound))

    def __call__(self, window_BSKE: jax.Array) -> jax.Array:
        return (window_BSKE * self.kernel[...]).sum(axis=2) + self.bias[...]


class StepSize(nnx.Module):
    """`softplus(r W + b)`: step sizes, in float32 or wider; they begin around exp(U(log 0.001, log 0.1))."""

    def __init__(self, rank: int, inner: int):
        self.kernel = declare((rank, inner), (None, "mlp"), _uniform(rank**-0.5))
        self.bias = declare((inner,), ("mlp",), _step_bias, keep_dtype=True)

    def __call__(self, r_BSR: jax.Array) -> jax.Array:
        wide = jnp.promote_types(r_BSR.dtype, jnp.float32)
        return jax.nn.softplus((r_BSR @ self.kernel[...]).astype(wide) + self.bias[...])


def check_mask(mask: Mask) -> None:
    """Raise a `UserError` for a mask that keeps a token from one before it, but for packing."""
    for factor in factors(mask):
        allows = factor == Same(ITEM) or _has_causal(factor)
        if not allows:
            raise UserError(
                f"Layer mamba carries every token to all later ones; it cannot apply the mask {factor}. "
                f"Use attention there, or a mask of Causal() and Same('{ITEM}')."
            )


def _has_causal(mask: Mask) -> bool:
    if isinstance(mask, Or):
        return _has_causal(mask.left) or _has_causal(mask.right)
    return isinstance(mask, Causal)


def _windows(x_BSE: jax.Array, taps: int, stream: Stream, order: Permutation | None) -> jax.Array:
    """Return each token after the `taps - 1` valid ones before it, `[B, S, taps, E]`; zero where its item has none."""
    window_BSKE = _causal_windows(x_BSE, taps, order)
    item_BS = _items(stream)
    if item_BS is None:
        return window_BSKE
    same_BSK = _causal_windows(item_BS[..., None], taps, order)[..., 0] == item_BS[..., None]
    return jnp.where(same_BSK[..., None], window_BSKE, 0)


def _begins(stream: Stream, order: Permutation | None) -> jax.Array | None:
    """Return the valid tokens whose item is not that of the valid one before; None where there are no items."""
    item_BS = _items(stream)
    if item_BS is None:
        return None
    before_BS = _causal_windows(item_BS[..., None], 2, order)[:, :, 0, 0]
    return (before_BS != item_BS) & stream.mask_BS()


def _items(stream: Stream) -> jax.Array | None:
    item_BS = stream.items()
    return None if item_BS is None else jnp.broadcast_to(item_BS, stream.x_BSD.shape[:2])


def _causal_windows(x_BSE: jax.Array, taps: int, order: Permutation | None) -> jax.Array:
    """Return windows `[B, S, taps, E]`: the last `taps` valid tokens up to each valid one, else zero."""
    s = x_BSE.shape[1]
    if order is None:
        padded = jnp.pad(x_BSE, [(0, 0), (taps - 1, 0), (0, 0)])
        return jnp.stack([padded[:, k : k + s] for k in range(taps)], axis=2)
    rank_BSK = order.rank_BS[..., None] - jnp.arange(taps - 1, -1, -1)
    flat = jnp.maximum(rank_BSK, 0).reshape(len(x_BSE), -1)
    picked = _picked(x_BSE, jnp.take_along_axis(order.source_BS, flat, axis=1))
    return jnp.where(rank_BSK[..., None] >= 0, picked.reshape(*rank_BSK.shape, -1), 0)


def _dense(
    n_in: int,
    n_out: int,
    axes: tuple[str | None, str | None] = ("embed", "mlp"),
    scale: float = 1.0,
) -> Dense:
    """Return a map without bias, initialised as PyTorch's `Linear`, times `scale`."""
    return Dense(n_in, n_out, axes, bias=False, init=_uniform(scale * n_in**-0.5))


def _uniform(bound: float) -> Any:
    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def _a_log(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Return a begins at -1, ..., -N in each channel (S4D-Real)."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype)), shape)


def _step_bias(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Return the inverse of softplus at exp(U(log 0.001, log 0.1)), at least 0.0001."""
    step = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(1e-3), math.log(1e-1)))
    step = jnp.maximum(step, 1e-4)
    return step + jnp.log(-jnp.expm1(-step))
