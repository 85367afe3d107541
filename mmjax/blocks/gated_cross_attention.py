"""A layer that lets a trained stack read a second stream, without changing it at first (Flamingo)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from mmjax.blocks.cross_transformer import ContextCache, ReadsContext, context_of
from mmjax.blocks.transformer import LayerKeys
from mmjax.core.parameters import declare
from mmjax.nn.stream import Aux, Stream, no_aux


@dataclass(frozen=True)
class GatedCrossAttention(LayerKeys):
    """`x += tanh(a) cross(norm(x), context); x += tanh(b) mlp(norm(x))` (Alayrac et al. 2022, section 2.2).

    The gates a and b are 0 at first, so that the layer changes nothing; their gradients are not 0. It stands between
    the layers of a trained stack, whose tokens have the width of the `context`'s. A row whose context has no token gets
    nothing from the cross-attention.

    Attributes:
      context_norm: a norm of the context before its keys and values.
    """

    context_norm: bool = False

    def build(self, width: int) -> GatedCrossAttentionBlock:
        """Return the block for tokens of a width."""
        return GatedCrossAttentionBlock(width, self)


class GatedCrossAttentionBlock(ReadsContext, nnx.Module):
    """The block that `GatedCrossAttention` describes."""

    def __init__(self, width: int, config: GatedCrossAttention):
        self.declare_cross(width, config, config.context_norm)
        self.mlp_norm, self.mlp = config.make_norm(width), config.make_mlp(width)
        self.cross_gate, self.mlp_gate = (
            declare((1,), (None,), initializers.zeros, keep_dtype=True) for _ in range(2)
        )

    def __call__(self, stream: Stream, key: jax.Array | None) -> tuple[Stream, Aux]:
        del key  # no dropout
        context = self.read_context(context_of(stream, "gated_cross_attention"))
        return self._add_both(stream, context), no_aux()

    def _add_both(self, stream: Stream, context: ContextCache) -> Stream:
        dtype = stream.x_BSD.dtype
        stream = self.add_cross(stream, context, _gate(self.cross_gate, dtype))
        y_BSD = _gate(self.mlp_gate, dtype) * self.mlp(self.mlp_norm(stream.x_BSD))
        return replace(stream, x_BSD=stream.x_BSD + y_BSD)

    def init_cache(self, stream: Stream, slots: int) -> ContextCache:
        """Return the context's keys and values; see `Trunk.init_cache`."""
        del slots  # no token reads those before
        return self.read_context(context_of(stream, "gated_cross_attention"))

    def decode(
        self, stream: Stream, cache: ContextCache, at: jax.Array | int
    ) -> tuple[Stream, ContextCache]:
        """Apply the block to further tokens, see `Trunk.decode`."""
        del at
        return self._add_both(stream, cache), cache


def _gate(gate: nnx.Param, dtype: jnp.dtype) -> jax.Array:
    return jnp.tanh(gate[...]).astype(dtype)
