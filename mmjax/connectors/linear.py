"""One linear map of each token."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from flax import nnx

from mmjax.connectors.base import passed_on, projection
from mmjax.nn.stream import Aux, Stream, no_aux


@dataclass(frozen=True)
class Linear:
    """`x W + b` of each token.

    Attributes:
      bias: add b.
    """

    bias: bool = True

    def build(self, width_in: int, width_out: int) -> LinearConnection:
        """Return the module from tokens of one width to tokens of another."""
        return LinearConnection(width_in, width_out, self)


class LinearConnection(nnx.Module):
    """The module that `Linear` describes."""

    def __init__(self, width_in: int, width_out: int, config: Linear):
        self.out = projection(width_in, width_out, config.bias)

    def __call__(self, stream: Stream, key: jax.Array | None) -> tuple[Stream, Aux]:
        del key
        return passed_on(stream, self.out(stream.x_BSD)), no_aux()
