"""A transformer block that reads a second stream as well."""

from __future__ import annotations

from dataclasses import replace

import jax
from flax import nnx, struct

from mmjax.errors import UserError
from mmjax.layers.attention import Attention, KeyValues
from mmjax.layers.dense import LayerNorm, Mlp
from mmjax.layers.masks import FULL, Pairs
from mmjax.layers.stream import Aux, Stream, no_aux
from mmjax.layers.transformer import empty


@struct.dataclass
class Held:
    """What the block remembers: keys and values of its `own` stream so far, those of the `context`, and which exist."""

    own: KeyValues
    context: KeyValues
    valid_BT: jax.Array | None


class CrossTransformer(nnx.Module):
    """`x += self(norm(x)); x += cross(norm(x), context); x += mlp(norm(x))` (Vaswani et al. 2017, pre-norm).

    The decoder's block: `self` keeps to the stream's mask, `cross` reads all tokens of its `context` that exist.

    Args:
      width: size of a token, of either stream.
      heads: attention heads, of either attention.
      hidden: size of the MLP's hidden layer.
      bias: biases in the MLP and norms.
      qk_norm: normalise queries and keys per head.
      kernel: what computes the attention, see `mmjax.layers.attend`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        bias: bool = False,
        qk_norm: bool = False,
        kernel: str = "auto",
    ):
        self.attention_norm = LayerNorm(width, bias)
        self.attention = Attention(width, heads, qk_norm, kernel)
        self.cross_norm = LayerNorm(width, bias)
        self.cross = Attention(width, heads, qk_norm, kernel)
        self.mlp_norm = LayerNorm(width, bias)
        self.mlp = Mlp(width, hidden, bias)

    def __call__(self, stream: Stream, key: jax.Array | None) -> tuple[Stream, Aux]:
        del key  # no dropout
        x, context = stream.x_BSD, _context(stream)
        x = x + self.attention(self.attention_norm(x), stream.pairs())
        x = self._rest(x, self.cross.key_values(context.x_BSD), context.valid_BS)
        return replace(stream, x_BSD=x), no_aux()

    def _rest(self, x: jax.Array, held: KeyValues, valid_BT: jax.Array | None) -> jax.Array:
        """After self-attention."""
        x = x + self.cross.read(self.cross_norm(x), held, Pairs(FULL, valid_BT=valid_BT))
        return x + self.mlp(self.mlp_norm(x))

    def begin(self, stream: Stream, slots: int) -> Held:
        """Empty slots for the stream's own tokens, and what of the context is read; see `Trunk.begin`."""
        context = _context(stream)
        own = empty(self.attention, stream, slots)
        return Held(own, self.cross.key_values(context.x_BSD), context.valid_BS)

    def extend(self, stream: Stream, held: Held, at: jax.Array | int) -> tuple[Stream, Held]:
        """The block for the tokens from `at` on, given those before, see `Trunk.extend`."""
        x, normed = stream.x_BSD, self.attention_norm(stream.x_BSD)
        own = held.own.put(self.attention.key_values(normed), at)
        x = x + self.attention.read(normed, own, stream.pairs_from(at, own.k_BTHK.shape[1]))
        x = self._rest(x, held.context, held.valid_BT)
        return replace(stream, x_BSD=x), replace(held, own=own)


def _context(stream: Stream) -> Stream:
    if stream.context is None:
        raise UserError(
            "layer cross_transformer reads a second stream, and none is given: it belongs in an objective's "
            "decoder, such as coca's `multimodal`."
        )
    return stream.context
