"""The pre-norm transformer block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.errors import UserError
from mmjax.layers.attention import Attention, KeyValues
from mmjax.layers.by_modality import Kinds, Modalities, apply, kinds, untied
from mmjax.layers.dense import LayerNorm, Mlp
from mmjax.layers.stream import Aux, Stream, no_aux

PARTS = ("query", "key", "value", "out", "qk_norm", "attention_norm", "mlp_norm", "mlp")


class Transformer(nnx.Module):
    """`x += attention(norm(x)); x += mlp(norm(x))` (Xiong et al. 2020), for streams of any modality.

    Args:
      width: size of a token.
      heads: attention heads.
      hidden: size of the MLP's hidden layer.
      bias: biases in the MLP and norms.
      qk_norm: normalise queries and keys per head.
      kernel: what computes the attention, see `mmjax.layers.attend`; whatever it is, the model is the same.
      untie: which of `PARTS` have a copy per modality. All of them: Mixture-of-Transformers (Liang et al. 2024);
        the MLP (and norms): multiway blocks (VLMo, BEiT-3). Attention is over all tokens whatever is untied.
      modalities: which have one; see `mmjax.layers.by_modality`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        bias: bool = False,
        qk_norm: bool = False,
        kernel: str = "auto",
        untie: Sequence[str] = (),
        modalities: Modalities = (),
    ):
        if "qk_norm" in untie and not qk_norm:
            raise UserError("untie names 'qk_norm', which the block does not have: set qk_norm.")
        copies = untied(untie, modalities, PARTS)
        self.attention_norm = copies("attention_norm", lambda: LayerNorm(width, bias))
        self.attention = Attention(width, heads, qk_norm, kernel, copies)
        self.mlp_norm = copies("mlp_norm", lambda: LayerNorm(width, bias))
        self.mlp = copies("mlp", lambda: Mlp(width, hidden, bias))

    def __call__(self, stream: Stream, key: jax.Array) -> tuple[Stream, Aux]:
        del key  # no dropout
        x, of = stream.x_BSD, kinds(stream)
        x = x + self.attention(apply(self.attention_norm, x, of), stream.pairs(), kinds=of)
        return replace(stream, x_BSD=self._rest(x, of)), no_aux()

    def _rest(self, x: jax.Array, of: Kinds) -> jax.Array:
        """After attention."""
        return x + apply(self.mlp, apply(self.mlp_norm, x, of), of)

    def begin(self, stream: Stream, slots: int) -> KeyValues:
        """Empty slots for the tokens of a stream that comes part by part, see `Trunk.begin`."""
        return empty(self.attention, stream, slots)

    def extend(
        self, stream: Stream, held: KeyValues, at: jax.Array | int
    ) -> tuple[Stream, KeyValues]:
        """The block for the tokens from `at` on, given those before, see `Trunk.extend`."""
        x, of = stream.x_BSD, kinds(stream)
        normed = apply(self.attention_norm, x, of)
        held = held.put(self.attention.key_values(normed, of), at)
        pairs = stream.pairs_from(at, held.k_BTHK.shape[1])
        x = x + self.attention.read(normed, held, pairs, of)
        return replace(stream, x_BSD=self._rest(x, of)), held


def empty(attention: Attention, stream: Stream, slots: int) -> KeyValues:
    """Keys and values of `slots` tokens that are still to come, zeros."""
    made = jax.eval_shape(lambda x: attention.key_values(x, kinds(stream)), stream.x_BSD)
    return jax.tree.map(lambda s: jnp.zeros((s.shape[0], slots, *s.shape[2:]), s.dtype), made)
