"""The transformer block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.core.bounds import AMOUNT, COUNT, POSITIVE, FieldError, check, check_choices
from mmjax.nn.attention import Attention, KeyValues
from mmjax.nn.attention_kernels import KERNELS
from mmjax.nn.by_modality import (
    SHARED,
    Call,
    PerModality,
    TokenModalities,
    apply_per_modality,
    call_part,
    check_parts,
    modality_of,
)
from mmjax.nn.dense import MLPS, NORMS, mlp_of, norm_of
from mmjax.nn.experts import Experts, ExpertsConfig, route
from mmjax.nn.stream import Aux, Stream, no_aux

PARTS = ("query", "key", "value", "out", "qk_norm", "attention_norm", "mlp_norm", "mlp")
ORDERS = ("pre", "post")


@dataclass(frozen=True)
class LayerKeys:
    """Keys of every block with attention and an MLP.

    Attributes:
      num_heads: attention heads.
      mlp_dim: size of the MLP's hidden layer.
      bias: biases in the MLP and layer norms (`rms` has none).
      qk_norm: normalise queries and keys per head: true for the block's `norm` without bias, or `layer` (with bias) or
        `rms`.
      attention_impl: what computes the attention, see `mmjax.nn.attention_kernels`; the model does not depend on
        it.
      norm: `layer` or `rms`, of all its norms.
      mlp: `gelu` (in its tanh form), `gelu_exact`, `quick_gelu` (`x sigmoid(1.702 x)`, OpenAI's CLIP), `swiglu` or
        `geglu`.
      attention_bias: biases of queries, keys, values and the attention's output. With `bias`, a ViT's block.
      eps: of all its norms.
    """

    num_heads: int
    mlp_dim: int
    bias: bool = False
    qk_norm: bool | str = False
    attention_impl: str = "auto"
    norm: str = "layer"
    mlp: str = "gelu"
    attention_bias: bool = False
    eps: float = 1e-6

    def __post_init__(self) -> None:
        check(self, num_heads=COUNT, mlp_dim=COUNT, eps=POSITIVE)
        check_choices(self, attention_impl=("auto", *KERNELS), norm=NORMS, mlp=MLPS)
        if isinstance(self.qk_norm, str):
            check_choices(self, qk_norm=NORMS)

    def make_norm(self, width: int) -> Any:
        return norm_of(self.norm, width, self.bias, self.eps)

    def make_mlp(self, width: int) -> Any:
        return mlp_of(self.mlp, width, self.mlp_dim, self.bias)

    def make_attention(
        self, width: int, per_modality: PerModality = SHARED, rotary: float = 0.0
    ) -> Attention:
        return Attention(
            width,
            self.num_heads,
            self.qk_norm,
            self.attention_impl,
            per_modality,
            self.norm,
            rotary,
            self.attention_bias,
            self.eps,
        )


@dataclass(frozen=True)
class SharedKeys(LayerKeys):
    """Keys of a transformer block, without those that give its parts copies; see `Transformer`.

    Attributes:
      norm_position: `pre` or `post`, where the norms are.
      rotary: the base of rotary embeddings of each token's `position`; 0 for none.
      experts: in place of the MLP, several of which a router chooses, see `mmjax.nn.experts`. Untied, each modality
        has experts of its own (MoMa, Lin et al. 2024).
    """

    norm_position: str = "pre"
    rotary: float = 0.0
    experts: ExpertsConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, rotary=AMOUNT)
        check_choices(self, norm_position=ORDERS)

    def make_mlp(self, width: int) -> Any:
        if self.experts is not None:
            return Experts(width, self.mlp_dim, self.experts, self.mlp, self.bias)
        return super().make_mlp(width)


@dataclass(frozen=True)
class Transformer(SharedKeys):
    """`x += attention(norm(x)); x += mlp(norm(x))` (Xiong et al. 2020), for streams of any modality.

    With order `post` it is `x += norm(attention(x)); x += norm(mlp(x))` (Swin v2; Chameleon). Llama's block has norm
    `rms`, MLP `swiglu`, rotary 10000.

    Attributes:
      per_modality: which of `query`, `key`, `value`, `out`, `qk_norm`, `attention_norm`, `mlp_norm` and `mlp` have a
        copy for which modalities, see `mmjax.nn.by_modality`. All of them: Mixture-of-Transformers (Liang et al. 2024);
        the MLP (and norms): multiway blocks (VLMo, BEiT-3). Attention is over all tokens whatever has copies.
    """

    per_modality: PerModality = SHARED

    def __post_init__(self) -> None:
        super().__post_init__()
        check_copies(self, PARTS, qk_norm="qk_norm")

    def build(self, width: int) -> TransformerBlock:
        """Return the block for tokens of a width."""
        return TransformerBlock(width, self)


def check_copies(config: Any, parts: tuple[str, ...], **optional: str) -> None:
    """Raise a `FieldError` unless `per_modality` names parts that the block has.

    Args:
      parts: all parts that a block may have.
      optional: part -> the key without which the block does not have it.
    """
    check_parts(config, parts)
    for part, key in optional.items():
        if part in config.per_modality.parts and not getattr(config, key):
            words = f"names '{part}', which the block does not have: set {key}."
            raise FieldError(config, "per_modality.parts", words)


def add_sublayer(
    order: str,
    x: jax.Array,
    norm: Any,
    part: Callable[[jax.Array], jax.Array],
    token_modalities: TokenModalities,
) -> jax.Array:
    """Return `x + part(norm(x))`, or `x + norm(part(x))` with order `post`."""
    if order == "pre":
        return x + part(apply_per_modality(norm, x, token_modalities))
    return x + apply_per_modality(norm, part(x), token_modalities)


class TransformerBlock(nnx.Module):
    """The block that `Transformer` describes."""

    def __init__(self, width: int, config: Any):
        copies = config.per_modality
        self.order = config.norm_position
        self.attention_norm = copies("attention_norm", lambda: config.make_norm(width))
        self.attention = config.make_attention(width, copies, config.rotary)
        self.mlp_norm = copies("mlp_norm", lambda: config.make_norm(width))
        self.mlp = copies("mlp", lambda: config.make_mlp(width))
        self.has_experts = config.experts is not None

    def __call__(self, stream: Stream, key: jax.Array | None) -> tuple[Stream, Aux]:
        return self._feed_forward(self._attend(stream), key)

    def _attend(self, stream: Stream) -> Stream:
        """Apply self-attention."""
        token_modalities = modality_of(stream)

        def attention(x: jax.Array) -> jax.Array:
            return self.attention(
                x,
                stream.pairs(),
                token_modalities=token_modalities,
                positions_BS=stream.positions(),
            )

        return replace(
            stream,
            x_BSD=self._add(stream.x_BSD, self.attention_norm, attention, token_modalities),
        )

    def _feed_forward(self, stream: Stream, key: jax.Array | None) -> tuple[Stream, Aux]:
        """Apply the MLP or the experts."""
        if not self.has_experts:
            return self._after_attention(stream, call_part), no_aux()
        auxes = []

        def experts(x: jax.Array) -> jax.Array:
            y, aux = route(self.mlp, replace(stream, x_BSD=x), key)
            auxes.append(aux)
            return y

        x = self._add(stream.x_BSD, self.mlp_norm, experts, modality_of(stream))
        return replace(stream, x_BSD=x), auxes[-1]

    def _add(
        self,
        x: jax.Array,
        norm: Any,
        part: Callable[[jax.Array], jax.Array],
        token_modalities: TokenModalities,
    ) -> jax.Array:
        return add_sublayer(self.order, x, norm, part, token_modalities)

    def _after_attention(self, stream: Stream, call: Call) -> Stream:
        """Apply the sublayers after attention; `call(mlp, x)` applies the MLP."""
        token_modalities = modality_of(stream)

        def mlp(x: jax.Array) -> jax.Array:
            return apply_per_modality(self.mlp, x, token_modalities, call)

        return replace(stream, x_BSD=self._add(stream.x_BSD, self.mlp_norm, mlp, token_modalities))

    def init_cache(self, stream: Stream, slots: int) -> Any:
        """Return empty slots for the tokens of a stream that comes part by part, see `Trunk.init_cache`."""
        if self.has_experts:  # the block names what it can continue from when it is traced
            jax.eval_shape(
                lambda x: apply_per_modality(self.mlp, x, modality_of(stream), _causal_call),
                stream.x_BSD,
            )
        return empty(self.attention, stream, slots)

    def decode(self, stream: Stream, cache: Any, at: jax.Array | int) -> tuple[Stream, Any]:
        """Apply the block to the tokens from `at` on, given those before, see `Trunk.decode`."""
        stream, cache = self._attend_from(stream, cache, at)
        return self._feed_forward_from(stream), cache

    def _attend_from(
        self, stream: Stream, cache: KeyValues, at: jax.Array | int
    ) -> tuple[Stream, KeyValues]:
        """Apply self-attention to the tokens from `at` on; return the cache with them."""
        x, token_modalities = stream.x_BSD, modality_of(stream)
        positions_BS = stream.positions(at)

        def attention(x: jax.Array) -> jax.Array:
            nonlocal cache
            cache = cache.put(self.attention.key_values(x, token_modalities, positions_BS), at)
            pairs = stream.pairs_from(at, cache.k_BTHK.shape[1])
            return self.attention.read(x, cache, pairs, token_modalities, positions_BS)

        x = self._add(x, self.attention_norm, attention, token_modalities)
        return replace(stream, x_BSD=x), cache

    def _feed_forward_from(self, stream: Stream) -> Stream:
        """Apply the MLP or the experts to tokens that come after others."""
        return self._after_attention(stream, _causal_call if self.has_experts else call_part)


def _causal_call(experts: Any, x: jax.Array) -> jax.Array:
    y: jax.Array = experts.causal_call(x)
    return y


def empty(attention: Attention, stream: Stream, slots: int) -> KeyValues:
    """Return keys and values of `slots` tokens that are still to come, zeros."""
    shapes = jax.eval_shape(
        lambda x: attention.key_values(x, modality_of(stream), stream.positions()), stream.x_BSD
    )
    return jax.tree.map(lambda s: jnp.zeros((s.shape[0], slots, *s.shape[2:]), s.dtype), shapes)
