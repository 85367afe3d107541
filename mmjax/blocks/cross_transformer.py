"""A transformer block that reads a second stream as well."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
from flax import nnx, struct

from mmjax.blocks.transformer import empty
from mmjax.core.bounds import COUNT, POSITIVE, check, check_choices
from mmjax.core.errors import UserError
from mmjax.nn.attention import Attention, KeyValues
from mmjax.nn.attention_kernels import KERNELS
from mmjax.nn.dense import NORMS, Mlp, norm_of
from mmjax.nn.masks import FULL, Pairs
from mmjax.nn.stream import Aux, Stream, no_aux


@struct.dataclass
class Cache:
    """The cache of the block: keys and values of the stream so far, those of the `context`, and which exist."""

    self_attention: KeyValues
    context: KeyValues
    valid_BT: jax.Array | None


@dataclass(frozen=True)
class CrossTransformer:
    """`x += self(norm(x)); x += cross(norm(x), context); x += mlp(norm(x))` (Vaswani et al. 2017, pre-norm).

    The decoder's block: `self` keeps to the stream's mask, `cross` reads all tokens of its `context` that exist. The
    tokens of both streams have the same width.

    Attributes:
      num_heads: attention heads, of either attention.
      mlp_dim: size of the MLP's hidden layer.
      bias: biases in the MLP and norms.
      qk_norm: normalise queries and keys per head, see `Attention`.
      attention_impl: what computes the attention, see `mmjax.nn.attention_kernels`.
      attention_bias: biases of queries, keys, values and outputs, of either attention.
      eps: of all its norms.
      context_norm: a norm of the context before its keys and values (open_clip's CoCa).
    """

    num_heads: int
    mlp_dim: int
    bias: bool = False
    qk_norm: bool | str = False
    attention_impl: str = "auto"
    attention_bias: bool = False
    eps: float = 1e-6
    context_norm: bool = False

    def __post_init__(self) -> None:
        check(self, num_heads=COUNT, mlp_dim=COUNT, eps=POSITIVE)
        check_choices(self, attention_impl=("auto", *KERNELS))
        if isinstance(self.qk_norm, str):
            check_choices(self, qk_norm=NORMS)

    def build(self, width: int) -> CrossTransformerBlock:
        """Return the block for tokens of a width."""
        return CrossTransformerBlock(width, self)


class CrossTransformerBlock(nnx.Module):
    """The block that `CrossTransformer` describes."""

    def __init__(self, width: int, config: CrossTransformer):
        def norm() -> Any:
            return norm_of("layer", width, config.bias, config.eps)

        def attention() -> Attention:
            biases, eps = config.attention_bias, config.eps
            heads, qk_norm, kernel = config.num_heads, config.qk_norm, config.attention_impl
            return Attention(width, heads, qk_norm, kernel, bias=biases, eps=eps)

        self.attention_norm, self.cross_norm, self.mlp_norm = (norm() for _ in range(3))
        self.context_norm = norm() if config.context_norm else None
        self.attention, self.cross = attention(), attention()
        self.mlp = Mlp(width, config.mlp_dim, config.bias)

    def __call__(self, stream: Stream, key: jax.Array | None) -> tuple[Stream, Aux]:
        del key  # no dropout
        x, context = stream.x_BSD, _context(stream)
        x = x + self.attention(self.attention_norm(x), stream.pairs())
        x = self._after_attention(x, self._key_values(context), context.valid_BS)
        return replace(stream, x_BSD=x), no_aux()

    def _after_attention(
        self, x: jax.Array, key_values: KeyValues, valid_BT: jax.Array | None
    ) -> jax.Array:
        """Apply the sublayers after self-attention."""
        x = x + self.cross.read(self.cross_norm(x), key_values, Pairs(FULL, valid_BT=valid_BT))
        return x + self.mlp(self.mlp_norm(x))

    def init_cache(self, stream: Stream, slots: int) -> Cache:
        """Return empty slots for the stream's own tokens, and the context's keys and values; see `Trunk.init_cache`."""
        context = _context(stream)
        key_values = empty(self.attention, stream, slots)
        return Cache(key_values, self._key_values(context), context.valid_BS)

    def _key_values(self, context: Stream) -> KeyValues:
        """Return the keys and values of the context."""
        norm = self.context_norm
        return self.cross.key_values(context.x_BSD if norm is None else norm(context.x_BSD))

    def decode(self, stream: Stream, cache: Cache, at: jax.Array | int) -> tuple[Stream, Cache]:
        """Apply the block to the tokens from `at` on, given those before, see `Trunk.decode`."""
        x, normed = stream.x_BSD, self.attention_norm(stream.x_BSD)
        key_values = cache.self_attention.put(self.attention.key_values(normed), at)
        x = x + self.attention.read(
            normed, key_values, stream.pairs_from(at, key_values.k_BTHK.shape[1])
        )
        x = self._after_attention(x, cache.context, cache.valid_BT)
        return replace(stream, x_BSD=x), replace(cache, self_attention=key_values)


def _context(stream: Stream) -> Stream:
    if stream.context is None:
        raise UserError(
            "layer cross_transformer reads a second stream, and none is given: it belongs in an objective's "
            "decoder, such as coca's `multimodal`, or in a tower with `context`."
        )
    return stream.context
