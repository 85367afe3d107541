"""Video: uint8 frames cut into tubes of time, height and width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmjax.core.bounds import COUNT, check
from mmjax.core.config import FREE
from mmjax.core.errors import UserError
from mmjax.data import pictures
from mmjax.modalities.base import ArraySpec, Modality, by_axis, dropped, dropped_arrays, start_of
from mmjax.modalities.image import Image, ImageInput, check_view
from mmjax.nn.dense import Dense
from mmjax.nn.positions import Placed, Positions, Table, grid, place
from mmjax.nn.stream import Stream

_VIEW = ("size", "crop", "flip", "background", "fit", "crop_aspect")  # what every frame is seen by
_MOVING = ("GIF", "PNG", "WEBP")
# Times the pixels of one picture: all frames of a moving one, which are decoded one after another.
_MAX_MOVING = 16
_PREVIEW = 64, 256  # frames of a preview, and pixels of their longer side


@dataclass(frozen=True)
class VideoInput:
    """A task's view of a video.

    Attributes:
      field: field of the example; a still picture is a video of one frame.
      frames: length; a multiple of the tube, or 1 for a still, which is one tube of the same frame (IMP). A longer
        video is cut, at a random place in training and in its middle otherwise; of a shorter one the last frame
        is repeated.
      stride: of every `stride` frames one is taken.
      size, crop, flip, background, fit, crop_aspect: as for images; a crop, a mirroring and a grey are those of all
        frames.
      token_drop: the part of the tokens that training drops, see `mmjax.modalities.base.dropped`.
    """

    field: str = "video"
    frames: int = 8
    stride: int = 1
    size: int = 64
    crop: float = 1.0
    flip: bool = False
    background: int = 255
    token_drop: float = 0.0
    fit: str = "crop"
    crop_aspect: tuple[float, ...] = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Video(Placed, Modality[VideoInput]):
    """RGB videos (IMP, Akbari et al. 2023: tubes of 4 x 16 x 16).

    Attributes:
      tube: frames of a tube.
      patch: height and width of a tube in pixels.
      max_time_positions: position buckets in time; the tubes of the longest video at least.
      max_positions: position buckets in height and in width; the tubes of the largest picture at least.
      max_pixels: pixels of a frame as it is stored, beyond which it is not decoded.
      max_frames: frames of a stored video, beyond which it is not decoded.
      positions, positions_scale: see `mmjax.nn.positions.Placed`; without positions, a video has any size.
    """

    Input = VideoInput
    temporal = True
    tube: int = 4
    patch: int = 16
    max_time_positions: int = 16
    max_positions: int = 64
    max_pixels: int = field(default=pictures.MAX_PIXELS, metadata=FREE)
    max_frames: int = field(default=2**14, metadata=FREE)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, tube=COUNT, patch=COUNT, max_time_positions=COUNT, max_positions=COUNT)
        check(self, max_pixels=pictures.PIXELS, max_frames=COUNT)

    def stem(self, width: int) -> nnx.Module:
        buckets = {"t": self.max_time_positions, "y": self.max_positions, "x": self.max_positions}
        tube = (self.tube, self.patch, self.patch)
        return VideoStem(tube, width, self.make_positions(width, buckets))

    def arrays(self, settings: VideoInput) -> ArraySpec:
        check_view(settings)
        if settings.stride < 1:
            raise UserError(f"video stride {settings.stride}: it must be at least 1.")
        if settings.frames != 1:
            _check("frames", settings.frames, self.tube, self.limit(self.max_time_positions))
        _check("size", settings.size, self.patch, self.limit(self.max_positions))
        if settings.token_drop:
            t, y, x = self._grid(settings)
            values = self.tube * self.patch * self.patch * 3
            return dropped_arrays(t * y * x, values, 3, settings.token_drop, np.uint8)
        shape = (settings.frames, settings.size, settings.size, 3)
        return {"pixels": jax.ShapeDtypeStruct(shape, np.uint8)}

    def preprocess(
        self,
        settings: VideoInput,
        value: Any,
        rng: np.random.Generator | None,
        time: float | None = None,
    ) -> dict[str, np.ndarray]:
        """Return `{"pixels": uint8[frames, size, size, 3]}`, or patches and coordinates if tokens are dropped."""
        frames = self._frames(value)
        chosen = _indices(len(frames), settings.frames, settings.stride, rng, time)
        view = ImageInput(**{name: getattr(settings, name) for name in _VIEW})
        # Every frame under the same seed, so that all of them are cropped and mirrored alike.
        seed = None if rng is None else int(rng.integers(2**63))
        arrays = {
            i: self._image.preprocess(view, frames[i], _generator(seed))["pixels"]
            for i in sorted(set(chosen))
        }
        pixels = np.stack([arrays[i] for i in chosen])
        if not settings.token_drop:
            return {"pixels": pixels}
        pixels = np.repeat(pixels, self.tube, axis=0) if settings.frames == 1 else pixels
        values_SP = cut(pixels[None], (self.tube, self.patch, self.patch))[0]
        return dropped(values_SP, self._grid(settings), settings.token_drop, rng)[0]

    def _grid(self, settings: VideoInput) -> tuple[int, int, int]:
        side = settings.size // self.patch
        return max(settings.frames // self.tube, 1), side, side

    def raw(self, value: Any) -> Sequence[Any]:
        """Return the frames, each as `Image` takes it.

        From an array `[T, H, W, 1, 3 or 4]`, uint8, uint16 or [0, 1]; from a list of pictures of one size; from a
        still (a PIL image or an array `[H, W, 1, 3 or 4]`); from the bytes of a still or moving picture
        (GIF, WebP, PNG).
        """
        frames = self._frames(value)
        return frames if isinstance(frames, np.ndarray) else [frames[i] for i in range(len(frames))]

    def preview(self, value: Any) -> Sequence[Any]:
        """Return some of the frames for a report, in order and small."""
        frames = self._frames(value)
        if isinstance(frames, np.ndarray):
            return frames
        most, side = _PREVIEW
        chosen = np.linspace(0, len(frames) - 1, min(len(frames), most)).round().astype(int)
        small = [frames[int(i)].copy() for i in chosen]
        for frame in small:
            frame.thumbnail((side, side))
        return small

    @cached_property
    def _image(self) -> Image:
        return Image(patch=self.patch, max_pixels=self.max_pixels)

    def _frames(self, value: Any) -> Sequence[Any]:
        """Return the frames as `raw` does, but decode an encoded one only when it is asked for."""
        from PIL import Image as Pil

        if isinstance(value, bytes):
            picture = pictures.open_picture(value, self.max_pixels)
            if picture.format == "GIF":  # Pillow would walk through all frames to count them
                self._check_count(pictures.gif_frames(value, self.max_frames))
            return self._moving(picture)
        if isinstance(value, Pil.Image):
            return self._moving(value)
        if isinstance(value, (list, tuple)):
            self._check_count(len(value))
            return _Listed(value, self._image)
        array = np.asarray(value)
        if array.ndim == 3:
            array = array[None]
        if array.ndim != 4 or not array.size:
            raise UserError(
                f"a video has shape [T, H, W, 1, 3 or 4] and a frame at least, found {list(array.shape)}."
            )
        return array  # type: ignore[return-value]

    def _moving(self, picture: Any) -> Sequence[Any]:
        """Return the frames of a PIL image; a moving one shows one at a time."""
        # Other formats hold several pictures that are no video (previews, pages).
        count = getattr(picture, "n_frames", 1) if picture.format in _MOVING else 1
        if count == 1:
            return [self._image.raw(picture)]
        self._check_count(count)
        if count * picture.width * picture.height > _MAX_MOVING * self.max_pixels:
            raise UserError(
                f"a moving picture of {count} frames of {picture.width} x {picture.height} pixels is over the bound "
                f"of {_MAX_MOVING} times max_pixels = {self.max_pixels}. Make it smaller or raise max_pixels."
            )
        return _Moving(picture, count, self.max_pixels)

    def _check_count(self, count: int) -> None:
        if count > self.max_frames:
            raise UserError(
                f"a video has more than {self.max_frames} frames. Cut it or raise max_frames."
            )


class _Moving(Sequence[Any]):
    """The frames of a moving picture, each drawn when it is asked for; in ascending order, each is drawn once."""

    def __init__(self, picture: Any, count: int, max_pixels: int):
        self._picture, self._count, self._max_pixels = picture, count, max_pixels

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        self._picture.seek(index)
        pictures.check_size(self._picture, self._max_pixels)  # frames of a GIF may grow
        return pictures.rgb(self._picture.convert("RGBA"))


class _Listed(Sequence[Any]):
    """A list of pictures of one size, each decoded when it is asked for."""

    def __init__(self, frames: Sequence[Any], image: Image):
        self._frames, self._image = frames, image
        sizes = sorted({self._size(frame) for frame in frames})
        if len(sizes) != 1:
            sizes_found = ", ".join(f"{w}x{h}" for w, h in sizes) or "no frame"
            raise UserError(f"a video has frames of one size, found {sizes_found}.")

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, index: Any) -> Any:
        return self._image.raw(self._frames[index])

    def _size(self, frame: Any) -> tuple[int, int]:
        """Return width and height, of an encoded picture by its header."""
        if isinstance(frame, bytes):
            frame = pictures.open_picture(frame, self._image.max_pixels)
        elif not hasattr(frame, "getbands"):
            frame = self._image.raw(frame)
        return int(frame.width), int(frame.height)


def _check(what: str, size: int, patch: int, buckets: float) -> None:
    if size < 1 or size % patch:
        raise UserError(f"video {what} {size}: not a positive multiple of the tube's {patch}.")
    if size // patch > buckets:
        raise UserError(
            f"video {what} {size} make {size // patch} tubes; there are {buckets} position buckets."
        )


def _indices(
    length: int, frames: int, stride: int, rng: np.random.Generator | None, time: float | None
) -> list[int]:
    """Return which of `length` frames are taken, see `VideoInput`."""
    start = start_of(max(length - ((frames - 1) * stride + 1), 0), rng, time)
    return [min(start + i * stride, length - 1) for i in range(frames)]


def _generator(seed: int | None) -> np.random.Generator | None:
    return None if seed is None else np.random.default_rng(seed)


class VideoStem(nnx.Module):
    """`{"pixels": uint8[B, T, H, W, 3]} ->` a stream of `(T/t)(H/p)(W/p)` tokens; a still, T = 1, is one tube."""

    bound = 1.0  # see `mmjax.modalities.base.Stem`

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
        layout = (("video", x_BSD.shape[1]),)
        return Stream(x_BSD, None, coordinates, layout, grids=self._grids(arrays))

    def _coordinates(self, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        if "coordinates" in arrays:
            return by_axis(arrays["coordinates"], ("t", "y", "x"))
        t, y, x = self._grids(arrays)[0]
        return grid(t=t, y=y, x=x)

    def _grids(self, arrays: dict[str, jax.Array]) -> tuple[tuple[int, ...], ...]:
        if "coordinates" in arrays:  # of some of the tokens
            return ()
        sizes = arrays["pixels"].shape[1:4]
        return (tuple(max(n // side, 1) for n, side in zip(sizes, self.tube, strict=True)),)


def cut(video_BTHWC: Any, tube: tuple[int, int, int]) -> Any:
    """Cut `[B, T, H, W, C] -> [B, (T/t)(H/p)(W/q), t p q C]`, tubes and their pixels in row-major order."""
    b, frames, height, width, c = video_BTHWC.shape
    t, p, q = tube
    x = video_BTHWC.reshape(b, frames // t, t, height // p, p, width // q, q, c)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(b, (frames // t) * (height // p) * (width // q), t * p * q * c)
