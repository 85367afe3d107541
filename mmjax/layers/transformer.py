"""The pre-norm transformer block."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.layers.attention import Attention, KeyValues
from mmjax.layers.dense import LayerNorm, Mlp
from mmjax.layers.stream import Aux, Stream, no_aux


class Transformer(nnx.Module):
    """`x += attention(norm(x)); x += mlp(norm(x))` (Xiong et al. 2020), for streams of any modality.

    Args:
      width: size of a token.
      heads: attention heads.
      hidden: size of the MLP's hidden layer.
      bias: biases in the MLP and norms.
      qk_norm: normalise queries and keys per head.
      kernel: what computes the attention, see `mmjax.layers.attend`; whatever it is, the model is the same.
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
        self.mlp_norm = LayerNorm(width, bias)
        self.mlp = Mlp(width, hidden, bias)

    def __call__(self, stream: Stream, key: jax.Array) -> tuple[Stream, Aux]:
        del key  # no dropout
        x = stream.x_BSD
        x = x + self.attention(self.attention_norm(x), stream.pairs())
        x = x + self.mlp(self.mlp_norm(x))
        return replace(stream, x_BSD=x), no_aux()

    def begin(self, stream: Stream, slots: int) -> KeyValues:
        """Empty slots for the tokens of a stream that comes part by part, see `Trunk.begin`."""
        return empty(self.attention, stream, slots)

    def extend(
        self, stream: Stream, held: KeyValues, at: jax.Array | int
    ) -> tuple[Stream, KeyValues]:
        """The block for the tokens from `at` on, given those before, see `Trunk.extend`."""
        x, normed = stream.x_BSD, self.attention_norm(stream.x_BSD)
        held = held.put(self.attention.key_values(normed), at)
        pairs = stream.pairs_from(at, held.k_BTHK.shape[1])
        x = x + self.attention.read(normed, held, pairs)
        x = x + self.mlp(self.mlp_norm(x))
        return replace(stream, x_BSD=x), held


def empty(attention: Attention, stream: Stream, slots: int) -> KeyValues:
    """Keys and values of `slots` tokens that are still to come, zeros."""
    made = jax.eval_shape(attention.key_values, stream.x_BSD[:, :1])
    return jax.tree.map(lambda s: jnp.zeros((s.shape[0], slots, *s.shape[2:]), s.dtype), made)
