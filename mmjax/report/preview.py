"""One value of an example to see or hear, by its type; no modality is named here."""

from __future__ import annotations

import base64
import io
import wave
from typing import Any

import numpy as np
from PIL import Image

from mmjax.modalities.base import Input
from mmjax.modalities.spectrogram import Spectrogram
from mmjax.report.html import Html, tag, text

_LARGEST = 128  # pixels of the longer side
_FRAME_MS = 125
_RATE = 16_000  # samples per second at most, and where their number is unknown
_SECONDS = 6.0
_LONGEST = 400  # characters of a text
_STRIP, _GAP = 4, 2  # frames of a film strip, and pixels between them
_SPECTRUM = (96, 40)  # columns, about, and rows of the picture of a sound
_SHADES = 16
_COLOURS = np.stack(  # from night over violet and orange to light yellow
    [
        np.interp(np.linspace(0, 1, _SHADES), (0, 0.35, 0.7, 1), channel)
        for channel in ((16, 96, 226, 252), (12, 38, 104, 246), (48, 128, 62, 176))
    ],
    axis=1,
)
_ENCODED = (  # how files of known kinds begin, from byte `at` on
    (b"\x89PNG", 0, "image/png"),
    (b"\xff\xd8\xff", 0, "image/jpeg"),
    (b"GIF8", 0, "image/gif"),
    (b"WEBP", 8, "image/webp"),
    (b"WAVE", 8, "audio/wav"),
    (b"fLaC", 0, "audio/flac"),
    (b"OggS", 0, "audio/ogg"),
    (b"ID3", 0, "audio/mpeg"),
)


def as_given(input_: Input, value: Any) -> Any:
    """Return a field's value as a user would give it: a bare sound with the rate that the task states."""
    rate = getattr(input_.settings, "sample_rate", 0)
    return (value, int(rate)) if rate and isinstance(value, np.ndarray) else value


def shown(input_: Input, value: Any) -> Any:
    """Return the value that `preview` takes, from what a user would give: by the modality's own `preview`, else `raw`.

    A one-dimensional array becomes `(samples, rate)`, with the rate of the modality.
    """
    preview_of = getattr(input_.modality, "preview", None)
    result = preview_of(value) if preview_of else input_.modality.raw(value)
    if isinstance(result, np.ndarray) and result.ndim == 1:
        return result, int(getattr(input_.modality, "sample_rate", _RATE))
    return result


def preview(value: Any, label: str) -> Html:
    """Return HTML of a value: text, a picture, a clip or a sound.

    Args:
      value: a `str`; a PIL image, or a list of them for a clip; an array `[H, W]`, `[H, W, C]` or, for
        a clip, `[T, H, W, C]` (uint8, or floats in [0, 1]); `(samples, rate)` with samples `[S]` or `[S, channels]`
        (floats in [-1, 1], or integers of 16 bits, also in a wider type); bytes of a file.
      label: what it shows, for those who cannot see or hear it.
    """
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, bytes):
        return _file(value, label)
    if is_sound(value):
        player = _media("audio", "audio/wav", wav(value[0], int(value[1])), label)
        player = tag("span", player, class_="player")
        return tag("span", player, _spectrum(value[0], int(value[1])), class_="sound")
    if isinstance(value, Image.Image):
        return _picture(value, label)
    array = _array(value)
    if array.ndim == 4:
        return _clip(array, label)
    if array.ndim in (2, 3):
        return _picture(_image(array), label)
    return _text(f"{type(value).__name__} {list(array.shape)}")


def is_sound(value: Any) -> bool:
    """Return whether `preview` makes a sound of it: samples and their rate."""
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], int | np.integer)


def strip(value: Any) -> Html | None:
    """Return some frames of a clip beside each other, as one picture; None if it is no clip."""
    if isinstance(value, str | bytes | Image.Image) or is_sound(value):
        return None
    array = _array(value)
    if array.ndim != 4 or len(array) < 2:
        return None
    chosen = np.linspace(0, len(array) - 1, min(len(array), _STRIP)).round().astype(int)
    frames = [_image(array[i]).convert("RGB") for i in chosen]
    for frame in frames:
        frame.thumbnail((_LARGEST // 2, _LARGEST // 2))
    width, height = frames[0].size
    whole = Image.new("RGB", ((width + _GAP) * len(frames) - _GAP, height), (128, 128, 128))
    for i, frame in enumerate(frames):
        whole.paste(frame, ((width + _GAP) * i, 0))
    return tag("img", src=data_uri("image/png", encoded(whole)), alt="", class_="strip")


def _array(value: Any) -> np.ndarray:
    if isinstance(value, list | tuple) and all(isinstance(frame, Image.Image) for frame in value):
        return np.stack([np.asarray(frame.convert("RGBA")) for frame in value])
    return np.asarray(value)


def wav(samples: np.ndarray, rate: int) -> bytes:
    """Return a WAV file, 16 bits and one channel, of the first six seconds at 16 kHz or less."""
    mono, rate = _heard(samples, rate)
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes(np.round(np.clip(mono, -1, 1) * 32767).astype("<i2").tobytes())
    return file.getvalue()


def _heard(samples: np.ndarray, rate: int) -> tuple[np.ndarray, int]:
    """Return the part of a sound that is played: floats `[S]`, at most six seconds at 16 kHz."""
    mono = _as_floats(np.asarray(samples))[: round(_SECONDS * rate)]
    if rate <= _RATE:
        return mono, rate
    from scipy.signal import resample_poly

    return resample_poly(mono, _RATE, rate), _RATE


def _spectrum(samples: np.ndarray, rate: int) -> Html:
    """Return a small picture of a sound, for the eye only: time to the right, pitch upward, loud is light."""
    mono, rate = _heard(samples, rate)
    window = 512
    hop = max((len(mono) - window) // _SPECTRUM[0], window // 8)
    padded = np.pad(np.clip(mono, -1, 1), (0, max(window - len(mono), 0))).astype(np.float32)
    mel = Spectrogram(
        patch_mels=1,
        mels=_SPECTRUM[1],
        sample_rate=rate,
        window=window,
        hop=hop,
        low=0.0,
        high=rate / 2,
    )
    level_TM = mel.log_mel(padded)
    level_MT = (level_TM.T[::-1] - level_TM.min()) / max(np.ptp(level_TM), 1e-6)
    picture = Image.fromarray(np.round(level_MT * (_SHADES - 1)).astype(np.uint8), "P")
    picture.putpalette(np.round(_COLOURS).astype(np.uint8).tobytes())
    return tag("img", src=data_uri("image/png", encoded(picture)), alt="", class_="spectrum")


def _as_floats(samples: np.ndarray) -> np.ndarray:
    if np.issubdtype(samples.dtype, np.integer):
        samples = samples / 32768
    return samples.mean(axis=1) if samples.ndim == 2 else samples


def _text(value: str) -> Html:
    cut = value if len(value) <= _LONGEST else value[:_LONGEST] + "..."
    return tag("span", cut, dir="auto", class_="words")


def _file(value: bytes, label: str) -> Html:
    for magic, at, kind in _ENCODED:
        if value[at : at + len(magic)] == magic:
            return _media(kind.split("/")[0], kind, value, label)
    return _text(value.decode("utf-8", "replace"))


def _media(name: str, kind: str, data: bytes, label: str) -> Html:
    if name == "audio":
        source = data_uri(kind, data)
        return tag("audio", src=source, controls="", preload="metadata", aria_label=label)
    return tag("img", src=data_uri(kind, data), alt=label)


def data_uri(kind: str, data: bytes) -> Html:
    """Return the bytes within an address."""
    return text(f"data:{kind};base64,{base64.b64encode(data).decode()}")


def _picture(image: Image.Image, label: str) -> Html:
    return _media("image", "image/png", _png(image), label)


def _png(image: Image.Image) -> bytes:
    if image.mode not in ("RGB", "RGBA", "L", "LA", "P"):
        image = image.convert("RGB")
    if max(image.size) > _LARGEST:
        image = image.convert("RGBA" if image.mode in ("RGBA", "LA", "P") else "RGB")
        image = image.copy()
        image.thumbnail((_LARGEST, _LARGEST))
    return encoded(image)


def encoded(image: Image.Image) -> bytes:
    """Return the picture as PNG."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def _clip(frames_THWC: np.ndarray, label: str) -> Html:
    """Return a moving picture; a still one for those who asked their system for less motion."""
    frames = [_image(frame) for frame in frames_THWC]
    for frame in frames:
        frame.thumbnail((_LARGEST, _LARGEST))
    file = io.BytesIO()
    frames[0].save(
        file, "WEBP", save_all=True, append_images=frames[1:], duration=_FRAME_MS, loop=0,
        quality=80,
    )  # fmt: skip
    still = data_uri("image/png", _png(frames[0]))
    return tag(
        "picture",
        tag("source", srcset=still, media="(prefers-reduced-motion: reduce)"),
        _media("image", "image/webp", file.getvalue(), label),
    )


def _image(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if np.issubdtype(array.dtype, np.floating):
        array = np.round(np.clip(array, 0, 1) * 255)
    return Image.fromarray(np.ascontiguousarray(array.astype(np.uint8)))
