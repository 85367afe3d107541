"""Positions by normalised coordinates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from mmjax.core.bounds import POSITIVE, check
from mmjax.core.errors import UserError, nearest
from mmjax.core.parameters import declare
from mmjax.core.sharding import constrain
from mmjax.nn.dense import LayerNorm


class Positions(nnx.Module):
    """Learned embeddings per axis, summed, then normalised (IMP, Akbari et al. 2023).

    A coordinate c in [0, 1) takes bucket `int(c * buckets)`, so another resolution, frame rate or length
    reads the same parameters: the buckets of a coarse grid are among those of a fine one.

    Args:
      width: size of a token.
      buckets: buckets per axis; at least the finest grid that any task uses.
      scale: initial size of the embeddings. Below a stem it is small: at the size of the content,
        tokens of one position look alike whatever they hold, and contrastive learning makes no progress
        for its first hundreds of steps.
    """

    def __init__(self, width: int, buckets: Mapping[str, int], scale: float = 1.0):
        self.buckets = dict(buckets)
        table = initializers.normal(0.02)
        self.tables = nnx.Dict(
            {
                a: declare((n, width), ("positions", "embed"), table, decay=False)
                for a, n in buckets.items()
            }
        )
        self.norm = LayerNorm(width, scale=scale)

    def __call__(self, coordinates: Mapping[str, jax.Array]) -> jax.Array:
        """Embed positions, `dict[axis, float[..., S]] -> [..., S, width]`."""
        parts = []
        for axis, count in self.buckets.items():
            parts.append(_rows(self.tables[axis][...], _bucket(coordinates[axis], count)))
        return self.norm(sum(parts[1:], parts[0]))


class Table(nnx.Module):
    """One learned embedding for each cell of the grid of buckets, as a ViT has it (Dosovitskiy et al. 2021).

    The cells are in row-major order: the table of `{"y": 14, "x": 14}` is that of a ViT-B/16 at 224 pixels without the
    row of its class token.
    """

    def __init__(self, width: int, buckets: Mapping[str, int]):
        self.buckets = dict(buckets)
        cells = math.prod(buckets.values())
        init = initializers.normal(0.02)
        self.table = declare((cells, width), ("positions", "embed"), init, decay=False)

    def __call__(self, coordinates: Mapping[str, jax.Array]) -> jax.Array:
        """Embed positions, `dict[axis, float[..., S]] -> [..., S, width]`."""
        cell = jnp.zeros((), jnp.int32)
        for axis, count in self.buckets.items():
            cell = cell * count + jnp.clip(_bucket(coordinates[axis], count), 0, count - 1)
        return _rows(self.table[...], cell)


def _bucket(coordinate: jax.Array, count: int) -> jax.Array:
    # Nudged: 15 / 22 * 22 is below 15 in float32, and would read the bucket before its own.
    return (coordinate * count + 1e-3).astype(jnp.int32)


def _rows(table: jax.Array, index: jax.Array) -> jax.Array:
    if index.shape[0] > 1:
        # Whole before the lookup where each row has its own coordinates, as a text's vectors are: what it
        # gives lies by rows, and XLA cannot go there from a cut table but by making all of it whole.
        table = constrain(table, ("positions", None))
    return jnp.take(table, index, axis=0, mode="clip")


KINDS = ("learned", "table", "none")


@dataclass(frozen=True)
class Placed:
    """Keys of a modality whose stem adds positions to its tokens.

    Attributes:
      positions: `learned`, embeddings per axis (see `Positions`); `table`, one for each cell of the buckets (see
        `Table`); `none`, for layers that know positions by themselves: by rotary embeddings, or by reading in order.
      positions_scale: initial size of `learned` ones, see there (IMP: 1).
    """

    positions: str = "learned"
    positions_scale: float = 0.05

    def __post_init__(self) -> None:
        name = type(self).__name__.lower()
        if self.positions not in KINDS:
            raise UserError(
                f"{name}: positions is '{self.positions}'.{nearest(self.positions, KINDS)}"
            )
        check(self, positions_scale=POSITIVE)

    def limit(self, buckets: int) -> float:
        """Return how many cells an axis may have: any number where there are no positions."""
        return math.inf if self.positions == "none" else buckets

    def make_positions(self, width: int, buckets: Mapping[str, int]) -> Positions | Table | None:
        """Return the stem's part that `place` takes."""
        if self.positions == "none":
            return None
        if self.positions == "table":
            return Table(width, buckets)
        return Positions(width, buckets, self.positions_scale)


def place(
    x_BSD: jax.Array, positions: Positions | Table | None, coordinates: Mapping[str, jax.Array]
) -> jax.Array:
    """Return tokens `[B, S, D]` with their positions added, if there are any."""
    return x_BSD if positions is None else x_BSD + positions(coordinates).astype(x_BSD.dtype)


def grid(**sizes: int) -> dict[str, jax.Array]:
    """Return the coordinates of a row-major grid: `grid(y=2, x=3)` gives y and x, each float32 `[1, 6]`."""
    ranges = [jnp.arange(n, dtype=jnp.float32) / n for n in sizes.values()]
    mesh = jnp.meshgrid(*ranges, indexing="ij")
    return {axis: m.reshape(1, -1) for axis, m in zip(sizes, mesh, strict=True)}


def rotate(x_BSHK: jax.Array, positions_BS: jax.Array, base: float) -> jax.Array:
    """Apply rotary embeddings (Su et al. 2021), in float32 or wider: products of two depend on how far apart they are.

    The i-th number and the one half a head after it are turned by `place * base ** (-2 i / K)`.
    """
    wide = jnp.promote_types(x_BSHK.dtype, jnp.float32)
    half = x_BSHK.shape[-1] // 2
    rates_K = base ** (-jnp.arange(half, dtype=wide) / half)
    angles = positions_BS.astype(wide)[:, :, None, None] * rates_K
    one, two = jnp.split(x_BSHK.astype(wide), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turned = jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)
    return turned.astype(x_BSHK.dtype)


def time_features(t_B: jax.Array, size: int) -> jax.Array:
    """Return sines and cosines of 1000 t at frequencies from 1 to 1e-4, `[B, size]` (Ho et al. 2020)."""
    rates = jnp.exp(-math.log(1e4) * jnp.arange(size // 2, dtype=t_B.dtype) / (size // 2))
    angles = 1000 * t_B[:, None] * rates
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
