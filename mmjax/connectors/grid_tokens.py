"""Learned tokens that end each row of a picture or each frame of a video."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from mmjax.connectors.base import Grid, grids_of, join, of_tokens, passed_on, projection
from mmjax.core.bounds import FieldError
from mmjax.core.parameters import declare
from mmjax.nn.stream import Aux, Stream, no_aux

# Returns the entry `[B, G, 1, ...]` that comes after each group of entries `[B, G, N, ...]`.
End = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class GridTokens:
    """The tokens of a grid with a learned token after each row, or after each frame, or both.

    So a stack with positions in one dimension knows a picture's shape (HaploVL's `image_newline`, Lumina's `eol`). A
    learned token exists if a token of its row (or frame) does, and has the coordinates and attributes of the last.
    Where the widths differ, the tokens of the grid are first mapped linearly.

    Attributes:
      row: end each row with the newline token.
      frame: end each frame with the frame token, after the last row's.
      bias: the bias of the linear map, where there is one.
    """

    row: bool = True
    frame: bool = False
    bias: bool = True

    def __post_init__(self) -> None:
        if not (self.row or self.frame):
            raise FieldError(self, "row", "and frame are both false; set one to true.")

    def build(self, width_in: int, width_out: int) -> GridTokensConnection:
        """Return the module from tokens of one width to tokens of another."""
        return GridTokensConnection(width_in, width_out, self)


class GridTokensConnection(nnx.Module):
    """The module that `GridTokens` describes."""

    def __init__(self, width_in: int, width_out: int, config: GridTokens):
        self.out = None if width_in == width_out else projection(width_in, width_out, config.bias)
        init = initializers.normal(0.02)
        self.newline, self.frame_end = (
            declare((width_out,), ("embed",), init, decay=False) if has else None
            for has in (config.row, config.frame)
        )

    def __call__(self, stream: Stream, key: jax.Array | None) -> tuple[Stream, Aux]:
        del key
        grids = grids_of(stream, "grid_tokens")
        x_BSD = stream.x_BSD if self.out is None else self.out(stream.x_BSD)

        def extended(x: Any, newline: End, frame_end: End) -> jax.Array:
            return join([self._extended(grid.cut(x), newline, frame_end) for grid in grids])

        def with_last(x: Any) -> jax.Array:
            return extended(jnp.asarray(x), _last, _last)

        valid_BS = stream.valid_BS
        return passed_on(
            stream,
            extended(x_BSD, _learned(self.newline), _learned(self.frame_end)),
            valid_BS=None if valid_BS is None else extended(valid_BS, _any, _any),
            coordinates=of_tokens(with_last, stream.coordinates),
            attributes=of_tokens(with_last, stream.attributes),
            layout=tuple((grid.modality, self._length(grid)) for grid in grids),
            grids=(),
        ), no_aux()

    def _length(self, grid: Grid) -> int:
        row = grid.columns + (self.newline is not None)
        return grid.frames * (grid.rows * row + (self.frame_end is not None))

    def _extended(self, x: jax.Array, newline: End, frame_end: End) -> jax.Array:
        """Return `[B, frames, rows, columns, ...]` as `[B, S, ...]`, with an entry after each row or frame."""
        b, frames, rows, columns, *trailing = x.shape
        x = x.reshape(b, frames * rows, columns, *trailing)
        if self.newline is not None:
            x = jnp.concatenate([x, newline(x)], axis=2)
        x = x.reshape(b, frames, -1, *trailing)
        if self.frame_end is not None:
            x = jnp.concatenate([x, frame_end(x)], axis=2)
        return x.reshape(b, -1, *trailing)


def _learned(token_D: nnx.Param | None) -> End:
    def end(x_BGND: jax.Array) -> jax.Array:
        assert token_D is not None
        shape = (*x_BGND.shape[:2], 1, x_BGND.shape[-1])
        return jnp.broadcast_to(token_D[...].astype(x_BGND.dtype), shape)

    return end


def _any(flags_BGN: jax.Array) -> jax.Array:
    return flags_BGN.any(axis=2, keepdims=True)


def _last(x_BGN: jax.Array) -> jax.Array:
    return x_BGN[:, :, -1:]
