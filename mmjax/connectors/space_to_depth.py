"""Neighbouring tokens of a grid joined into one (pixel shuffle), then a norm and an MLP."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
from flax import nnx

from mmjax.connectors.base import Grid, Side, reduce_cells
from mmjax.connectors.mlp import ACTIVATIONS
from mmjax.core.bounds import COUNT, POSITIVE, SIZE, check, check_choices
from mmjax.core.errors import UserError
from mmjax.nn.dense import NORMS, Dense, norm_of
from mmjax.nn.stream import Aux, Stream, no_aux


@dataclass(frozen=True)
class SpaceToDepth:
    """Join `factor` times `factor` tokens into one of as many times the width, then `f(norm(x) W1) W2` (InternVL).

    The tokens of a cell are joined in row-major order; one that does not exist counts as zeros, and a cell exists if
    one of its tokens does. Each frame of a video is a picture.

    Attributes:
      factor: rows and columns of a cell; it divides those of the picture.
      norm: `layer` or `rms`, of the joined token.
      hidden: size of the hidden layer; 0 for the width of the result.
      activation: `gelu` (tanh form), `gelu_exact`, `relu` or `silu`.
      bias: biases of the maps and of a layer norm.
      eps: of the norm.
    """

    factor: int = 2
    norm: str = "layer"
    hidden: int = 0
    activation: str = "gelu"
    bias: bool = True
    eps: float = 1e-6

    def __post_init__(self) -> None:
        check(self, factor=COUNT, hidden=SIZE, eps=POSITIVE)
        check_choices(self, activation=ACTIVATIONS, norm=NORMS)

    def build(self, width_in: int, width_out: int) -> SpaceToDepthConnection:
        """Return the module from tokens of one width to tokens of another."""
        return SpaceToDepthConnection(width_in, width_out, self)


class SpaceToDepthConnection(nnx.Module):
    """The module that `SpaceToDepth` describes."""

    def __init__(self, width_in: int, width_out: int, config: SpaceToDepth):
        joined, hidden = width_in * config.factor**2, config.hidden or width_out
        self.norm = norm_of(config.norm, joined, config.bias, config.eps)
        self.up = Dense(joined, hidden, ("embed", "mlp"), config.bias)
        self.down = Dense(hidden, width_out, ("mlp", "embed"), config.bias)
        self.factor, self.activation = config.factor, ACTIVATIONS[config.activation]

    def __call__(self, stream: Stream, key: jax.Array | None) -> tuple[Stream, Aux]:
        del key
        stream = reduce_cells(stream, "space_to_depth", self._cell, _joined)
        x_BSD = self.down.of(self.activation, self.up(self.norm(stream.x_BSD)))
        return replace(stream, x_BSD=x_BSD), no_aux()

    def _cell(self, grid: Grid) -> Side:
        if grid.rows % self.factor or grid.columns % self.factor:
            raise UserError(
                f"connector space_to_depth: factor {self.factor} does not divide the {grid.rows} x {grid.columns} "
                f"tokens of '{grid.modality}'. Choose a divisor of both."
            )
        return self.factor, self.factor


def _joined(x_BCPD: jax.Array, valid_BCP: jax.Array | None) -> jax.Array:
    del valid_BCP  # those that do not exist are zeros
    return x_BCPD.reshape(*x_BCPD.shape[:2], -1)
