"""`x += tanh(x W + b)`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.nn.dense import Dense
from mmjax.nn.stream import Aux, Stream, no_aux


@dataclass(frozen=True)
class Toy:
    def build(self, width: int) -> ToyBlock:
        return ToyBlock(width)


class ToyBlock(nnx.Module):
    def __init__(self, width: int):
        self.inner = Dense(width, width, ("embed", "mlp"))

    def __call__(self, stream: Stream, key: jax.Array) -> tuple[Stream, Aux]:
        x_BSD = stream.x_BSD
        return replace(stream, x_BSD=x_BSD + jnp.tanh(self.inner(x_BSD))), no_aux()
