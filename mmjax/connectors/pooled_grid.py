"""The means over the cells of a coarser grid, projected (Emu2)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.connectors.base import Grid, Side, projection, reduce_cells
from mmjax.core.bounds import COUNT, check
from mmjax.core.errors import UserError
from mmjax.nn.stream import Aux, Stream, no_aux


@dataclass(frozen=True)
class PooledGrid:
    """A picture's grid as `size` times `size` means of its tokens that exist, then one linear map (Sun et al. 2024).

    Each frame of a video is a picture. A mean exists if one of its tokens does.

    Attributes:
      size: rows and columns of the pooled grid; it divides those of the picture.
      bias: the bias of the linear map (Emu2 has none).
    """

    size: int
    bias: bool = False

    def __post_init__(self) -> None:
        check(self, size=COUNT)

    def build(self, width_in: int, width_out: int) -> PooledGridConnection:
        """Return the module from tokens of one width to tokens of another."""
        return PooledGridConnection(width_in, width_out, self)


class PooledGridConnection(nnx.Module):
    """The module that `PooledGrid` describes."""

    def __init__(self, width_in: int, width_out: int, config: PooledGrid):
        self.out = projection(width_in, width_out, config.bias)
        self.size = config.size

    def __call__(self, stream: Stream, key: jax.Array | None) -> tuple[Stream, Aux]:
        del key
        stream = reduce_cells(stream, "pooled_grid", self._cell, _mean)
        return replace(stream, x_BSD=self.out(stream.x_BSD)), no_aux()

    def _cell(self, grid: Grid) -> Side:
        if grid.rows % self.size or grid.columns % self.size:
            raise UserError(
                f"connector pooled_grid: size {self.size} does not divide the {grid.rows} x {grid.columns} tokens of "
                f"'{grid.modality}'. Choose a divisor of both."
            )
        return grid.rows // self.size, grid.columns // self.size


def _mean(x_BCPD: jax.Array, valid_BCP: jax.Array | None) -> jax.Array:
    """Return the mean of the tokens that exist, zeros where none does; computed in float32 or wider."""
    if valid_BCP is None:
        return x_BCPD.mean(axis=2)
    wide = jnp.promote_types(x_BCPD.dtype, jnp.float32)
    count_BC1 = valid_BCP.sum(axis=2, keepdims=True).astype(wide)
    total_BCD = x_BCPD.sum(axis=2, dtype=wide)
    return (total_BCD / jnp.maximum(count_BC1, 1)).astype(x_BCPD.dtype)
