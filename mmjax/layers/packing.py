"""Sequences of several items: the rows of a batch, several to a sequence, and told apart by an item id.

The tokens of an item lie by modality, so that a part with a copy per modality costs slices whatever the order is that
they are read in; that order is their `position`, where it differs from row to row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp

from mmjax.errors import UserError
from mmjax.layers.stream import Stream


def pack(stream: Stream, count: int) -> Stream:
    """Sequences of `count` items, of a stream that has one in each row: `[B, S, D] -> [B / count, count S, D]`.

    An item's `position` begins where the one before could end at the latest.

    Raises:
      UserError: rows that `count` does not divide.
    """
    rows, length = stream.x_BSD.shape[:2]
    if count == 1:
        return stream
    if rows % count:
        raise UserError(
            f"{rows} rows do not make sequences of {count} items each. "
            f"Take batches (micro-batches, rows of a device) that {count} divides."
        )

    has_mask = stream.valid_BS is not None or stream.rows_B is not None

    def joined(x: jax.Array) -> jax.Array:
        return x.reshape(rows // count, count * length, *x.shape[2:])

    def spread(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, (rows, length))

    attributes = {name: spread(x) for name, x in stream.attributes.items()}
    if "position" in attributes:
        attributes["position"] += (jnp.arange(rows) % count * length)[:, None]
    return replace(
        stream,
        x_BSD=joined(stream.x_BSD),
        # Rows of one sequence may see each other: those that do not exist must be told apart by token now.
        valid_BS=joined(stream.mask_BS()) if has_mask else None,
        rows_B=None,
        attributes={name: joined(x) for name, x in attributes.items()},
        layout=stream.layout * count,
        item_segments=len(stream.layout),
    )


def unpack(x_BSD: jax.Array, count: int) -> jax.Array:
    """One item in each row again."""
    rows, length = x_BSD.shape[:2]
    return x_BSD.reshape(rows * count, length // count, *x_BSD.shape[2:])


def positions(valid: Sequence[jax.Array], reversed_B: jax.Array) -> jax.Array:
    """The position of each token where the segments of a row are read in turn, without holes: int32 `[B, S]`.

    Args:
      valid: of each segment, in the order in which they lie, which tokens exist, `[B, L]`.
      reversed_B: rows that read them from the last to the first.
    """
    counts = [v.sum(axis=1) for v in valid]
    found = []
    for index, v in enumerate(valid):
        before, after = (
            sum(part, jnp.zeros_like(counts[0])) for part in (counts[:index], counts[index + 1 :])
        )
        start_B = jnp.where(reversed_B, after, before)
        found.append(start_B[:, None] + jnp.maximum(jnp.cumsum(v, axis=1) - 1, 0))
    return jnp.concatenate(found, axis=1).astype(jnp.int32)
