"""CoCa (Yu et al. 2022): contrastive learning and captioning, in one pass of an encoder and a split text decoder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.nn import initializers

from mmjax.core.batch import Batch
from mmjax.core.bounds import AMOUNT, COUNT, POSITIVE, check
from mmjax.core.errors import UserError, nearest
from mmjax.core.parameters import declare
from mmjax.data.tokenizer import TokenIds
from mmjax.generation.decoding import Sampling, generate
from mmjax.modalities.base import Input
from mmjax.model import Model
from mmjax.nn.dense import Dense
from mmjax.nn.losses import next_token_losses
from mmjax.nn.masks import Causal
from mmjax.nn.pooler import Pooler
from mmjax.nn.stream import Aux, Stream, add_up
from mmjax.nn.towers import Widths
from mmjax.nn.trunk import GroupConfig, Trunk
from mmjax.objectives.base import Loss, Part, Represented, Shows, Writes, row_keys
from mmjax.objectives.contrastive import Contrastive, unit

POOLING = ("cascade", "parallel")


class TextDecoder(nnx.Module):
    """A text decoder in two halves: the first sees the text alone, the second the context as well.

    `unimodal` is causal; a learned token, `close`, is at the end of a text, reads all of it and is read by none of
    its tokens. `multimodal` continues from the unimodal layers' residual stream; `logits` are of the next token.
    """

    def __init__(
        self,
        width: int,
        vocabulary: int,
        unimodal: tuple[GroupConfig, ...],
        multimodal: tuple[GroupConfig, ...],
        remat: str,
        where: str,
        norm_eps: float = 1e-6,
    ):
        self.close = declare((width,), ("embed",), initializers.normal(0.1), decay=False)
        self.unimodal = Trunk(unimodal, width, remat, f"{where}.unimodal", norm_eps=norm_eps)
        self.multimodal = Trunk(multimodal, width, remat, f"{where}.multimodal", norm_eps=norm_eps)
        self.logits = Dense(width, vocabulary, ("embed", "vocabulary"), bias=False)

    def read(self, text: Stream, key: jax.Array | None) -> tuple[Read, Aux]:
        """Return the output of the unimodal layers for a text's tokens and for the one that closes it."""
        stream, aux = self.unimodal.layers(_closed(text, self.close[...]), key)
        tokens = replace(text, x_BSD=stream.x_BSD[:, :-1], coordinates={}, mask=Causal())
        return Read(tokens, self.unimodal.norm(stream.x_BSD[:, -1])), aux

    def predict(self, read: Read, context: Stream, key: jax.Array | None) -> tuple[jax.Array, Aux]:
        """Return logits `[B, S, V]` of the token after each of a text's tokens, given the context."""
        stream, aux = self.multimodal(replace(read.tokens, context=context), key)
        return self.logits(stream.x_BSD), aux

    def init_cache(self, like: Stream, context: Stream, slots: int) -> Any:
        """Return an empty cache for `decode` of up to `slots` tokens; `like` has some token's shape."""
        unimodal = self.unimodal.init_cache(like, slots)
        return unimodal, self.multimodal.init_cache(replace(like, context=context), slots)

    def decode(self, token: Stream, cache: Any, at: jax.Array) -> tuple[jax.Array, Any]:
        """Return logits `[B, V]` of the token after the one at index `at`, given those before."""
        unimodal, multimodal = cache
        stream, unimodal = self.unimodal.decode(replace(token, mask=Causal()), unimodal, at)
        stream, multimodal = self.multimodal.decode(stream, multimodal, at)
        return self.logits(self.multimodal.norm(stream.x_BSD))[:, -1], (unimodal, multimodal)


@struct.dataclass
class Read:
    """A text as the unimodal layers leave it: its tokens, and the vector of the whole `[B, D]`."""

    tokens: Stream
    whole_BD: jax.Array


@struct.dataclass
class Seen:
    """The other modality, pooled: tokens for the decoder, and the vector of the whole `[B, D]`."""

    context: Stream
    whole_BD: jax.Array


@dataclass(frozen=True, kw_only=True)
class Coca(Contrastive, Writes, Shows):
    """`L = contrastive_weight * L_con + caption_weight * L_cap` (equation 4).

    `L_con` compares the pooled modality with the text's closing token over the global batch, as `contrastive` does.
    `L_cap` is the cross-entropy of each next token, its end among them, mean over the tokens of all valid rows; padding
    does not count. A weight of 0 leaves that loss's part of the pass out.

    Attributes:
      modalities: the modality that is captioned, and the text.
      unimodal, multimodal: layers of the text decoder's halves; those of the second have cross-attention.
      queries: tokens that the decoder reads of the other modality.
      pooler_heads: attention heads of both poolers.
      pooling: `cascade`, where the vector of the whole is pooled from these tokens (the paper's choice), or `parallel`,
        where it is pooled from the encoder's.
      contrastive_weight, caption_weight: of the losses.
      remat: of the decoder, as `model.remat`.
      sampling: of captions.
      pooler_bias: biases of the poolers' projections.
      pooler_norms: normalise the poolers' queries, and what they read (open_clip).
      norm_eps: eps of the poolers' norms and of the last one of either half of the decoder.
    """

    modalities: tuple[str, ...] = ("image", "text")
    unimodal: tuple[GroupConfig, ...]
    multimodal: tuple[GroupConfig, ...]
    queries: int = 256
    pooler_heads: int = 4
    pooling: str = "cascade"
    contrastive_weight: float = 1.0
    caption_weight: float = 2.0
    remat: str = "none"
    sampling: Sampling = field(default_factory=Sampling)
    pooler_bias: bool = False
    pooler_norms: bool = False
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, pooler_heads=COUNT, queries=COUNT, norm_eps=POSITIVE)
        check(self, contrastive_weight=AMOUNT, caption_weight=AMOUNT)
        if self.poolers or self.projections:
            raise UserError(
                "coca: poolers and projections are those of contrastive; coca has its own. Remove them, see pooling."
            )
        if self.pooling not in POOLING:
            raise UserError(f"coca: pooling is '{self.pooling}'.{nearest(self.pooling, POOLING)}")
        if not (self.contrastive_weight or self.caption_weight):
            raise UserError(
                "coca: contrastive_weight and caption_weight are both 0; set one above 0."
            )

    @property
    def _text(self) -> str:
        return self.modalities[1]

    def heads(self, widths: Widths, inputs: Mapping[str, Input]) -> dict[str, Any]:
        width = widths.one(self.modalities, "coca")
        text: Any = inputs[self._text].modality
        halves = (self.unimodal, self.multimodal)

        def pooler(queries: int) -> Pooler:
            bias, norms = self.pooler_bias, self.pooler_norms
            return Pooler(
                width, self.pooler_heads, queries, bias=bias, norms=norms, eps=self.norm_eps
            )

        return {
            **super().heads(widths, inputs),
            "generative": pooler(self.queries),
            "contrastive": pooler(1),
            "decoder": TextDecoder(
                width, text.vocabulary, *halves, self.remat, "objective", self.norm_eps
            ),
        }

    # --- the pass ------------------------------------------------------------------------------

    def see(self, model: Model, arrays: Any, key: jax.Array | None) -> tuple[Seen, Aux]:
        """Return the modality that is captioned: encoded and pooled."""
        head = model.heads[self.head]
        stream, aux = model.encode([model.tokens(self.modalities[0], arrays)], key)
        context = head.generative(stream)
        pooled = head.contrastive(context if self.pooling == "cascade" else stream)
        return Seen(context, pooled.x_BSD[:, 0]), aux

    def read(self, model: Model, arrays: Any, key: jax.Array | None) -> tuple[Read, Aux]:
        """Return the text shifted by one, starting with the begin token: each place knows the tokens before it."""
        ids_BS = begun(arrays["ids"], self._special(model).begin)
        text = model.tokens(self._text, {**arrays, "ids": ids_BS})
        read: tuple[Read, Aux] = model.heads[self.head].decoder.read(text, key)
        return read

    def _special(self, model: Model) -> TokenIds:
        stem: Any = model.stems[self._text]
        ids: TokenIds = stem.token_ids
        return ids

    def _vector(self, model: Model, modality: str, whole_BD: jax.Array) -> jax.Array:
        joint_BE = model.heads[self.head][modality](whole_BD)
        return unit(joint_BE.astype(jnp.promote_types(joint_BE.dtype, jnp.float32)))

    def _embed(
        self, model: Model, modality: str, arrays: Mapping[str, jax.Array], key: jax.Array | None
    ) -> Any:
        of = self.read if modality == self._text else self.see
        embedded, aux = of(model, arrays, key)
        return self._vector(model, modality, embedded.whole_BD), aux

    def represent(self, model: Model, batch: Batch, key: jax.Array) -> Represented:
        """Return both vectors of each row, and its caption's summed cross-entropy and number of tokens."""
        shown, text = self.modalities
        keys = jax.random.split(key, 3)
        seen, aux_seen = self.see(model, batch.inputs[shown], keys[0])
        read, aux_read = self.read(model, batch.inputs[text], keys[1])
        rows, auxes = {}, [aux_seen, aux_read]
        if self.contrastive_weight:
            pair = (
                self._vector(model, shown, seen.whole_BD),
                self._vector(model, text, read.whole_BD),
            )
            rows["pair"] = pair
        if self.caption_weight:
            rows["caption"], aux = self._caption(model, seen, read, batch.inputs[text], keys[2])
            auxes.append(aux)
        return Represented(rows, add_up(auxes))

    def _caption(
        self, model: Model, seen: Seen, read: Read, arrays: Any, key: jax.Array | None
    ) -> tuple[tuple[jax.Array, jax.Array], Aux]:
        """Return each row's summed cross-entropy of its tokens, and their number: both `[B]`."""
        logits_BSV, aux = model.heads[self.head].decoder.predict(read, seen.context, key)
        losses_BS = next_token_losses(logits_BSV, arrays["ids"])
        cost_B = jnp.where(arrays["valid"], losses_BS, 0).sum(axis=1)
        return (cost_B, arrays["valid"].sum(axis=1).astype(cost_B.dtype)), aux

    def compare(self, model: Model, rows: Any, batch: Batch) -> Loss:
        value = baseline = jnp.zeros((), jnp.float32)
        metrics, parts = dict[str, jax.Array](), dict[str, Part]()
        if self.contrastive_weight:
            pair = super().compare(model, rows["pair"], batch)
            value = value + self.contrastive_weight * pair.value
            baseline = baseline + self.contrastive_weight * pair.metrics["baseline"]
            metrics = {**pair.metrics, "contrastive": pair.value}
            metrics["baseline contrastive"] = pair.metrics["baseline"]
            parts["contrastive"] = replace(pair.parts[""], weight=self.contrastive_weight)
        if self.caption_weight:
            cost_B, tokens_B = (jnp.where(batch.valid, x, 0) for x in rows["caption"])
            caption = cost_B.sum() / jnp.maximum(tokens_B.sum(), 1)
            value = value + self.caption_weight * caption
            vocabulary = model.heads[self.head].decoder.logits.kernel[...].shape[-1]
            baseline = baseline + self.caption_weight * math.log(vocabulary)
            metrics["caption"] = caption
            metrics["baseline caption"] = jnp.asarray(math.log(vocabulary), caption.dtype)
            parts["caption"] = Part(self.caption_weight, tokens_B.sum())
        return Loss(value, {**metrics, "baseline": baseline}, parts=parts)

    # --- captions ------------------------------------------------------------------------------

    def captions(
        self, model: Model, arrays: Mapping[str, jax.Array], length: int, keys_B: jax.Array
    ) -> jax.Array:
        """Return the captions of the first modality's arrays, int32 `[B, length]`, see `generate`."""
        seen, _ = self.see(model, arrays, None)
        return self._write(model, seen, length, keys_B)

    def _write(self, model: Model, seen: Seen, length: int, keys_B: jax.Array) -> jax.Array:
        decoder = model.heads[self.head].decoder
        ids_BS = jnp.zeros((keys_B.shape[0], length + 1), jnp.int32)
        like = self._token(model, ids_BS, 0)
        cache = decoder.init_cache(like, seen.context, length)

        def step(ids_BS: jax.Array, at: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
            after: tuple[jax.Array, Any] = decoder.decode(self._token(model, ids_BS, at), cache, at)
            return after

        return generate(step, cache, keys_B, length, self.sampling, self._special(model))

    def _token(self, model: Model, ids_BS: jax.Array, at: jax.Array | int) -> Stream:
        """Return the stem's token at index `at`, alone."""
        ids_BS = ids_BS[:, :-1]
        text = model.tokens(self._text, {"ids": ids_BS, "valid": jnp.ones_like(ids_BS, bool)})
        token = text.take(jnp.full((ids_BS.shape[0], 1), at))
        return Stream(token.x_BSD, layout=token.layout)

    def writes(self) -> tuple[str, ...]:
        return self.modalities

    def write(self, model: Model, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        shown, text = self.modalities
        reference = batch.inputs[text]
        seen, _ = self.see(model, batch.inputs[shown], None)
        read, _ = self.read(model, reference, None)
        (cost_B, tokens_B), _ = self._caption(model, seen, read, reference, None)
        length = reference["ids"].shape[1]
        return {
            "written": self._write(model, seen, length, row_keys(batch, key)),
            "wanted": jnp.where(reference["valid"], reference["ids"], self._special(model).pad),
            "cost": cost_B,
            "tokens": tokens_B,
        }

    def shows(self) -> tuple[str, ...]:
        return (self.modalities[0], "its text", "the text it writes")

    def show(self, model: Model, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """Return the pictures, if it captions pictures, and beside each text the one that the model generates."""
        texts = self.write(model, batch, key)
        shown, reference, written = self.shows()
        panels = {reference: texts["wanted"], written: texts["written"]}
        arrays = batch.inputs[shown]
        return {shown: arrays["pixels"], **panels} if "pixels" in arrays else panels


def begun(ids_BS: jax.Array, begin: int) -> jax.Array:
    """Return the begin token, then all ids but the last: the token before each."""
    return jnp.pad(ids_BS[:, :-1], ((0, 0), (1, 0)), constant_values=begin)


def _closed(text: Stream, close_D: jax.Array) -> Stream:
    """Return a text's stream with a token at its end, which is always there; causal."""
    rows, length, width = text.x_BSD.shape
    close = jnp.broadcast_to(close_D.astype(text.x_BSD.dtype), (rows, 1, width))
    return Stream(
        jnp.concatenate([text.x_BSD, close], axis=1),
        jnp.concatenate([text.mask_BS(), jnp.ones((rows, 1), bool)], axis=1),
        layout=((text.layout[0][0], length + 1),),
        mask=Causal(),
        rows_B=text.rows_B,
    )
