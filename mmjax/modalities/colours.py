"""Pictures as sequences of discrete colours (iGPT, Chen et al. 2020): a token for each pixel of a small picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers

from mmjax.core.bounds import COUNT, check
from mmjax.core.config import FREE
from mmjax.core.errors import UserError
from mmjax.core.parameters import declare
from mmjax.core.sharding import constrain
from mmjax.data import pictures
from mmjax.data.tokenizer import TokenIds
from mmjax.modalities.base import ArraySpec, Modality
from mmjax.modalities.image import Image, ImageInput, check_view
from mmjax.nn.positions import Placed, Positions, Table, grid, place
from mmjax.nn.stream import Stream


@dataclass(frozen=True)
class Colours(Placed, Modality[ImageInput]):
    """RGB pictures, each pixel one of `levels ** 3` colours.

    The paper's 512 colours are learned by k-means; these are a grid, so that no file comes with them.

    Attributes:
      levels: of each of red, green and blue.
      max_positions: position buckets per axis; the sides of the largest picture at least.
      max_pixels: see `image`.
      positions, positions_scale: see `mmjax.nn.positions.Placed`; without positions, a picture has any size.
    """

    Input = ImageInput
    levels: int = 8
    max_positions: int = 64
    max_pixels: int = field(default=pictures.MAX_PIXELS, metadata=FREE)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, max_positions=COUNT, max_pixels=pictures.PIXELS)
        if not 2 <= self.levels <= 256:
            raise UserError(f"colours: levels is {self.levels}; expected 2 to 256.")

    @property
    def vocabulary(self) -> int:
        """The number of colours."""
        return self.levels**3

    def stem(self, width: int) -> nnx.Module:
        buckets = {"y": self.max_positions, "x": self.max_positions}
        return ColoursStem(self.levels, width, self.make_positions(width, buckets))

    def arrays(self, settings: ImageInput) -> ArraySpec:
        check_view(settings)
        if settings.size > self.limit(self.max_positions):
            raise UserError(
                f"colours: size is {settings.size}; expected 1 to the {self.max_positions} position buckets."
            )
        shape = (settings.size**2,)
        return {
            "ids": jax.ShapeDtypeStruct(shape, np.int32),
            "valid": jax.ShapeDtypeStruct(shape, np.bool_),
        }

    def preprocess(
        self, settings: ImageInput, value: Any, rng: np.random.Generator | None
    ) -> dict[str, np.ndarray]:
        """Return `{"ids": int32[size^2], "valid": all}`: rows from the top, red the most significant digit."""
        pixels = self._image.preprocess(settings, value, rng)["pixels"]
        digits = pixels.astype(np.int32) * self.levels // 256
        ids = digits @ np.array([self.levels**2, self.levels, 1], np.int32)
        return {"ids": ids.reshape(-1).astype(np.int32), "valid": np.ones(ids.size, bool)}

    def raw(self, value: Any) -> Any:
        return self._image.raw(value)

    @cached_property
    def _image(self) -> Image:
        return Image(max_pixels=self.max_pixels)

    def token_ids(self) -> TokenIds:
        return TokenIds(self.vocabulary, end=None)


class ColoursStem(nnx.Module):
    """`{"ids": int32[B, H H]} ->` a stream of `H H` tokens."""

    def __init__(self, levels: int, width: int, positions: Positions | Table | None):
        init = initializers.normal(0.1)
        self.levels = levels
        self.token_ids = TokenIds(levels**3, end=None)
        self.embedding = declare((levels**3, width), ("vocabulary", "embed"), init, decay=False)
        self.positions = positions

    def __call__(self, arrays: dict[str, jax.Array]) -> Stream:
        ids_BS = arrays["ids"]
        table_VD = constrain(self.embedding[...], ("vocabulary", None))
        side = round(ids_BS.shape[1] ** 0.5)
        coordinates = grid(y=side, x=side)
        x_BSD = place(jnp.take(table_VD, ids_BS, axis=0), self.positions, coordinates)
        layout = (("colours", x_BSD.shape[1]),)
        return Stream(x_BSD, None, coordinates, layout, grids=((side, side),))

    def pictures(self, ids_BS: jax.Array) -> jax.Array:
        """Return pictures uint8 `[B, H, H, 3]`, each pixel in the middle of its colour."""
        digits = jnp.stack([ids_BS // self.levels**2, ids_BS // self.levels, ids_BS], axis=-1)
        side = round(ids_BS.shape[1] ** 0.5)
        middle = (digits % self.levels + 0.5) * (256 / self.levels)
        return middle.astype(jnp.uint8).reshape(-1, side, side, 3)
