"""A transformer block that reads a second stream as well."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mmjax.blocks.transformer import (
    PARTS,
    LayerKeys,
    SharedKeys,
    TransformerBlock,
    add_sublayer,
    check_copies,
)
from mmjax.core.errors import UserError
from mmjax.nn.attention import Attention, KeyValues
from mmjax.nn.by_modality import SHARED, PerModality, apply_per_modality, modality_of
from mmjax.nn.masks import FULL, Pairs
from mmjax.nn.stream import Aux, Stream

_OF_CROSS = ("query", "key", "value", "out", "qk_norm")  # parts of the cross-attention
CROSS_PARTS = (*PARTS, *(f"cross_{part}" for part in _OF_CROSS), "cross_norm", "context_norm")


@struct.dataclass
class ContextCache:
    """Keys and values of a context, and which of its tokens exist."""

    key_values: KeyValues
    valid_BT: jax.Array | None


@struct.dataclass
class Cache:
    """The cache of the block: keys and values of the stream so far, and those of the `context`."""

    self_attention: KeyValues
    context: ContextCache


class ReadsContext:
    """The cross-attention of a module: `cross`, `cross_norm` and, where it has one, `context_norm`."""

    cross: Attention
    cross_norm: Any
    context_norm: Any

    def declare_cross(
        self,
        width: int,
        config: LayerKeys,
        context_norm: bool,
        order: str = "pre",
        per_modality: PerModality = SHARED,
    ) -> None:
        """Declare the parts; those of the attention have copies as `cross_PART` of `per_modality` has them."""
        self.cross_order = order
        self.cross_norm = per_modality("cross_norm", lambda: config.make_norm(width))
        self.context_norm = (
            per_modality("context_norm", lambda: config.make_norm(width)) if context_norm else None
        )
        self.cross = config.make_attention(width, _of_cross(per_modality))

    def read_context(self, context: Stream) -> ContextCache:
        """Return the keys and values of the context."""
        x_BTD, token_modalities = context.x_BSD, modality_of(context)
        if self.context_norm is not None:
            x_BTD = apply_per_modality(self.context_norm, x_BTD, token_modalities)
        return ContextCache(self.cross.key_values(x_BTD, token_modalities), context.valid_BS)

    def add_cross(
        self, stream: Stream, context: ContextCache, gate: jax.Array | None = None
    ) -> Stream:
        """Add the cross-attention's result, times `gate`; nothing to a row whose context has no token."""
        token_modalities, valid_BT = modality_of(stream), context.valid_BT

        def cross(x_BSD: jax.Array) -> jax.Array:
            pairs = Pairs(FULL, valid_BT=valid_BT)
            y_BSD = self.cross.read(x_BSD, context.key_values, pairs, token_modalities)
            return y_BSD if gate is None else gate * y_BSD

        x_BSD = add_sublayer(
            self.cross_order, stream.x_BSD, self.cross_norm, cross, token_modalities
        )
        if valid_BT is not None:  # without a key there is no bias either
            x_BSD = jnp.where(valid_BT.any(axis=1)[:, None, None], x_BSD, stream.x_BSD)
        return replace(stream, x_BSD=x_BSD)


def _of_cross(per_modality: PerModality) -> PerModality:
    """Return the copies of the cross-attention's parts, by the names that `Attention` has for them."""
    parts = tuple(part for part in _OF_CROSS if f"cross_{part}" in per_modality.parts)
    return PerModality(parts, per_modality.modalities) if parts else SHARED


@dataclass(frozen=True)
class CrossTransformer(SharedKeys):
    """`x += self(norm(x)); x += cross(norm(x), context); x += mlp(norm(x))` (Vaswani et al. 2017, pre-norm).

    The decoder's block: `self` keeps to the stream's mask, `cross` reads all tokens of its `context` that exist, and
    adds nothing to a row whose context has none. The tokens of both streams have the same width. Rotary embeddings are
    those of self-attention; `num_heads`, `qk_norm` and biases are those of either attention.

    Attributes:
      context_norm: a norm of the context before its keys and values (open_clip's CoCa).
      per_modality: which parts have a copy for which modalities, see `Transformer`; `cross_query`, `cross_out`,
        `cross_qk_norm` and `cross_norm` by the modalities of the stream, `cross_key`, `cross_value` and `context_norm`
        by those of the context. `cross_qk_norm` normalises both.
    """

    context_norm: bool = False
    per_modality: PerModality = SHARED

    def __post_init__(self) -> None:
        super().__post_init__()
        optional = {"qk_norm": "qk_norm", "cross_qk_norm": "qk_norm"}
        check_copies(self, CROSS_PARTS, **optional, context_norm="context_norm")

    def build(self, width: int) -> CrossTransformerBlock:
        """Return the block for tokens of a width."""
        return CrossTransformerBlock(width, self)


class CrossTransformerBlock(ReadsContext, TransformerBlock):
    """The block that `CrossTransformer` describes."""

    def __init__(self, width: int, config: CrossTransformer):
        super().__init__(width, config)
        self.declare_cross(
            width, config, config.context_norm, config.norm_position, config.per_modality
        )

    def __call__(self, stream: Stream, key: jax.Array | None) -> tuple[Stream, Aux]:
        stream = self._attend(stream)
        context = self.read_context(context_of(stream, "cross_transformer"))
        return self._feed_forward(self.add_cross(stream, context), key)

    def init_cache(self, stream: Stream, slots: int) -> Cache:
        """Return empty slots for the stream's own tokens, and the context's keys and values; see `Trunk.init_cache`."""
        context = self.read_context(context_of(stream, "cross_transformer"))
        return Cache(super().init_cache(stream, slots), context)

    def decode(self, stream: Stream, cache: Cache, at: jax.Array | int) -> tuple[Stream, Cache]:
        """Apply the block to the tokens from `at` on, given those before, see `Trunk.decode`."""
        stream, key_values = self._attend_from(stream, cache.self_attention, at)
        stream = self._feed_forward_from(self.add_cross(stream, cache.context))
        return stream, replace(cache, self_attention=key_values)


def context_of(stream: Stream, layer: str) -> Stream:
    """Return the stream's context.

    Raises:
      UserError: it has none; names the layer.
    """
    if stream.context is None:
        raise UserError(
            f"layer {layer} reads a second stream, and none is given: it belongs in an objective's "
            "decoder, such as coca's `multimodal`, or in a tower with `context`."
        )
    return stream.context
