"""Transfusion (Zhou et al. 2024): text by its next token and an image by diffusion, in one pass of the trunk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from mmjax.diffusion import Diffusion, time_features
from mmjax.errors import UserError
from mmjax.layers.dense import Dense, Mlp
from mmjax.layers.masks import Causal, KeyIs, Same
from mmjax.layers.stream import Aux, Stream
from mmjax.modalities.image import unpatchify
from mmjax.modality import Input
from mmjax.model import Batch, Model
from mmjax.objective import Coupled, Loss, Represented, row_keys
from mmjax.objectives.masked_image import as_pixels, patch_side
from mmjax.parameters import declare

_FEATURES = 128  # of a time


class Adapter(nnx.Module):
    """What stands between the trunk and both kinds of output.

    `begin` is the token before a text; `features` and `time` tell the image's tokens how noisy they are; `logits` and
    `pixels` are the linear outputs.
    """

    def __init__(self, width: int, vocabulary: int, patch_values: int):
        self.begin = declare((width,), (None,), initializers.normal(0.1), decay=False)
        self.features = Dense(_FEATURES, width, (None, "embed"))
        self.time = Mlp(width, width)
        self.logits = Dense(width, vocabulary, ("embed", "vocabulary"), bias=False)
        self.pixels = Dense(width, patch_values, ("embed", None), init=initializers.zeros)

    def times(self, t_B: jax.Array) -> jax.Array:
        """What is added to each token of an image at time t, `[B, 1, D]`."""
        made: jax.Array = self.time(self.features(time_features(t_B, _FEATURES)))
        return made[:, None]


@dataclass(frozen=True, kw_only=True)
class Transfusion(Coupled):
    """`L = L_text + weight * L_image`: cross-entropy per token, squared error per image.

    The image's tokens are the stem's, of noised pixels in [-1, 1], plus a function of the time; they attend to one
    another and to what comes before, text causally. The loss couples rows only in that the text's mean is over the
    tokens of the whole batch.

    Attributes:
      text, image: the modalities.
      order: which comes first.
      weight: of the image's loss.
      target: what diffusion predicts, see `mmjax.diffusion`.
      limit: the largest time of an image that a text comes after (the paper: 0.5, so that there is something to tell).
      drop: share of rows that lose the text before their image, for guidance.
      steps, guidance: of the pictures that `show` draws.
    """

    text: str = "text"
    image: str = "image"
    order: tuple[str, ...] = ("text", "image")
    weight: float = 5.0
    target: str = "epsilon"
    limit: float = 0.5
    drop: float = 0.1
    steps: int = 25
    guidance: float = 3.0

    def __post_init__(self) -> None:
        Diffusion(self.target)
        if sorted(self.order) != sorted((self.text, self.image)):
            raise UserError(
                f"transfusion: order is {list(self.order)}; it names '{self.text}' and '{self.image}', once each."
            )
        for key in ("limit", "drop"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"transfusion: {key} is {getattr(self, key)}; expected [0, 1].")

    @property
    def _text_first(self) -> bool:
        return self.order[0] == self.text

    def reads(self) -> tuple[str, ...]:
        return self.order

    def heads(self, width: int, inputs: Mapping[str, Input]) -> dict[str, Any]:
        text: Any = inputs[self.text].modality
        image: Any = inputs[self.image].modality
        return {"adapter": Adapter(width, text.vocabulary, image.patch**2 * 3)}

    def _run(
        self,
        model: Model,
        inputs: Any,
        x_t: jax.Array,
        t_B: jax.Array,
        keep_B: jax.Array,
        key: jax.Array,
    ) -> tuple[jax.Array, jax.Array, Aux]:
        """Logits `[B, L, V]` of each next token, the prediction `[B, H, W, 3]`, and the trunk's `Aux`.

        `keep_B` says which rows see their text.
        """
        adapter = model.heads[self.head].adapter
        streams = {
            self.text: _begun(
                model.tokens(self.text, inputs[self.text]), adapter.begin[...], keep_B
            ),
            self.image: _timed(
                model.tokens(self.image, {"pixels": (x_t + 1) * 127.5}), adapter.times(t_B)
            ),
        }
        mask = Causal() | (Same("segment") & KeyIs("modality", self.image))
        stream, aux = model.encode([streams[name] for name in self.order], key, mask)
        length = streams[self.text].x_BSD.shape[1]
        parts = jnp.split(stream.x_BSD, [streams[self.order[0]].x_BSD.shape[1]], axis=1)
        out = dict(zip(self.order, parts, strict=True))
        logits_BLV = adapter.logits(out[self.text][:, : length - 1])
        patches_BSP = adapter.pixels(out[self.image])
        height, width = x_t.shape[1:3]
        predicted = unpatchify(patches_BSP, height, width, patch_side(patches_BSP))
        return logits_BLV, predicted, aux

    def represent(self, model: Model, batch: Batch, key: jax.Array) -> Represented:
        """Of each row: its text's summed cross-entropy and number of tokens, and its image's error."""
        inputs, diffusion = batch["inputs"], Diffusion(self.target)
        pixels = inputs[self.image]["pixels"]
        dtype = jnp.promote_types(model.heads[self.head].adapter.begin[...].dtype, jnp.float32)
        x = pixels.astype(dtype) / 127.5 - 1
        t_B, e, keep_B = self._draw(row_keys(batch, key), x)
        logits, predicted, aux = self._run(
            model, inputs, diffusion.noised(x, e, t_B), t_B, keep_B, key
        )
        told_BL = inputs[self.text]["valid"] & keep_B[:, None]
        losses_BL = jnp.where(told_BL, next_token_losses(logits, inputs[self.text]["ids"]), 0)
        wanted = diffusion.wanted(x, e, t_B)
        rows = {
            "text": losses_BL.sum(axis=1),
            "tokens": told_BL.sum(axis=1).astype(dtype),
            "image": jnp.square(predicted.astype(dtype) - wanted).mean(axis=(1, 2, 3)),
        }
        return Represented(rows, aux)

    def _draw(self, keys_B: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Each row's time, its noise, and whether it sees its text."""

        def of_row(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            time, noise, sees = jax.random.split(key, 3)
            t = jax.random.uniform(time, (), x.dtype)
            return t, jax.random.normal(noise, x.shape[1:], x.dtype), jax.random.uniform(sees)

        t_B, e, u_B = jax.vmap(of_row)(keys_B)
        if self._text_first:
            return t_B, e, u_B >= self.drop
        return self.limit * t_B, e, jnp.ones_like(u_B, bool)

    def compare(self, model: Model, rows: Any, batch: Batch) -> Loss:
        valid_B = batch["valid"].astype(rows["image"].dtype)
        text = (rows["text"] * valid_B).sum() / jnp.maximum((rows["tokens"] * valid_B).sum(), 1)
        image = (rows["image"] * valid_B).sum() / jnp.maximum(valid_B.sum(), 1)
        return Loss(text + self.weight * image, {"text": text, "image": image})

    def sample(
        self, model: Model, inputs: Any, shape: tuple[int, ...], key: jax.Array
    ) -> jax.Array:
        """Images `[B, H, W, 3]` in [-1, 1] for the texts in `inputs`, by guided diffusion (Ho and Salimans 2022)."""
        rows = shape[0]

        def predict(x_t: jax.Array, t: jax.Array) -> jax.Array:
            def given(sees: bool) -> jax.Array:
                keep_B = jnp.full((rows,), sees)
                return self._run(model, inputs, x_t, jnp.full((rows,), t), keep_B, key)[1]

            free = given(False)
            return free + self.guidance * (given(True) - free)

        noise = jax.random.normal(key, shape)
        return Diffusion(self.target).sample(predict, noise, self.steps, bound=1.0)

    def shows(self) -> tuple[str, ...]:
        return ("the text's picture", "drawn from the text") if self._text_first else ()

    def show(self, model: Model, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """Pictures of the data, and what the model draws from their texts."""
        pixels = batch["inputs"][self.image]["pixels"]
        drawn = self.sample(model, batch["inputs"], pixels.shape, key)
        return dict(zip(self.shows(), (pixels, as_pixels((drawn + 1) / 2)), strict=True))


def next_token_losses(logits_BLV: jax.Array, ids_BL: jax.Array) -> jax.Array:
    """`-log softmax(logits)[id]` of each token, `[B, L]`, in float32 or wider."""
    wide = logits_BLV.astype(jnp.promote_types(logits_BLV.dtype, jnp.float32))
    logs_BLV = jax.nn.log_softmax(wide, axis=-1)
    return -jnp.take_along_axis(logs_BLV, ids_BL[..., None], axis=-1)[..., 0]


def _begun(stream: Stream, begin_D: jax.Array, keep_B: jax.Array) -> Stream:
    """A text's stream with the token of its beginning; rows that are not kept have nothing else."""
    rows, length, width = stream.x_BSD.shape
    begin = jnp.broadcast_to(begin_D.astype(stream.x_BSD.dtype), (rows, 1, width))
    valid = stream.mask_BS() & keep_B[:, None]
    return replace(
        stream,
        x_BSD=jnp.concatenate([begin, stream.x_BSD], axis=1),
        valid_BS=jnp.concatenate([jnp.ones((rows, 1), bool), valid], axis=1),
        coordinates={},
        layout=((stream.layout[0][0], length + 1),),
    )


def _timed(stream: Stream, times_B1D: jax.Array) -> Stream:
    return replace(stream, x_BSD=stream.x_BSD + times_B1D.astype(stream.x_BSD.dtype))
