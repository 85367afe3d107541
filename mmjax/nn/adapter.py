"""Layers between a trunk and the spans of interleaved sequences, by modality."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from mmjax.core.parameters import declare
from mmjax.nn.dense import Dense, Mlp
from mmjax.nn.packing import Region
from mmjax.nn.positions import time_features
from mmjax.nn.stream import Stream
from mmjax.nn.unet import UNet

_FEATURES = 128  # of a time


class Adapter(nnx.Module):
    """Layers between the trunk and the outputs, by modality.

    `begin` is the token before a discrete span, `logits` its output; `time` shows a continuous span's tokens how noisy
    they are, `values` is its output, and `unet`, where there is one, a second way in and out.
    """

    def __init__(
        self, width: int, vocabularies: Mapping[str, int], sizes: Mapping[str, int], channels: int
    ):
        begin = initializers.normal(0.1)
        self.begin = nnx.Dict(
            {m: declare((width,), (None,), begin, decay=False) for m in vocabularies}
        )
        self.logits = nnx.Dict(
            {
                m: Dense(width, n, ("embed", "vocabulary"), bias=False)
                for m, n in vocabularies.items()
            }
        )
        self.features = nnx.Dict({m: Dense(_FEATURES, width, (None, "embed")) for m in sizes})
        self.time = nnx.Dict({m: Mlp(width, width) for m in sizes})
        zeros = initializers.zeros
        self.values = nnx.Dict(
            {m: Dense(width, n, ("embed", None), init=zeros) for m, n in sizes.items()}
        )
        patch = {m: round((n / 3) ** 0.5) for m, n in sizes.items()}
        self.unet = nnx.Dict(
            {m: UNet(patch[m], channels, width) for m in sizes} if channels else {}
        )

    def times(self, name: str, t_B: jax.Array) -> jax.Array:
        """Return the embedding of time t that is added to the tokens of a continuous span, `[B, D]`."""
        time_BD: jax.Array = self.time[name](self.features[name](time_features(t_B, _FEATURES)))
        return time_BD

    def begun(self, name: str, stream: Stream, keep_B: jax.Array) -> Stream:
        """Return a span's stream with the token of its beginning; rows that are not kept have nothing else."""
        rows, length, width = stream.x_BSD.shape
        begin_D = self.begin[name][...].astype(stream.x_BSD.dtype)
        begin = jnp.broadcast_to(begin_D, (rows, 1, width))
        valid = stream.mask_BS() & keep_B[:, None]
        return replace(
            stream,
            x_BSD=jnp.concatenate([begin, stream.x_BSD], axis=1),
            valid_BS=jnp.concatenate([jnp.ones((rows, 1), bool), valid], axis=1),
            coordinates={},
            layout=((stream.layout[0][0], length + 1),),
            grids=(),
        )

    def begun_in(self, name: str, stream: Stream, region: Region) -> Stream:
        """Return the stream of slots that spans share, with the token of each one's beginning in its first slot."""
        begin_D = self.begin[name][...].astype(stream.x_BSD.dtype)
        begins_RT = region.index_RT == 0
        x_RTD = jnp.where(begins_RT[..., None], begin_D, stream.x_BSD)
        return replace(stream, x_BSD=x_RTD, valid_BS=region.valid_RT)
