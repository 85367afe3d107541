"""Streams of tokens: what flows between stems, trunk and objectives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field, replace
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mmjax.core.errors import UserError
from mmjax.core.parameters import Rows
from mmjax.nn.masks import FULL, Mask, Pairs, code


@struct.dataclass
class Stream:
    """Tokens of one or several modalities.

    Attributes:
      x_BSD: token vectors.
      valid_BS: which tokens of a row exist (bool); None means all.
      rows_B: which rows exist (bool); None means all. A row that does not exist has no effect outside of itself: its
        tokens take no expert's slot and count in no statistic. Whoever makes a stream of other tokens for the same
        rows passes it on.
      coordinates: per-axis positions in [0, 1) of each token, `dict[axis, float[B or 1, S]]`.
      layout: static segments (modality, length) in the order of the tokens.
      attributes: what a mask reads of each token in addition to the layout, `dict[name, int[B or 1, S]]`.
      mask: which tokens may attend to which.
      context: tokens that layers with cross-attention also read.
      item_segments: how many segments of the layout make an item, of sequences that hold several; 0 for one item.
      filled_BT: of a stream that comes part by part, which slots hold a token, with those of this part; None for all
        up to its own.
    """

    x_BSD: jax.Array
    valid_BS: jax.Array | None = None
    coordinates: dict[str, jax.Array] = field(default_factory=dict)
    layout: tuple[tuple[str, int], ...] = struct.field(pytree_node=False, default=())
    attributes: dict[str, jax.Array] = field(default_factory=dict)
    mask: Mask = struct.field(pytree_node=False, default=FULL)
    context: Stream | None = None
    item_segments: int = struct.field(pytree_node=False, default=0)
    filled_BT: jax.Array | None = None
    rows_B: jax.Array | None = None

    def mask_BS(self) -> jax.Array:
        """Return which tokens exist, without those of rows that do not exist."""
        shape = self.x_BSD.shape[:2]
        valid_BS = jnp.ones(shape, bool) if self.valid_BS is None else self.valid_BS
        return valid_BS if self.rows_B is None else valid_BS & self.rows_B[:, None]

    def pairs(self) -> Pairs:
        """Return the pairs for `attend`; they lie within a row, so `rows_B` is not used.

        Static attributes are `index`, `position` (the index), `segment` (of the layout), `modality` and `item`.
        """
        attributes = {**self._static(), **self.attributes}
        return Pairs(self.mask, attributes, attributes, self.valid_BS)

    def _static(self) -> dict[str, np.ndarray]:
        index = np.arange(self.x_BSD.shape[1])[None]
        static = {"index": index, "position": index}
        if self.layout:
            names, lengths = zip(*self.layout, strict=True)
            segments = np.arange(len(names))
            static["segment"] = np.repeat(segments, lengths)[None]
            static["modality"] = np.repeat([code(name) for name in names], lengths)[None]
            if self.item_segments:
                static["item"] = np.repeat(segments // self.item_segments, lengths)[None]
        return static

    def positions(self, at: jax.Array | int = 0) -> jax.Array:
        """Return the `position` of each token, int `[B or 1, S]`; by default its index, `at` being the first."""
        index = (at + jnp.arange(self.x_BSD.shape[1]))[None]
        return self.attributes.get("position", index)

    def items(self) -> jax.Array | np.ndarray | None:
        """Return the `item` of each token, int `[B or 1, S]`; None where there is one."""
        return self.attributes["item"] if "item" in self.attributes else self._static().get("item")

    def pairs_from(self, at: jax.Array | int, slots: int) -> Pairs:
        """Return the pairs of tokens from `at` on of `slots`; later tokens do not exist yet.

        Only the position is known of the tokens before, so a mask may read that alone.
        """
        positions = {
            "queries": (at + jnp.arange(self.x_BSD.shape[1]))[None],
            "keys": jnp.arange(slots)[None],
        }
        attributes = {side: {"position": p} for side, p in positions.items()}
        valid = positions["keys"] < at + self.x_BSD.shape[1]
        if self.filled_BT is not None:
            valid = valid & self.filled_BT
        return Pairs(self.mask, attributes["queries"], attributes["keys"], valid)

    def take(self, index_BK: jax.Array) -> Stream:
        """Return the tokens at `index_BK` of a stream of one modality, in that order."""

        def pick(x: jax.Array) -> jax.Array:
            x = jnp.broadcast_to(x, (index_BK.shape[0], *x.shape[1:]))
            return jnp.take_along_axis(
                x, index_BK.reshape(index_BK.shape + (1,) * (x.ndim - 2)), axis=1
            )

        return replace(
            self,
            x_BSD=pick(self.x_BSD),
            valid_BS=None if self.valid_BS is None else pick(self.valid_BS),
            coordinates={axis: pick(c) for axis, c in self.coordinates.items()},
            attributes={name: pick(a) for name, a in self.attributes.items()},
            layout=((self.layout[0][0], index_BK.shape[1]),),
        )


def concatenate(streams: list[Stream]) -> Stream:
    """Return one stream of all tokens, in order. Coordinates end here: trunks do not read them.

    Raises:
      ValueError: streams of different attributes or masks, or with a context.
    """
    if len(streams) == 1:
        return streams[0]
    names, masks = {tuple(sorted(s.attributes)) for s in streams}, {s.mask for s in streams}
    if len(names) > 1 or len(masks) > 1:
        raise ValueError(f"streams of different attributes or masks: {names}, {masks}")
    if any(s.context is not None for s in streams):
        raise ValueError("streams with a context are not joined: give it to the whole")
    rows = streams[0].x_BSD.shape[0]
    whole = all(s.valid_BS is None for s in streams)
    exist = [s.rows_B for s in streams if s.rows_B is not None]
    return Stream(
        jnp.concatenate([s.x_BSD for s in streams], axis=1),
        None if whole else jnp.concatenate([s.mask_BS() for s in streams], axis=1),
        layout=tuple(segment for s in streams for segment in s.layout),
        attributes={
            name: jnp.concatenate(
                [
                    jnp.broadcast_to(a, (rows, a.shape[1]))
                    for a in (s.attributes[name] for s in streams)
                ],
                axis=1,
            )
            for name in streams[0].attributes
        },
        mask=streams[0].mask,
        rows_B=reduce(jnp.logical_and, exist) if exist else None,
    )


def segments(stream: Stream) -> list[Stream]:
    """Return a stream of its own for each segment of the layout; each attends within itself."""
    result, start = [], 0
    for modality, length in stream.layout:
        at = slice(start, start + length)
        valid = None if stream.valid_BS is None else stream.valid_BS[:, at]
        segment = Stream(
            stream.x_BSD[:, at], valid, layout=((modality, length),), rows_B=stream.rows_B
        )
        result.append(segment)
        start += length
    return result


def fold(key: jax.Array | None, number: int | jax.Array) -> jax.Array | None:
    """Fold a number into a key by `jax.random.fold_in`; None (nothing is drawn) stays None."""
    return None if key is None else jax.random.fold_in(key, number)


def mean_pool(stream: Stream) -> jax.Array:
    """Return the mean over the valid tokens, `[B, D]`; zero if an example has none."""
    if stream.valid_BS is None:
        return stream.x_BSD.mean(axis=1)
    weight_BS1 = stream.valid_BS[..., None].astype(stream.x_BSD.dtype)
    return (stream.x_BSD * weight_BS1).sum(axis=1) / jnp.maximum(weight_BS1.sum(axis=1), 1)


@struct.dataclass
class Aux:
    """Auxiliary outputs of a block; every field is present (zero) so that scans keep one structure.

    Attributes:
      loss: auxiliary loss to add, float32 scalar.
      statistics: name -> (sum, count), float32 scalars, reported as sum / count.
      proposals: statistics of buffers, by `Buffer.propose`; the step settles them.
      usage: modality -> how many of its tokens each expert has, float32 `[E]`, in a block; outside of the layers,
        by layer and modality, `"006 image"`.
    """

    loss: jax.Array
    statistics: dict[str, tuple[jax.Array, jax.Array]] = field(default_factory=dict)
    proposals: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, jax.Array] = field(default_factory=dict)

    def metrics(self) -> dict[str, jax.Array]:
        """Return the statistics as what they are reported as; and each expert's share, `usage LAYER MODALITY` `[E]`."""
        means = {name: total / jnp.maximum(n, 1) for name, (total, n) in self.statistics.items()}
        shares = {f"usage {n}": x / jnp.maximum(x.sum(), 1e-9) for n, x in self.usage.items()}
        return {**means, **shares}


def no_aux() -> Aux:
    return Aux(loss=jnp.zeros((), jnp.float32))


def add_up(auxes: Sequence[Aux]) -> Aux:
    """Add losses, statistics, usage and proposals."""
    total = Aux(loss=sum((a.loss for a in auxes[1:]), auxes[0].loss))
    for aux in auxes:
        for name, (value, count) in aux.statistics.items():
            before = total.statistics.get(name, (0.0, 0.0))
            total.statistics[name] = (before[0] + value, before[1] + count)
        for name, value in aux.usage.items():
            total.usage[name] = total.usage.get(name, jnp.zeros_like(value)) + value
    return replace(total, proposals=add_proposals([aux.proposals for aux in auxes]))


def add_proposals(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Add the statistics of each buffer.

    Raises:
      UserError: a second proposal to a buffer that takes the rows of one.
    """
    total: dict[str, Any] = {}
    for proposals in parts:
        for name, statistics in proposals.items():
            if name not in total:
                total[name] = statistics
            elif isinstance(statistics, Rows):
                raise UserError(
                    f"buffer '{name}' is replaced by the rows of one proposal, and this step makes a second one. "
                    "Propose once, or declare it with statistics that add up."
                )
            else:
                total[name] = jax.tree.map(jnp.add, total[name], statistics)
    return total
