"""The interface of a connector: what stands between two towers, and the grids that some connectors read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmjax.core.errors import UserError
from mmjax.nn.dense import Dense
from mmjax.nn.masks import FULL
from mmjax.nn.stream import Aux, Stream

Side = tuple[int, int]
# From the tokens `[B, C, P, D]` of cells, and which exist (None: all), to the vectors `[B, C, D]` of the cells.
Reduce = Callable[[jax.Array, jax.Array | None], jax.Array]


class Connection(Protocol):
    """The module that a connector builds, an `nnx.Module`."""

    def __call__(self, stream: Stream, key: jax.Array | None) -> tuple[Stream, Aux]:
        """Return the tokens for the next tower, and auxiliary losses; without a key nothing is drawn.

        The tokens have their layout, and which of them and which rows exist. Mask and context stay behind: they are
        those of the tower that was read, and the next one sets its own.
        """


class Connector(Protocol):
    """A config's block `{name: NAME, ...}`: the frozen dataclass of that name in `mmjax/connectors/NAME.py`.

    Its fields are the keys, with their types and defaults; `__post_init__` checks what the types do not express.
    """

    def build(self, width_in: int, width_out: int) -> Connection:
        """Return the module from tokens of one width to tokens of another."""


def passed_on(stream: Stream, x_BSD: jax.Array, **changes: Any) -> Stream:
    """Return the stream with other vectors, for another tower."""
    return replace(stream, x_BSD=x_BSD, mask=FULL, context=None, **changes)


def projection(width_in: int, width_out: int, bias: bool) -> Dense:
    """Return a linear map between the tokens of two towers."""
    return Dense(width_in, width_out, ("embed", None), bias)


def remade(stream: Stream, x_BQD: jax.Array, connector: str, modality: str = "") -> Stream:
    """Return a stream of new tokens, which exist in the rows that have a token.

    Args:
      modality: of the new tokens; by default that of all tokens of the stream.

    Raises:
      UserError: the stream has several modalities and no name is given.
    """
    names = list(dict.fromkeys(name for name, _ in stream.layout))
    if not modality and len(names) != 1:
        raise UserError(
            f"connector {connector} reads a stream of several modalities ({', '.join(names) or 'without names'}): "
            "set its key `modality` to the name of the tokens that it makes."
        )
    valid_BQ = None
    if stream.valid_BS is not None:
        any_B1 = stream.valid_BS.any(axis=1, keepdims=True)
        valid_BQ = jnp.broadcast_to(any_B1, x_BQD.shape[:2])
    layout = ((modality or names[0], x_BQD.shape[1]),)
    return Stream(x_BQD, valid_BQ, layout=layout, rows_B=stream.rows_B)


def broadcast_rows(tokens_QD: nnx.Param, stream: Stream) -> jax.Array:
    """Return learned tokens for each row of a stream, `[B, Q, D]`."""
    x_QD = tokens_QD[...].astype(stream.x_BSD.dtype)
    return jnp.broadcast_to(x_QD, (stream.x_BSD.shape[0], *x_QD.shape))


# --- grids -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """A segment of a stream that is a whole grid: from `start` on, `frames` pictures of `rows` times `columns`."""

    modality: str
    start: int
    frames: int
    rows: int
    columns: int

    def cut(self, x: Any) -> Any:
        """Return the segment of an array of tokens as a grid: `[B, S, ...] -> [B, frames, rows, columns, ...]`."""
        stop = self.start + self.frames * self.rows * self.columns
        return x[:, self.start : stop].reshape(
            x.shape[0], self.frames, self.rows, self.columns, *x.shape[2:]
        )


def grids_of(stream: Stream, connector: str) -> list[Grid]:
    """Return the grid of each segment of the layout.

    Raises:
      UserError: a segment is not a whole grid of rows and columns, such as a picture with dropped tokens.
    """
    result, start = [], 0
    sizes = stream.grids or ((),) * len(stream.layout)
    if len(sizes) != len(stream.layout) or not sizes:
        raise ValueError(f"grids {stream.grids} of a stream of layout {stream.layout}")
    for (modality, length), size in zip(stream.layout, sizes, strict=True):
        if len(size) < 2 or math.prod(size) != length:
            raise UserError(
                f"connector {connector} reads a grid of rows and columns, and the {length} tokens of '{modality}' are "
                "not a whole one. Set `token_drop` to 0 if it drops tokens, or choose a connector that reads no grid, "
                "such as `queries`."
            )
        result.append(Grid(modality, start, math.prod(size[:-2]), *size[-2:]))
        start += length
    return result


def reduce_cells(
    stream: Stream, connector: str, cell: Callable[[Grid], Side], reduce: Reduce
) -> Stream:
    """Return the stream of coarser grids, a token for each cell.

    A cell exists if one of its tokens does, and has the coordinates and attributes of its first.

    Args:
      cell: returns the rows and columns of tokens in a cell of a grid.
      reduce: returns the vectors of the cells from the tokens of each, in row-major order, with zeros for those that do
        not exist, and from which of them exist.
    """
    grids = grids_of(stream, connector)
    sides = [cell(grid) for grid in grids]

    def cut(x: Any) -> list[Any]:
        return [_cells(grid.cut(x), side) for grid, side in zip(grids, sides, strict=True)]

    def first(x: Any) -> Any:
        return join([piece[:, :, 0] for piece in cut(x)])

    valid: list[Any] = [None] * len(grids)
    pieces, valid_BC = cut(stream.x_BSD), None
    if stream.valid_BS is not None:
        valid = cut(stream.valid_BS)
        valid_BC = join([piece.any(axis=2) for piece in valid])
        pieces = [jnp.where(v[..., None], x, 0) for x, v in zip(pieces, valid, strict=True)]
    sizes = [
        (grid.frames, grid.rows // y, grid.columns // x)
        for grid, (y, x) in zip(grids, sides, strict=True)
    ]
    return passed_on(
        stream,
        join([reduce(x, v) for x, v in zip(pieces, valid, strict=True)]),
        valid_BS=valid_BC,
        coordinates=of_tokens(first, stream.coordinates),
        attributes=of_tokens(first, stream.attributes),
        layout=tuple((g.modality, math.prod(n)) for g, n in zip(grids, sizes, strict=True)),
        grids=tuple(n if n[0] > 1 else n[1:] for n in sizes),
    )


def of_tokens(function: Callable[[Any], Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name: function(x) for name, x in arrays.items()}


def join(pieces: Sequence[Any]) -> Any:
    """Concatenate along the tokens; NumPy arrays, which are known before compilation, stay such."""
    if len(pieces) == 1:
        return pieces[0]
    is_static = all(isinstance(piece, np.ndarray) for piece in pieces)
    return (np if is_static else jnp).concatenate(pieces, axis=1)


def _cells(x: Any, side: Side) -> Any:
    """Cut `[B, frames, rows, columns, ...]` into `[B, cells, tokens of a cell, ...]`."""
    (b, frames, rows, columns), trailing, (y, w) = x.shape[:4], x.shape[4:], side
    x = x.reshape(b, frames, rows // y, y, columns // w, w, *trailing)
    x = x.swapaxes(3, 4)
    return x.reshape(b, frames * (rows // y) * (columns // w), y * w, *trailing)
