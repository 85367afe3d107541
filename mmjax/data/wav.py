"""Reading WAV files as programs write them, also into a pipe, where the sizes in the header are not known."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mmjax.core.errors import UserError

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_NAMES = {
    2: "Microsoft ADPCM", 6: "A-law", 7: "mu-law", 0x11: "IMA ADPCM", 0x31: "GSM 6.10", 0x50: "MPEG", 0x55: "MP3",
    0xFF: "AAC", 0x161: "WMA",
}  # fmt: skip
_STANDARD = bytes.fromhex("000000001000800000aa00389b71")  # ends the id of a format with a number
_UNKNOWN = 0x7FFFF000  # a size from here on means that it was not known (ffmpeg, SoX)
_SUPPORTED = "give PCM of 8 to 32 bits, floats, or the decoded samples and their rate"


@dataclass(frozen=True)
class _Format:
    """The samples of a WAV file as its header states them; `width` in bytes."""

    channels: int
    rate: int
    width: int
    is_float: bool


def read_wav(data: bytes, max_seconds: float) -> tuple[np.ndarray, int]:
    """Return the samples `[N, channels]` of a WAV file, in its own type, and their rate.

    Raises:
      UserError: a format other than PCM or floats, or more than `max_seconds` of sound.
      ValueError: a damaged file.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise ValueError("a WAV file that cannot be read: it does not begin as one")
    form: _Format | None = None
    for name, begin, size in _chunks(data):
        if name == b"fmt ":
            form = _format(data[begin : begin + size])
        elif name == b"data" and form is not None:
            return _samples(data, begin, size, form, max_seconds), form.rate
    raise ValueError("a WAV file that cannot be read: it ends early")


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, first byte and size of each chunk; they begin at even places."""
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        yield data[at : at + 4], at + 8, size
        at += 8 + size + (size & 1)


def _format(chunk: bytes) -> _Format:
    if len(chunk) < 16:
        raise ValueError("a WAV file that cannot be read: it ends early")
    tag, channels, rate, _, _, bits = struct.unpack("<HHIIHH", chunk[:16])
    if tag == _EXTENSIBLE:
        if len(chunk) < 40:
            raise ValueError("a WAV file that cannot be read: its extended format ends early")
        if chunk[26:40] != _STANDARD:
            raise UserError(f"a WAV file is of format {chunk[24:40].hex()}; {_SUPPORTED}.")
        tag = int.from_bytes(chunk[24:26], "little")
    width = (bits + 7) // 8
    if tag not in (_PCM, _FLOAT) or width not in ((1, 2, 3, 4) if tag == _PCM else (4, 8)):
        what = _NAMES.get(tag, "another format" if tag not in (_PCM, _FLOAT) else "")
        what = what or f"{'PCM' if tag == _PCM else 'floats'} of {bits} bits"
        raise UserError(f"a WAV file holds {what} (format {tag}); {_SUPPORTED}.")
    if not channels or not rate:
        raise ValueError(f"a WAV file of {channels} channels at {rate} Hz")
    return _Format(channels, rate, width, tag == _FLOAT)


def _samples(data: bytes, begin: int, size: int, form: _Format, max_seconds: float) -> np.ndarray:
    frame = form.channels * form.width
    there = len(data) - begin
    whole = int.from_bytes(data[4:8], "little")
    if size >= _UNKNOWN or (size == 0 and whole + 8 <= begin):
        size = there
    frames = size // frame
    if size > there:
        raise ValueError(f"a WAV file of {frames} frames ends early")
    check_seconds(frames, form.rate, max_seconds)
    content = memoryview(data)[begin : begin + frames * frame]
    return _numbers(content, form).reshape(frames, form.channels)


def _numbers(content: memoryview, form: _Format) -> np.ndarray:
    if form.width != 3:
        kinds = {4: "<f4", 8: "<f8"} if form.is_float else {1: "u1", 2: "<i2", 4: "<i4"}
        return np.frombuffer(content, kinds[form.width])
    padded = np.zeros((len(content) // 3, 4), np.uint8)
    padded[:, 1:] = np.frombuffer(content, np.uint8).reshape(-1, 3)
    return padded.view("<i4")[:, 0]


def check_seconds(frames: int, rate: int, max_seconds: float) -> None:
    """Refuse a sound that lasts longer than the bound."""
    if frames > max_seconds * rate:
        raise UserError(
            f"a sound lasts {frames / rate:.6g} s, over the bound of {max_seconds:g} s. Cut it or raise max_seconds."
        )
