"""Sequences of several items: the rows of a batch, several to a sequence, distinguished by an item id.

The tokens of an item lie by modality, so that a part with a copy per modality costs slices whatever the order is that
they are read in; that order is their `position`, where it differs from row to row.

Two layouts, both static:

    slots    [text 1, image 1, text 2, image 2, ...]      each span has slots for the longest (`pack`)
    shared   [texts 1, 2, ..., image 1, image 2, ...]     texts lie without gaps in slots that they share (`lay`)

In the shared layout the item and the position of a token are attributes, which the program learns only as it runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import jax
import jax.numpy as jnp
from flax import struct

from mmjax.core.errors import UserError
from mmjax.nn.stream import Stream, concatenate


def pack(stream: Stream, count: int) -> Stream:
    """Pack a stream that has one item in each row into sequences of `count` items: `[B, S, D] -> [B / count, count S,
    D]`.

    An item's `position` begins where the one before could end at the latest.

    Raises:
      UserError: rows that `count` does not divide.
    """
    rows, length = stream.x_BSD.shape[:2]
    if count == 1:
        return stream
    check_rows(rows, count)

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
        # Rows of one sequence may see each other: those that do not exist must be marked by token now.
        valid_BS=joined(stream.mask_BS()) if has_mask else None,
        rows_B=None,
        attributes={name: joined(x) for name, x in attributes.items()},
        layout=stream.layout * count,
        item_segments=len(stream.layout),
        grids=stream.grids * count,
    )


def check_rows(rows: int, count: int) -> None:
    """Raise a `UserError` for rows that do not make whole sequences of `count` items."""
    if rows % count:
        raise UserError(
            f"{rows} rows do not make sequences of {count} items each. "
            f"Take batches (micro-batches, rows of a device) that {count} divides."
        )


def unpack(x_BSD: jax.Array, count: int) -> jax.Array:
    """Unpack to one item in each row."""
    rows, length = x_BSD.shape[:2]
    return x_BSD.reshape(rows * count, length // count, *x_BSD.shape[2:])


def positions(valid: Sequence[jax.Array], reversed_B: jax.Array) -> jax.Array:
    """Return the position of each token where the segments of a row are read in turn, without holes: int32 `[B, S]`.

    Args:
      valid: of each segment, in the order in which they lie, which tokens exist, `[B, L]`.
      reversed_B: rows that read them from the last to the first.
    """
    starts = _starts([v.sum(axis=1) for v in valid], reversed_B)
    parts = [
        start_B[:, None] + jnp.maximum(jnp.cumsum(v, axis=1) - 1, 0)
        for start_B, v in zip(starts, valid, strict=True)
    ]
    return jnp.concatenate(parts, axis=1).astype(jnp.int32)


def _starts(counts: Sequence[jax.Array], reversed_B: jax.Array) -> list[jax.Array]:
    """Return the number of tokens read before each segment of a row that has `counts` tokens in each."""
    starts = []
    for index in range(len(counts)):
        before, after = (
            sum(part, jnp.zeros_like(counts[0])) for part in (counts[:index], counts[index + 1 :])
        )
        starts.append(jnp.where(reversed_B, after, before))
    return starts


# --- shared slots ------------------------------------------------------------------------------


@struct.dataclass
class Region:
    """The slots `[R, T]` that the spans of one modality share, in sequences of N items.

    The spans lie one after another without gaps, each after the token of its beginning; empty slots come last.

    Attributes:
      item_RT: the item of each slot; an empty slot has that of the last item.
      index_RT: the index of a slot's token in its span; 0 is the token of its beginning.
      source_RT: which token of the item's arrays a slot holds.
      valid_RT: which slots hold a token.
      counts_RN: slots of each item.
      cut_RN: tokens of each item that found no slot.
    """

    item_RT: jax.Array
    index_RT: jax.Array
    source_RT: jax.Array
    valid_RT: jax.Array
    counts_RN: jax.Array
    cut_RN: jax.Array

    def pick(self, x_BL: jax.Array) -> jax.Array:
        """Return what each slot holds of the tokens' values `[B, L]`, `[R, T]`."""
        rows, count = self.counts_RN.shape
        flat = self.item_RT * x_BL.shape[1] + self.source_RT
        return jnp.take_along_axis(x_BL.reshape(rows, count * x_BL.shape[1]), flat, axis=1)

    def following(self, x_RT: jax.Array) -> jax.Array:
        """Sum over the tokens of each item, `[B]`, values `[R, T - 1]` of the slots from the second on."""
        own_RTN = self.item_RT[:, 1:, None] == jnp.arange(self.counts_RN.shape[1])
        return jnp.where(own_RTN, x_RT[..., None], 0).sum(axis=1).reshape(-1)

    def scored_RT(self) -> jax.Array:
        """Return which slots from the second on hold a token that the slot before predicts, `[R, T - 1]`."""
        return self.valid_RT[:, 1:] & (self.index_RT[:, 1:] > 0)


def share(
    valid_BL: jax.Array, count: int, capacity: int, exists_B: jax.Array | None = None
) -> Region:
    """Lay the valid tokens of `count` rows each into `capacity` slots (fewer, if all rows at full length need fewer).

    Where they are more than the slots, the longest rows are cut to one length, the largest that fits. As where a text
    is cut to its length, a row that is cut keeps its first tokens and its last.

    Args:
      valid_BL: which tokens exist; those of a row come first.
      exists_B: rows that exist; the others get no slot, not even for the token of the beginning. None means all.

    Raises:
      UserError: rows that `count` does not divide.
    """
    rows, length = valid_BL.shape
    check_rows(rows, count)
    slots = min(capacity, count * (length + 1))
    exists_B = jnp.ones(rows, bool) if exists_B is None else exists_B
    exists_RN = exists_B.reshape(rows // count, count)
    whole_RN = jnp.where(exists_RN, valid_BL.sum(axis=1, dtype=jnp.int32).reshape(-1, count), 0)
    kept_RN = _limited(whole_RN, slots - count, length)
    counts_RN = kept_RN + exists_RN
    ends_RN, slots_T = jnp.cumsum(counts_RN, axis=1), jnp.arange(slots, dtype=jnp.int32)
    ended_RTN = slots_T[None, :, None] >= ends_RN[:, None]
    item_RT = jnp.minimum(ended_RTN.sum(axis=2, dtype=jnp.int32), count - 1)

    def of_item(x_RN: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_RN, item_RT, axis=1)

    valid_RT = ~ended_RTN[..., -1]
    index_RT = jnp.where(valid_RT, slots_T - of_item(ends_RN - counts_RN), 0)
    is_last_RT = (index_RT == of_item(kept_RN)) & (index_RT > 0)
    source_RT = jnp.where(is_last_RT, of_item(whole_RN) - 1, jnp.maximum(index_RT - 1, 0))
    return Region(item_RT, index_RT, source_RT, valid_RT, counts_RN, whole_RN - kept_RN)


def _limited(counts_RN: jax.Array, room: int, most: int) -> jax.Array:
    """Cut counts of at most `most` to the largest common limit at which each row's sum is at most `room`."""
    limits = jnp.arange(most + 1, dtype=jnp.int32)
    fits_RL = jnp.minimum(counts_RN[..., None], limits).sum(axis=1) <= room
    limit_R = fits_RL.sum(axis=1, dtype=jnp.int32) - 1
    return jnp.minimum(counts_RN, limit_R[:, None])


def lay(
    streams: Mapping[str, Stream],
    regions: Mapping[str, Region],
    count: int,
    reversed_B: jax.Array,
) -> Stream:
    """Join the modalities of sequences of `count` items: of each its region, or a range of slots for each item.

    Args:
      streams: by modality, in the order in which an item's spans are read; a region's `[R, T, D]`, else `[B, S, D]`.
      regions: of the modalities whose spans share slots.
      reversed_B: items that are read from the last span to the first.

    Returns:
      A stream `[R, S, D]` whose `item` and `position` (without holes, over the whole sequence) are attributes.
    """
    valid = {
        m: s.mask_BS().reshape(-1, count, s.x_BSD.shape[1])
        for m, s in streams.items()
        if m not in regions
    }
    counts = [regions[m].counts_RN if m in regions else valid[m].sum(axis=2) for m in streams]
    whole_RN = sum(counts[1:], counts[0])
    before_RN = jnp.cumsum(whole_RN, axis=1) - whole_RN
    starts = _starts(counts, reversed_B.reshape(-1, count))
    laid = []
    for (name, stream), start_RN in zip(streams.items(), starts, strict=True):
        begin_RN = (before_RN + start_RN).astype(jnp.int32)
        if name in regions:
            laid.append(_of_region(stream, regions[name], begin_RN))
        else:
            laid.append(_of_slots(stream, valid[name], begin_RN))
    return concatenate(laid)


def _of_region(stream: Stream, region: Region, begin_RN: jax.Array) -> Stream:
    begin_RT = jnp.take_along_axis(begin_RN, region.item_RT, axis=1)
    attributes = {"item": region.item_RT, "position": begin_RT + region.index_RT}
    return replace(stream, attributes=attributes, coordinates={})


def _of_slots(stream: Stream, valid_RNS: jax.Array, begin_RN: jax.Array) -> Stream:
    rows, count, length = valid_RNS.shape
    index_RNS = jnp.maximum(jnp.cumsum(valid_RNS, axis=2) - 1, 0).astype(jnp.int32)
    item_S = jnp.repeat(jnp.arange(count, dtype=jnp.int32), length)
    return replace(
        pack(replace(stream, attributes={}, coordinates={}), count),
        item_segments=0,
        attributes={
            "item": jnp.broadcast_to(item_S, (rows, count * length)),
            "position": (begin_RN[..., None] + index_RNS).reshape(rows, count * length),
        },
    )


def lift(
    x_RSD: jax.Array, streams: Mapping[str, Stream], regions: Mapping[str, Region], count: int
) -> dict[str, jax.Array]:
    """Undo `lay` for the trunk's outputs: by modality `[R, T, D]` of a region, else `[B, S, D]`."""
    sizes = [s.x_BSD.shape[1] * (1 if m in regions else count) for m, s in streams.items()]
    parts = jnp.split(x_RSD, list(accumulate(sizes))[:-1], axis=1)
    return {m: x if m in regions else unpack(x, count) for m, x in zip(streams, parts, strict=True)}
