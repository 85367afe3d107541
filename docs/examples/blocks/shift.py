"""The block `x += scale * x W`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
from flax import nnx

from mmjax.core.bounds import POSITIVE, check
from mmjax.nn.dense import Dense
from mmjax.nn.stream import Aux, Stream, no_aux


@dataclass(frozen=True)
class Shift:
    """The keys of the block.

    Attributes:
      scale: factor of what is added.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        check(self, scale=POSITIVE)

    def build(self, width: int) -> ShiftLayer:
        return ShiftLayer(width, self.scale)


class ShiftLayer(nnx.Module):
    """The layer that `Shift` describes; it never mixes tokens."""

    def __init__(self, width: int, scale: float):
        self.dense = Dense(width, width, ("embed", "mlp"), bias=False)
        self.scale = scale

    def __call__(self, stream: Stream, key: jax.Array | None) -> tuple[Stream, Aux]:
        x_BSD = stream.x_BSD + self.scale * self.dense(stream.x_BSD)
        return replace(stream, x_BSD=x_BSD), no_aux()
