"""Images: uint8 pixels cut into square patches."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from mmjax.errors import UserError
from mmjax.layers.dense import Dense
from mmjax.layers.positions import Placed, Positions, Table, grid, place
from mmjax.layers.stream import Stream
from mmjax.modality import ArraySpec, Modality, by_axis, dropped, dropped_arrays


@dataclass(frozen=True)
class ImageInput:
    """A task's view of an image.

    Attributes:
      field: field of the example.
      size: height and width in pixels after preprocessing; a multiple of the patch.
      crop: smallest area, as a fraction, of a random crop in training; 1.0 for none.
      flip: mirror at random in training.
      background: grey value behind transparent pixels, 0 to 255; at random in training where -1.
      drop: the part of the tokens that training drops, see `mmjax.modality.dropped`.
    """

    field: str = "image"
    size: int = 64
    crop: float = 1.0
    flip: bool = False
    background: int = 255
    drop: float = 0.0


@dataclass(frozen=True)
class Image(Placed, Modality[ImageInput]):
    """RGB images.

    Attributes:
      patch: side of a patch in pixels.
      buckets: position buckets per axis.
      positions, positions_scale: see `mmjax.layers.positions.Placed`; without positions, a picture has any size.
    """

    Input = ImageInput
    patch: int = 8
    buckets: int = 64

    def stem(self, width: int) -> nnx.Module:
        buckets = {"y": self.buckets, "x": self.buckets}
        return ImageStem(self.patch, width, self.make_positions(width, buckets))

    def arrays(self, settings: ImageInput) -> ArraySpec:
        if settings.size < 1 or settings.size % self.patch:
            raise UserError(
                f"image size {settings.size} is not a multiple of the patch {self.patch}."
            )
        if settings.size // self.patch > self.limit(self.buckets):
            raise UserError(
                f"image size {settings.size} has {settings.size // self.patch} patches a side, over the "
                f"{self.buckets} position buckets."
            )
        if settings.drop:
            side = settings.size // self.patch
            return dropped_arrays(side * side, self.patch**2 * 3, 2, settings.drop, np.uint8)
        return {"pixels": jax.ShapeDtypeStruct((settings.size, settings.size, 3), np.uint8)}

    def preprocess(
        self, settings: ImageInput, value: Any, rng: np.random.Generator | None
    ) -> dict[str, np.ndarray]:
        """Crop, resize, mirror and flatten onto the background: `{"pixels": uint8[size, size, 3]}`.

        Or patches and coordinates, where tokens are dropped.
        """
        image = self.raw(value)
        size = (settings.size, settings.size)
        box = _crop(image.size, settings.crop, rng)
        if image.size != size or box is not None:
            image = image.resize(
                size, resample=2, box=box
            )  # 2: bilinear, with support for shrinking
        pixels = np.asarray(image)
        if settings.flip and rng is not None and rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        pixels = _flatten(pixels, settings.background, rng)
        if not settings.drop:
            return {"pixels": pixels}
        side = settings.size // self.patch
        values_SP = patchify(pixels[None], self.patch)[0]
        return dropped(values_SP, (side, side), settings.drop, rng)[0]

    def raw(self, value: Any) -> Any:
        """A PIL image (RGB or RGBA) from one, from encoded bytes, or from uint8 or [0, 1] `[H, W, 1, 3 or 4]`."""
        from PIL import Image as Pil

        if isinstance(value, bytes):
            value = Pil.open(io.BytesIO(value))
        if not isinstance(value, Pil.Image):
            value = Pil.fromarray(_as_uint8(np.asarray(value)))
        return value if value.mode in ("RGB", "RGBA") else value.convert("RGBA")


def _as_uint8(array: np.ndarray) -> np.ndarray:
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))) or not array.size:
        raise UserError(
            f"an image has shape [H, W] or [H, W, 1, 3 or 4], found {list(array.shape)}."
        )
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if not np.issubdtype(array.dtype, np.floating) or not (array.min() >= 0 and array.max() <= 1):
        raise UserError(
            f"an image is uint8, or float in [0, 1]; found {array.dtype}, {array.min()} to {array.max()}."
        )
    return np.round(array * 255).astype(np.uint8)


def _crop(
    size: tuple[int, int], least: float, rng: np.random.Generator | None
) -> tuple[float, ...] | None:
    """A random box (left, top, right, bottom) of at least `least` of the area, sides scaled alike."""
    if rng is None or least >= 1.0:
        return None
    scale = np.sqrt(rng.uniform(least, 1.0))
    width, height = size[0] * scale, size[1] * scale
    left, top = rng.uniform(0, size[0] - width), rng.uniform(0, size[1] - height)
    return (left, top, left + width, top + height)


def _flatten(pixels: np.ndarray, background: int, rng: np.random.Generator | None) -> np.ndarray:
    if pixels.shape[-1] == 3:
        return np.ascontiguousarray(pixels)
    grey = background if background >= 0 else (255 if rng is None else int(rng.integers(256)))
    alpha = pixels[..., 3:].astype(np.uint16)
    mixed = pixels[..., :3] * alpha + grey * (255 - alpha)
    return ((mixed + 127) // 255).astype(np.uint8)


def patchify(images_BHWC: Any, patch: int) -> Any:
    """`[B, H, W, C] -> [B, (H/p)(W/p), p p C]`, patches and their pixels in row-major order."""
    b, h, w, c = images_BHWC.shape
    x = images_BHWC.reshape(b, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(patches_BSP: jax.Array, height: int, width: int, patch: int) -> jax.Array:
    """The images `[B, height, width, C]` of which `patchify` makes these patches."""
    rows, columns = height // patch, width // patch
    x = patches_BSP.reshape(-1, rows, columns, patch, patch, patches_BSP.shape[2] // patch**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, height, width, x.shape[-1])


class ImageStem(nnx.Module):
    """`{"pixels": uint8[B, H, W, 3]} ->` a stream of `(H/p)(W/p)` tokens, of the patches' values in [-1, 1]."""

    bound = 1.0  # see `mmjax.modality.Stem`

    def __init__(self, patch: int, width: int, positions: Positions | Table | None):
        self.patch = patch
        self.embed = Dense(patch * patch * 3, width, (None, "embed"))
        self.positions = positions

    def values(self, arrays: dict[str, jax.Array], dtype: Any) -> jax.Array:
        if "patches" in arrays:
            return arrays["patches"].astype(dtype) / 127.5 - 1
        values_BSP: jax.Array = patchify(arrays["pixels"].astype(dtype) / 127.5 - 1, self.patch)
        return values_BSP

    def __call__(self, arrays: dict[str, jax.Array], values_BSP: jax.Array | None = None) -> Stream:
        dtype = self.embed.kernel[...].dtype
        if values_BSP is None:
            values_BSP = self.values(arrays, dtype)
        coordinates = self._coordinates(arrays)
        x_BSD = place(self.embed(values_BSP.astype(dtype)), self.positions, coordinates)
        return Stream(x_BSD, None, coordinates, (("image", x_BSD.shape[1]),))

    def _coordinates(self, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        if "coordinates" in arrays:
            return by_axis(arrays["coordinates"], ("y", "x"))
        height, width = arrays["pixels"].shape[1:3]
        return grid(y=height // self.patch, x=width // self.patch)
