"""Streams of tokens: what flows between stems, trunk and objectives."""

from __future__ import annotations

from dataclasses import field, replace

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Stream:
    """Tokens of one or several modalities.

    Attributes:
      x_BSD: token vectors.
      valid_BS: which tokens exist (bool); None means all.
      coordinates: per-axis positions in [0, 1) of each token, `dict[axis, float[B or 1, S]]`.
      layout: static segments (modality, length) in the order of the tokens.
    """

    x_BSD: jax.Array
    valid_BS: jax.Array | None = None
    coordinates: dict[str, jax.Array] = field(default_factory=dict)
    layout: tuple[tuple[str, int], ...] = struct.field(pytree_node=False, default=())

    def mask_BS(self) -> jax.Array:
        """`valid_BS`, made explicit."""
        shape = self.x_BSD.shape[:2]
        return jnp.ones(shape, bool) if self.valid_BS is None else self.valid_BS

    def take(self, index_BK: jax.Array) -> Stream:
        """The tokens at `index_BK` of a stream of one modality, in that order."""

        def pick(x: jax.Array) -> jax.Array:
            x = jnp.broadcast_to(x, (index_BK.shape[0], *x.shape[1:]))
            return jnp.take_along_axis(
                x, index_BK.reshape(index_BK.shape + (1,) * (x.ndim - 2)), axis=1
            )

        return replace(
            self,
            x_BSD=pick(self.x_BSD),
            valid_BS=None if self.valid_BS is None else pick(self.valid_BS),
            coordinates={axis: pick(c) for axis, c in self.coordinates.items()},
            layout=((self.layout[0][0], index_BK.shape[1]),),
        )


def concatenate(streams: list[Stream]) -> Stream:
    """One stream of all tokens, in order. Coordinates end here: trunks do not read them."""
    if len(streams) == 1:
        return streams[0]
    whole = all(s.valid_BS is None for s in streams)
    return Stream(
        jnp.concatenate([s.x_BSD for s in streams], axis=1),
        None if whole else jnp.concatenate([s.mask_BS() for s in streams], axis=1),
        layout=tuple(segment for s in streams for segment in s.layout),
    )


def mean_pool(stream: Stream) -> jax.Array:
    """Mean over the valid tokens, `[B, D]`; zero where an example has none."""
    if stream.valid_BS is None:
        return stream.x_BSD.mean(axis=1)
    weight_BS1 = stream.valid_BS[..., None].astype(stream.x_BSD.dtype)
    return (stream.x_BSD * weight_BS1).sum(axis=1) / jnp.maximum(weight_BS1.sum(axis=1), 1)


@struct.dataclass
class Aux:
    """What a block returns beside its output; every field is present (zero) so that scans keep one structure.

    Attributes:
      loss: auxiliary loss to add, float32 scalar.
      statistics: name -> (sum, count), float32 scalars, reported as sum / count.
      buffers: proposed new values of buffers, applied by the step.
    """

    loss: jax.Array
    statistics: dict[str, tuple[jax.Array, jax.Array]] = field(default_factory=dict)
    buffers: dict[str, jax.Array] = field(default_factory=dict)


def no_aux() -> Aux:
    return Aux(loss=jnp.zeros((), jnp.float32))
