"""The pre-norm transformer block."""

from __future__ import annotations

from dataclasses import replace

import jax
from flax import nnx

from mmjax.layers.attention import Attention
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
