"""`x += tanh((x - mean) W + b + code)` with two buffers: a running mean of x, and a codebook that follows it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.core.parameters import declare_buffer
from mmjax.nn.dense import Dense
from mmjax.nn.stream import Aux, Stream, no_aux

CODES = 4


@dataclass(frozen=True)
class ToyBuffers:
    """Attributes:
    axis: logical axis of the codes.
    """

    axis: str = "codes"

    def build(self, width: int) -> ToyBuffersBlock:
        return ToyBuffersBlock(width, self.axis)


def normal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return jax.random.normal(key, shape, dtype)


def mean(old: jax.Array, statistics: dict[str, jax.Array], key: jax.Array) -> jax.Array:
    """Return a tenth of the way to the mean of the tokens, and noise that shows the key."""
    count = statistics["count"]
    new = old + 0.1 * (statistics["sum"] / jnp.maximum(count, 1) - old)
    noise = 1e-3 * jax.random.normal(key, old.shape, old.dtype)
    return jnp.where(count > 0, new + noise, old)


def codebook(old: jax.Array, statistics: dict[str, jax.Array], key: jax.Array) -> jax.Array:
    """Return averages of counts (last column) and sums; decay 0.9."""
    del key
    now = jnp.concatenate([statistics["sum"], statistics["count"][:, None]], axis=1)
    return 0.9 * old + 0.1 * now


class ToyBuffersBlock(nnx.Module):
    def __init__(self, width: int, axis: str):
        self.inner = Dense(width, width, ("embed", "mlp"))
        sums = {"sum": ((width,), ("embed",)), "count": ((), ())}
        self.mean = declare_buffer(
            (width,), ("embed",), lambda k, s, d: jnp.zeros(s, d), mean, sums
        )
        fields = {"sum": ((CODES, width), (axis, None)), "count": ((CODES,), (axis,))}
        self.codes = declare_buffer((CODES, width + 1), (axis, None), normal, codebook, fields)

    def __call__(self, stream: Stream, key: jax.Array) -> tuple[Stream, Aux]:
        x_BSD, weight_BS = stream.x_BSD, stream.mask_BS()
        codes_VD = self.codes[...][:, :-1].astype(x_BSD.dtype)
        distance = jnp.square(x_BSD[:, :, None] - codes_VD).sum(axis=-1)
        chosen = jax.nn.one_hot(distance.argmin(axis=-1), CODES) * weight_BS[..., None]
        x = jnp.where(weight_BS[..., None], x_BSD, 0)
        proposals = self.mean.propose({"sum": x.sum(axis=(0, 1)), "count": weight_BS.sum()})
        proposals |= self.codes.propose(
            {"sum": jnp.einsum("bsv,bsd->vd", chosen, x), "count": chosen.sum(axis=(0, 1))}
        )
        centred = x_BSD - self.mean[...].astype(x_BSD.dtype)
        moved = jnp.tanh(self.inner(centred) + jnp.einsum("bsv,vd->bsd", chosen, codes_VD))
        return replace(stream, x_BSD=x_BSD + moved), replace(no_aux(), proposals=proposals)
