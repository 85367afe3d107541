"""Images: uint8 pixels cut into square patches."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers

from mmjax.core.bounds import COUNT, check
from mmjax.core.config import FREE
from mmjax.core.errors import UserError, nearest
from mmjax.core.parameters import declare
from mmjax.data import pictures
from mmjax.modalities.base import ArraySpec, Modality, by_axis, dropped, dropped_arrays
from mmjax.nn.dense import Dense
from mmjax.nn.positions import Placed, Positions, Table, grid, place
from mmjax.nn.stream import Stream

FITS = ("crop", "pad", "squash")
_BILINEAR = 2  # with support for shrinking
_TRIES = 10  # of a random crop


@dataclass(frozen=True)
class ImageInput:
    """A task's view of an image.

    Attributes:
      field: field of the example.
      size: height and width in pixels after preprocessing; a multiple of the patch.
      crop: smallest area, as a fraction, of a random crop in training; 1.0 for none.
      flip: mirror at random in training.
      background: grey value behind transparent pixels, 0 to 255; at random in training where -1.
      token_drop: the part of the tokens that training drops, see `mmjax.modalities.base.dropped`.
      fit: how a picture that is not square becomes one. `crop`: its shorter side becomes `size`, and of the longer one
        the middle is taken; a random crop in training is that of Inception, of `crop_aspect`, and becomes a square.
        `pad`: its longer side becomes `size`, and the rest is background. `squash`: both sides become `size`.
        Under these two, a random crop has the aspect of the picture.
      crop_aspect: least and largest ratio of width to height of a random crop, under `fit: crop`.
    """

    field: str = "image"
    size: int = 64
    crop: float = 1.0
    flip: bool = False
    background: int = 255
    token_drop: float = 0.0
    fit: str = "crop"
    crop_aspect: tuple[float, ...] = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Image(Placed, Modality[ImageInput]):
    """RGB images.

    Attributes:
      patch: side of a patch in pixels.
      max_positions: position buckets per axis.
      max_pixels: pixels of a picture as it is stored, beyond which it is not decoded.
      class_token: a learned token before those of the patches, which pooling by `class` reads (a ViT's).
      positions, positions_scale: see `mmjax.nn.positions.Placed`; without positions, a picture has any size.
    """

    Input = ImageInput
    patch: int = 8
    max_positions: int = 64
    max_pixels: int = field(default=pictures.MAX_PIXELS, metadata=FREE)
    class_token: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, patch=COUNT, max_positions=COUNT, max_pixels=pictures.PIXELS)

    def stem(self, width: int) -> nnx.Module:
        buckets = {"y": self.max_positions, "x": self.max_positions}
        positions = self.make_positions(width, buckets)
        return ImageStem(self.patch, width, positions, self.class_token)

    def arrays(self, settings: ImageInput) -> ArraySpec:
        check_view(settings)
        if settings.size < 1 or settings.size % self.patch:
            raise UserError(
                f"image size {settings.size} is not a multiple of the patch {self.patch}."
            )
        if settings.size // self.patch > self.limit(self.max_positions):
            raise UserError(
                f"image size {settings.size} has {settings.size // self.patch} patches a side, over the "
                f"{self.max_positions} position buckets."
            )
        if settings.token_drop:
            side = settings.size // self.patch
            return dropped_arrays(side * side, self.patch**2 * 3, 2, settings.token_drop, np.uint8)
        return {"pixels": jax.ShapeDtypeStruct((settings.size, settings.size, 3), np.uint8)}

    def preprocess(
        self, settings: ImageInput, value: Any, rng: np.random.Generator | None
    ) -> dict[str, np.ndarray]:
        """Crop, resize, mirror and flatten onto the background: `{"pixels": uint8[size, size, 3]}`.

        Or patches and coordinates, where tokens are dropped.
        """
        image = _squared(self.raw(value), settings, rng)
        pixels = np.asarray(image)
        if settings.flip and rng is not None and rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        pixels = _flatten(pixels, settings.background, rng)
        if not settings.token_drop:
            return {"pixels": pixels}
        side = settings.size // self.patch
        values_SP = patchify(pixels[None], self.patch)[0]
        return dropped(values_SP, (side, side), settings.token_drop, rng)[0]

    def raw(self, value: Any) -> Any:
        """Return a PIL image (RGB or RGBA) the right way up.

        Args:
          value: a PIL image, encoded bytes, or an array `[H, W, 1, 3 or 4]`: uint8, uint16 or floats in [0, 1].
        """
        from PIL import Image as Pil

        if isinstance(value, bytes):
            value = pictures.open_picture(value, self.max_pixels)
        elif isinstance(value, Pil.Image):
            pictures.check_size(value, self.max_pixels)
        else:
            value = Pil.fromarray(_as_uint8(np.asarray(value)))
        return pictures.rgb(value)


def _as_uint8(array: np.ndarray) -> np.ndarray:
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))) or not array.size:
        raise UserError(
            f"an image has shape [H, W] or [H, W, 1, 3 or 4], found {list(array.shape)}."
        )
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == np.uint16:
        return (array >> 8).astype(np.uint8)
    if not np.issubdtype(array.dtype, np.floating):
        raise UserError(
            f"an image is uint8, uint16, or float in [0, 1]; found {array.dtype}, "
            f"{array.min()} to {array.max()}."
        )
    return pictures.from_unit(array)


def check_view(settings: Any) -> None:
    """Refuse settings of `fit`, `crop`, `crop_aspect` and `background` that mean nothing."""
    if settings.fit not in FITS:
        raise UserError(f"fit is '{settings.fit}'.{nearest(settings.fit, FITS)}")
    if not 0 < settings.crop <= 1:
        raise UserError(f"crop is {settings.crop}; expected an area above 0 and up to 1.")
    aspect = settings.crop_aspect
    if len(aspect) != 2 or not 0 < aspect[0] <= aspect[1] < math.inf:
        raise UserError(
            f"crop_aspect is {list(aspect)}; expected the least and the largest ratio of width to height."
        )
    if not -1 <= settings.background <= 255:
        raise UserError(f"background is {settings.background}; expected 0 to 255, or -1 for any.")


def _squared(image: Any, settings: ImageInput, rng: np.random.Generator | None) -> Any:
    """Return the picture, or a part of it, as a square."""
    side = settings.size
    draw = _inception if settings.fit == "crop" else _crop
    box = draw(image.size, settings, rng)
    if settings.fit == "pad" and image.width != image.height:
        return _padded(image, box, side)
    if image.size == (side, side) and box is None:
        return image
    return image.resize((side, side), resample=_BILINEAR, box=box)


def _inception(
    size: tuple[int, int], settings: ImageInput, rng: np.random.Generator | None
) -> tuple[float, ...] | None:
    """Return a random box (left, top, right, bottom) in training, else the middle square; None for all of a square.

    Its area is uniform in [`crop`, 1] of the picture's, and the logarithm of its aspect in `crop_aspect` (Szegedy et
    al. 2015), drawn until it fits. Where none of ten does, the middle box that is as large as these aspects allow.
    """
    width, height = size
    if rng is None or settings.crop >= 1:
        side = min(size)
        return None if width == height else _middle(size, side, side)
    low, high = (math.log(ratio) for ratio in settings.crop_aspect)
    for _ in range(_TRIES):
        area = width * height * rng.uniform(settings.crop, 1)
        ratio = math.exp(rng.uniform(low, high))
        wide, tall = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if wide <= width and tall <= height:
            left, top = rng.uniform(0, width - wide), rng.uniform(0, height - tall)
            return left, top, min(left + wide, width), min(top + tall, height)
    ratio = min(max(width / height, settings.crop_aspect[0]), settings.crop_aspect[1])
    return _middle(size, min(width, height * ratio), min(height, width / ratio))


def _middle(size: tuple[int, int], width: float, height: float) -> tuple[float, ...]:
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    return left, top, left + width, top + height


def _crop(
    size: tuple[int, int], settings: ImageInput, rng: np.random.Generator | None
) -> tuple[float, ...] | None:
    """Return a random box (left, top, right, bottom) of at least `crop` of the area, sides scaled alike."""
    if rng is None or settings.crop >= 1.0:
        return None
    scale = np.sqrt(rng.uniform(settings.crop, 1.0))
    width, height = size[0] * scale, size[1] * scale
    left, top = rng.uniform(0, size[0] - width), rng.uniform(0, size[1] - height)
    return (left, top, left + width, top + height)


def _padded(image: Any, box: tuple[float, ...] | None, side: int) -> Any:
    """Return the picture with its longer side in the length of the square, in the middle of a transparent one."""
    from PIL import Image as Pil

    scale = side / max(image.size)  # a crop has the picture's aspect
    inner = tuple(max(round(length * scale), 1) for length in image.size)
    square = Pil.new("RGBA", (side, side))
    place = ((side - inner[0]) // 2, (side - inner[1]) // 2)
    square.paste(image.resize(inner, resample=_BILINEAR, box=box), place)
    return square


def _flatten(pixels: np.ndarray, background: int, rng: np.random.Generator | None) -> np.ndarray:
    if pixels.shape[-1] == 3:
        return np.ascontiguousarray(pixels)
    grey = background if background >= 0 else (255 if rng is None else int(rng.integers(256)))
    alpha = pixels[..., 3:].astype(np.uint16)
    mixed = pixels[..., :3] * alpha + grey * (255 - alpha)
    return ((mixed + 127) // 255).astype(np.uint8)


def patchify(images_BHWC: Any, patch: int) -> Any:
    """Cut `[B, H, W, C] -> [B, (H/p)(W/p), p p C]`, patches and their pixels in row-major order."""
    b, h, w, c = images_BHWC.shape
    x = images_BHWC.reshape(b, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(patches_BSP: jax.Array, height: int, width: int, patch: int) -> jax.Array:
    """Return the images `[B, height, width, C]` of which `patchify` makes these patches."""
    rows, columns = height // patch, width // patch
    x = patches_BSP.reshape(-1, rows, columns, patch, patch, patches_BSP.shape[2] // patch**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, height, width, x.shape[-1])


class ImageStem(nnx.Module):
    """`{"pixels": uint8[B, H, W, 3]} ->` a stream of `(H/p)(W/p)` tokens, of the patches' values in [-1, 1]."""

    bound = 1.0  # see `mmjax.modalities.base.Stem`

    def __init__(
        self,
        patch: int,
        width: int,
        positions: Positions | Table | None,
        class_token: bool = False,
    ):
        init = initializers.normal(0.02)
        self.class_token = declare((width,), ("embed",), init) if class_token else None
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
        grids = self._grids(arrays)
        if self.class_token is not None:
            first = self.class_token[...].astype(x_BSD.dtype)
            first_B1D = jnp.broadcast_to(first, (x_BSD.shape[0], 1, first.shape[0]))
            # The token is at no place of the grid, so the stream has neither coordinates nor a grid.
            x_BSD, coordinates, grids = jnp.concatenate([first_B1D, x_BSD], axis=1), {}, ()
        return Stream(x_BSD, None, coordinates, (("image", x_BSD.shape[1]),), grids=grids)

    def _coordinates(self, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        if "coordinates" in arrays:
            return by_axis(arrays["coordinates"], ("y", "x"))
        rows, columns = self._grids(arrays)[0]
        return grid(y=rows, x=columns)

    def _grids(self, arrays: dict[str, jax.Array]) -> tuple[tuple[int, ...], ...]:
        if "coordinates" in arrays:  # of some of the tokens
            return ()
        return (tuple(side // self.patch for side in arrays["pixels"].shape[1:3]),)


def as_pixels(images_BHWC: jax.Array) -> jax.Array:
    """Convert values in [0, 1] to uint8; values outside are clipped."""
    return jnp.round(jnp.clip(images_BHWC, 0, 1) * 255).astype(jnp.uint8)


def patch_side(patches_BSP: jax.Array) -> int:
    """Return the side of square patches of three channels."""
    return round((patches_BSP.shape[-1] / 3) ** 0.5)
