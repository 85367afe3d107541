"""Video: uint8 frames cut into tubes of time, height and width."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmjax.errors import UserError
from mmjax.layers.dense import Dense
from mmjax.layers.positions import Placed, Positions, Table, grid, place
from mmjax.layers.stream import Stream
from mmjax.modalities.image import Image, ImageInput
from mmjax.modality import ArraySpec, Modality, by_axis, dropped, dropped_arrays


@dataclass(frozen=True)
class VideoInput:
    """A task's view of a video.

    Attributes:
      field: field of the example; a still picture is a video of one frame.
      frames: length; a multiple of the tube, or 1 for a still, which is one tube of the same frame (IMP). A longer
        video is cut, at a random place in training and in its middle otherwise; of a shorter one the last frame
        is repeated.
      stride: of every `stride` frames one is taken.
      size, crop, flip, background: as for images; a crop, a mirroring and a grey are those of all frames.
      drop: the part of the tokens that training drops, see `mmjax.modality.dropped`.
    """

    field: str = "video"
    frames: int = 8
    stride: int = 1
    size: int = 64
    crop: float = 1.0
    flip: bool = False
    background: int = 255
    drop: float = 0.0


@dataclass(frozen=True)
class Video(Placed, Modality[VideoInput]):
    """RGB videos (IMP, Akbari et al. 2023: tubes of 4 x 16 x 16).

    Attributes:
      tube: frames of a tube.
      patch: height and width of a tube in pixels.
      time_buckets: position buckets in time; the tubes of the longest video at least.
      buckets: position buckets in height and in width; the tubes of the largest picture at least.
      positions, positions_scale: see `mmjax.layers.positions.Placed`; without positions, a video has any size.
    """

    Input = VideoInput
    tube: int = 4
    patch: int = 16
    time_buckets: int = 16
    buckets: int = 64

    def stem(self, width: int) -> nnx.Module:
        buckets = {"t": self.time_buckets, "y": self.buckets, "x": self.buckets}
        tube = (self.tube, self.patch, self.patch)
        return VideoStem(tube, width, self.make_positions(width, buckets))

    def arrays(self, settings: VideoInput) -> ArraySpec:
        if settings.stride < 1:
            raise UserError(f"video stride {settings.stride}: it must be at least 1.")
        if settings.frames != 1:
            _check("frames", settings.frames, self.tube, self.limit(self.time_buckets))
        _check("size", settings.size, self.patch, self.limit(self.buckets))
        if settings.drop:
            t, y, x = self._grid(settings)
            values = self.tube * self.patch * self.patch * 3
            return dropped_arrays(t * y * x, values, 3, settings.drop, np.uint8)
        shape = (settings.frames, settings.size, settings.size, 3)
        return {"pixels": jax.ShapeDtypeStruct(shape, np.uint8)}

    def preprocess(
        self, settings: VideoInput, value: Any, rng: np.random.Generator | None
    ) -> dict[str, np.ndarray]:
        """`{"pixels": uint8[frames, size, size, 3]}`; or patches and coordinates, where tokens are dropped."""
        frames = self.raw(value)
        chosen = _indices(len(frames), settings.frames, settings.stride, rng)
        image = Image(patch=self.patch)
        view = ImageInput("", settings.size, settings.crop, settings.flip, settings.background)
        # Every frame under the same seed, so that all of them are cropped and mirrored alike.
        seed = None if rng is None else int(rng.integers(2**63))
        made = {
            i: image.preprocess(view, frames[i], _generator(seed))["pixels"] for i in set(chosen)
        }
        pixels = np.stack([made[i] for i in chosen])
        if not settings.drop:
            return {"pixels": pixels}
        pixels = np.repeat(pixels, self.tube, axis=0) if settings.frames == 1 else pixels
        values_SP = cut(pixels[None], (self.tube, self.patch, self.patch))[0]
        return dropped(values_SP, self._grid(settings), settings.drop, rng)[0]

    def _grid(self, settings: VideoInput) -> tuple[int, int, int]:
        side = settings.size // self.patch
        return max(settings.frames // self.tube, 1), side, side

    def raw(self, value: Any) -> Sequence[Any]:
        """Frames, each as `Image` takes it.

        From an array `[T, H, W, 1, 3 or 4]`, uint8 or [0, 1]; from a list of pictures of one size; from a
        still (a PIL image or an array `[H, W, 1, 3 or 4]`); from the bytes of a still or moving picture
        (GIF, WebP, PNG).
        """
        from PIL import Image as Pil

        if isinstance(value, bytes):
            value = Pil.open(io.BytesIO(value))
        if isinstance(value, Pil.Image):
            return _decoded(value)
        if isinstance(value, (list, tuple)):
            return _of_one_size([Image().raw(frame) for frame in value])
        array = np.asarray(value)
        if array.ndim == 3:
            array = array[None]
        if array.ndim != 4 or not array.size:
            raise UserError(
                f"a video has shape [T, H, W, 1, 3 or 4] and a frame at least, found {list(array.shape)}."
            )
        return array  # type: ignore[return-value]


def _check(what: str, size: int, patch: int, buckets: float) -> None:
    if size < 1 or size % patch:
        raise UserError(f"video {what} {size}: not a positive multiple of the tube's {patch}.")
    if size // patch > buckets:
        raise UserError(
            f"video {what} {size} make {size // patch} tubes; there are {buckets} position buckets."
        )


def _decoded(picture: Any) -> list[Any]:
    """The frames of a PIL image, each drawn out: a moving one shows one at a time."""
    from PIL import ImageSequence

    # Other formats hold several pictures that are no video (previews, pages).
    moving = picture.format in ("GIF", "PNG", "WEBP") and getattr(picture, "n_frames", 1) > 1
    if not moving:
        return [Image().raw(picture)]
    return [Image().raw(frame.convert("RGBA")) for frame in ImageSequence.Iterator(picture)]


def _of_one_size(frames: list[Any]) -> list[Any]:
    sizes = sorted({frame.size for frame in frames})
    if len(sizes) != 1:
        found = ", ".join(f"{w}x{h}" for w, h in sizes) or "no frame"
        raise UserError(f"a video has frames of one size, found {found}.")
    return frames


def _indices(length: int, frames: int, stride: int, rng: np.random.Generator | None) -> list[int]:
    """Which of `length` frames are taken, see `VideoInput`."""
    over = max(length - ((frames - 1) * stride + 1), 0)
    start = over // 2 if rng is None else int(rng.integers(over + 1))
    return [min(start + i * stride, length - 1) for i in range(frames)]


def _generator(seed: int | None) -> np.random.Generator | None:
    return None if seed is None else np.random.default_rng(seed)


class VideoStem(nnx.Module):
    """`{"pixels": uint8[B, T, H, W, 3]} ->` a stream of `(T/t)(H/p)(W/p)` tokens; a still, T = 1, is one tube."""

    bound = 1.0  # see `mmjax.modality.Stem`

    def __init__(self, tube: tuple[int, int, int], width: int, positions: Positions | Table | None):
        self.tube = tube
        self.embed = Dense(tube[0] * tube[1] * tube[2] * 3, width, (None, "embed"))
        self.positions = positions

    def values(self, arrays: dict[str, jax.Array], dtype: Any) -> jax.Array:
        if "patches" in arrays:
            return arrays["patches"].astype(dtype) / 127.5 - 1
        pixels = arrays["pixels"]
        if pixels.shape[1] == 1:
            pixels = jnp.repeat(pixels, self.tube[0], axis=1)
        return cut(pixels.astype(dtype) / 127.5 - 1, self.tube)

    def __call__(self, arrays: dict[str, jax.Array], values_BSP: jax.Array | None = None) -> Stream:
        dtype = self.embed.kernel[...].dtype
        if values_BSP is None:
            values_BSP = self.values(arrays, dtype)
        coordinates = self._coordinates(arrays)
        x_BSD = place(self.embed(values_BSP.astype(dtype)), self.positions, coordinates)
        return Stream(x_BSD, None, coordinates, (("video", x_BSD.shape[1]),))

    def _coordinates(self, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        if "coordinates" in arrays:
            return by_axis(arrays["coordinates"], ("t", "y", "x"))
        sizes = arrays["pixels"].shape[1:4]
        t, y, x = (max(n // side, 1) for n, side in zip(sizes, self.tube, strict=True))
        return grid(t=t, y=y, x=x)


def cut(video_BTHWC: Any, tube: tuple[int, int, int]) -> Any:
    """`[B, T, H, W, C] -> [B, (T/t)(H/p)(W/q), t p q C]`, tubes and their pixels in row-major order."""
    b, frames, height, width, c = video_BTHWC.shape
    t, p, q = tube
    x = video_BTHWC.reshape(b, frames // t, t, height // p, p, width // q, q, c)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(b, (frames // t) * (height // p) * (width // q), t * p * q * c)
