"""U-Net adapters: a picture's way down to tokens and back up (Transfusion, Zhou et al. 2024, section 3.2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.nn import initializers

from mmjax.core.errors import UserError
from mmjax.core.parameters import Initializer, declare
from mmjax.core.sharding import constrain
from mmjax.nn.dense import Dense, lecun


class Convolution(nnx.Module):
    """A square convolution with a bias: `[B, H, W, n_in] -> [B, H, W, n_out]`."""

    def __init__(self, side: int, n_in: int, n_out: int, init: Initializer = lecun):
        def flat(key: jax.Array, shape: tuple[int, ...], dtype: object = jnp.float32) -> jax.Array:
            return init(key, (shape[0] * shape[1] * shape[2], shape[3]), dtype).reshape(shape)

        self.kernel = declare((side, side, n_in, n_out), (None, None, "embed", None), flat)
        self.bias = declare((n_out,), (None,), initializers.zeros)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        y = jax.lax.conv_general_dilated(
            x_BHWC, self.kernel[...], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        # Pictures lie by rows alone: cut by place or channel, XLA finds no good way from one convolution to the next.
        return constrain(y + self.bias[...], ("batch", None, None, None))


class Residual(nnx.Module):
    """`x + conv(silu(norm(conv(silu(norm x))) (1 + scale(t)) + shift(t)))`; the last convolution begins at zero."""

    def __init__(self, channels: int, times: int):
        self.first = Convolution(3, channels, channels)
        self.last = Convolution(3, channels, channels, initializers.zeros)
        self.scale = Dense(times, channels, ("embed", None))
        self.shift = Dense(times, channels, ("embed", None))

    def __call__(self, x_BHWC: jax.Array, time_BD: jax.Array) -> jax.Array:
        y = self.first(jax.nn.silu(_normed(x_BHWC)))
        scale, shift = (part(time_BD)[:, None, None] for part in (self.scale, self.shift))
        return x_BHWC + self.last(jax.nn.silu(_normed(y) * (1 + scale) + shift))


def _normed(x_BHWC: jax.Array) -> jax.Array:
    """Normalise each picture to mean 0 and variance 1 over its places and channels."""
    wide = x_BHWC.astype(jnp.promote_types(x_BHWC.dtype, jnp.float32))
    mean = wide.mean(axis=(1, 2, 3), keepdims=True)
    square = jnp.square(wide - mean).mean(axis=(1, 2, 3), keepdims=True)
    return ((wide - mean) * jax.lax.rsqrt(square + 1e-6)).astype(x_BHWC.dtype)


@struct.dataclass
class UNetFeatures:
    """A picture that went down: its tokens `[B, S, D]`, and what the way up reads at each size, largest first."""

    tokens_BSD: jax.Array
    skips: list[jax.Array]


class UNet(nnx.Module):
    """Halves a picture until a patch is one place: a token each; and doubles it again, reading the way down.

    Args:
      patch: side of a patch, a power of two.
      channels: of the first size; each further one has twice as many.
      width: of a token, and of the time.
    """

    def __init__(self, patch: int, channels: int, width: int):
        levels = patch.bit_length() - 1
        if patch < 2 or patch != 1 << levels or channels < 1:
            raise UserError(
                f"A U-Net halves a patch until it is one pixel; found patch {patch}, channels {channels}. "
                "Take a patch of 2, 4, 8 or 16, and a channel at least."
            )
        sizes = [channels << level for level in range(levels + 1)]
        self.enter = Convolution(3, 3, channels)
        self.down = nnx.List([Residual(c, width) for c in sizes[:-1]])
        self.shrink = nnx.List([Dense(4 * c, 2 * c, ("embed", None)) for c in sizes[:-1]])
        self.deep, self.back = Residual(sizes[-1], width), Residual(sizes[-1], width)
        self.to_tokens = Dense(sizes[-1], width, (None, "embed"))
        self.to_places = Dense(width, sizes[-1], ("embed", None))
        self.grow = nnx.List([Dense(2 * c, 4 * c, ("embed", None)) for c in sizes[:-1]])
        self.join = nnx.List([Dense(2 * c, c, ("embed", None)) for c in sizes[:-1]])
        self.up = nnx.List([Residual(c, width) for c in sizes[:-1]])
        self.leave = Convolution(3, channels, 3, initializers.zeros)

    def encode(self, x_BHWC: jax.Array, time_BD: jax.Array) -> UNetFeatures:
        """Encode pictures of three channels as tokens, in row-major order."""
        x = self.enter(constrain(x_BHWC, ("batch", None, None, None)))
        skips = []
        for block, shrink in zip(self.down, self.shrink, strict=True):
            x = block(x, time_BD)
            skips.append(x)
            x = shrink(_halved(x))
        x = self.deep(x, time_BD)
        tokens_BSD = self.to_tokens(x.reshape(x.shape[0], -1, x.shape[-1]))
        return UNetFeatures(tokens_BSD, [*skips, x])

    def decode(
        self, tokens_BSD: jax.Array, features: UNetFeatures, time_BD: jax.Array
    ) -> jax.Array:
        """Decode pictures of three channels from the trunk's outputs for the tokens."""
        *skips, deepest = features.skips
        x = self.back(self.to_places(tokens_BSD).reshape(deepest.shape) + deepest, time_BD)
        for level in reversed(range(len(skips))):
            x = _doubled(self.grow[level](x))
            x = self.join[level](jnp.concatenate([x, skips[level]], axis=-1))
            x = self.up[level](x, time_BD)
        return self.leave(jax.nn.silu(_normed(x)))


def _halved(x_BHWC: jax.Array) -> jax.Array:
    """Reshape `[B, H, W, C] -> [B, H/2, W/2, 4C]`: each two by two places as one."""
    b, h, w, c = x_BHWC.shape
    x = x_BHWC.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h // 2, w // 2, 4 * c)


def _doubled(x_BHWC: jax.Array) -> jax.Array:
    """Return the inverse of `_halved`."""
    b, h, w, c = x_BHWC.shape
    x = x_BHWC.reshape(b, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, 2 * h, 2 * w, c // 4)
