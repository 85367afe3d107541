"""Masked image modelling: encode a few patches, predict the pixels of the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from mmjax.core.batch import Batch
from mmjax.core.bounds import COUNT, check
from mmjax.core.errors import UserError
from mmjax.core.parameters import declare
from mmjax.modalities.base import Input
from mmjax.modalities.image import as_pixels, patch_side, patchify, unpatchify
from mmjax.model import Model
from mmjax.nn.dense import Dense
from mmjax.nn.positions import Positions
from mmjax.nn.stream import Stream, add_up
from mmjax.nn.trunk import GroupConfig, Trunk
from mmjax.objectives.base import Loss, Objective, Shows, refuse_drop, row_keys

HIDDEN = 0.6  # the grey of patches that a picture hides


class Decoder(nnx.Module):
    """A small trunk over the encoded tokens and mask tokens, then a linear map to pixels."""

    def __init__(
        self, width: int, inner: int, depth: int, heads: int, buckets: int, patch_values: int
    ):
        block = {"name": "transformer", "num_heads": heads, "mlp_dim": 4 * inner}
        self.embed = Dense(width, inner, ("embed", None))
        self.mask = declare((inner,), (None,), initializers.normal(0.02), decay=False)
        self.positions = Positions(inner, {"y": buckets, "x": buckets})
        self.trunk = Trunk([GroupConfig(depth, (block,))], inner, where="decoder")
        self.pixels = Dense(inner, patch_values, ("embed", None))

    def __call__(
        self,
        seen: Stream,
        index_BS: jax.Array,
        coordinates: Mapping[str, jax.Array],
        key: jax.Array,
    ) -> Any:
        """Return predictions `[B, S, patch_values]` in image order.

        `index_BS` is a permutation of the patches whose first entries are those of `seen`.
        """
        x_BKD = self.embed(seen.x_BSD)
        hidden = index_BS.shape[1] - x_BKD.shape[1]
        masks = jnp.broadcast_to(self.mask[...], (x_BKD.shape[0], hidden, x_BKD.shape[2]))
        x_BSD = jnp.concatenate([x_BKD, masks], axis=1)
        back_BS = jnp.argsort(index_BS, axis=1)
        x_BSD = jnp.take_along_axis(x_BSD, back_BS[..., None], axis=1)
        x_BSD = x_BSD + self.positions(coordinates).astype(x_BSD.dtype)
        layout = (("image", x_BSD.shape[1]),)
        stream, aux = self.trunk(Stream(x_BSD, layout=layout, rows_B=seen.rows_B), key)
        return self.pixels(stream.x_BSD), aux


@dataclass(frozen=True, kw_only=True)
class MaskedImage(Objective, Shows):
    """Masked autoencoding (He et al. 2022): the trunk sees the unmasked patches only.

    Attributes:
      modality: the image modality's name.
      mask_ratio: fraction of the patches that is hidden.
      decoder_width, decoder_depth, decoder_heads: size of the decoder.
    """

    modality: str = "image"
    mask_ratio: float = 0.75
    decoder_width: int = 128
    decoder_depth: int = 2
    decoder_heads: int = 4

    def __post_init__(self) -> None:
        check(
            self, mask_ratio="(0, 1)", decoder_width=COUNT, decoder_depth=COUNT, decoder_heads=COUNT
        )

    def reads(self) -> tuple[str, ...]:
        return (self.modality,)

    def check_inputs(self, inputs: Mapping[str, Input]) -> None:
        super().check_inputs(inputs)
        refuse_drop(self, inputs)

    def heads(self, width: int, inputs: Mapping[str, Input]) -> dict[str, Any]:
        image: Any = inputs[self.modality].modality
        values = image.patch**2 * 3
        return {
            "decoder": Decoder(
                width,
                self.decoder_width,
                self.decoder_depth,
                self.decoder_heads,
                image.max_positions,
                values,
            )
        }

    def _predict(self, model: Model, batch: Batch, key: jax.Array) -> Any:
        """Return predictions `[B, S, P]`, which patches `[B, S]` are hidden, and the `Aux` of trunk and decoder."""
        stream = model.tokens(self.modality, batch.inputs[self.modality])
        key_encode, key_decode = jax.random.split(key)
        tokens = stream.x_BSD.shape[1]
        keep = visible(tokens, self.mask_ratio)
        draw_BS = jax.vmap(lambda row: jax.random.uniform(row, (tokens,)))(row_keys(batch, key))
        index_BS = jnp.argsort(draw_BS, axis=1)
        seen, aux = model.encode([stream.take(index_BS[:, :keep])], key_encode)
        decoder = model.heads[self.head].decoder
        predicted_BSP, aux_decoder = decoder(seen, index_BS, stream.coordinates, key_decode)
        hidden_BS = jnp.argsort(index_BS, axis=1) >= keep
        return predicted_BSP, hidden_BS, (aux, aux_decoder)

    def __call__(self, model: Model, batch: Batch, key: jax.Array) -> Loss:
        predicted_BSP, hidden_BS, (aux, aux_decoder) = self._predict(model, batch, key)
        pixels = batch.inputs[self.modality]["pixels"]
        target_BSP = normalised_patches(pixels, patch_side(predicted_BSP), predicted_BSP.dtype)
        hidden_BS = hidden_BS & batch.valid[:, None]
        value = masked_error(predicted_BSP, target_BSP, hidden_BS)
        # What predicting each patch's mean would cost: below 1 where patches are blank.
        metrics = {"baseline": masked_error(jnp.zeros_like(target_BSP), target_BSP, hidden_BS)}
        total = add_up([aux, aux_decoder])
        return Loss(value + total.loss, {**metrics, **total.metrics()}, total.proposals)

    def shows(self) -> tuple[str, ...]:
        return (
            "picture",
            "what it sees",
            "what it predicts, given means and contrasts",
            "the means alone",
        )

    def show(self, model: Model, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """Return pictures uint8 `[B, H, W, 3]` whose hidden patches are filled in each of the ways of `shows`.

        A prediction has neither mean nor contrast (see `normalised_patches`). Both are borrowed from the
        picture, and these means alone are shown beside the prediction.
        """
        predicted_BSP, hidden_BS, _ = self._predict(model, batch, key)
        pixels = batch.inputs[self.modality]["pixels"]
        patch, (height, width) = patch_side(predicted_BSP), pixels.shape[1:3]
        whole_BSP = patchify(pixels.astype(predicted_BSP.dtype) / 255, patch)
        mean_BS1, variance_BS1 = moments(whole_BSP)
        fillings = (whole_BSP, HIDDEN, mean_BS1 + jnp.sqrt(variance_BS1) * predicted_BSP, mean_BS1)
        filled = (jnp.where(hidden_BS[..., None], filling, whole_BSP) for filling in fillings)
        return {
            name: as_pixels(unpatchify(x_BSP, height, width, patch))
            for name, x_BSP in zip(self.shows(), filled, strict=True)
        }


def visible(tokens: int, ratio: float) -> int:
    """Return the number of patches that stay: at least one stays and one is hidden."""
    if not 0 < ratio < 1 or tokens < 2:
        raise UserError(
            f"masked_image needs 0 < ratio < 1 and two patches; ratio {ratio}, patches {tokens}."
        )
    return min(max(round(tokens * (1 - ratio)), 1), tokens - 1)


def normalised_patches(
    pixels_BHWC: jax.Array, patch: int, dtype: Any, eps: float = 1e-6
) -> jax.Array:
    """Return the targets: each patch's values in [0, 1] less their mean, over `sqrt(variance + eps)`; `[B, S, P]`."""
    dtype = jnp.promote_types(dtype, jnp.float32)
    x_BSP = patchify(pixels_BHWC.astype(dtype) / 255, patch)
    mean_BS1, variance_BS1 = moments(x_BSP, eps)
    return (x_BSP - mean_BS1) * jax.lax.rsqrt(variance_BS1)


def moments(x_BSP: jax.Array, eps: float = 1e-6) -> tuple[jax.Array, jax.Array]:
    """Return each patch's mean, and its variance + eps; `[B, S, 1]`."""
    mean_BS1 = x_BSP.mean(axis=-1, keepdims=True)
    return mean_BS1, jnp.square(x_BSP - mean_BS1).mean(axis=-1, keepdims=True) + eps


def masked_error(
    predicted_BSP: jax.Array, target_BSP: jax.Array, hidden_BS: jax.Array
) -> jax.Array:
    """Return the squared error, mean over a patch's values, then over the hidden patches of valid rows."""
    error_BS = jnp.square(predicted_BSP.astype(target_BSP.dtype) - target_BSP).mean(axis=-1)
    return jnp.where(hidden_BS, error_BS, 0).sum() / jnp.maximum(hidden_BS.sum(), 1)
