"""Sound as samples, cut into patches; and reading sound, which other modalities of sound share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from flax import nnx

from mmjax.core.bounds import AMOUNT, COUNT, PART, POSITIVE, SIZE, check
from mmjax.core.config import FREE
from mmjax.core.errors import UserError
from mmjax.data.wav import check_seconds, read_wav
from mmjax.modalities.base import ArraySpec, Modality, by_axis, dropped, dropped_arrays, start_of
from mmjax.nn.dense import Dense
from mmjax.nn.positions import Placed, Positions, Table, grid, place
from mmjax.nn.stream import Stream

Sound = tuple[np.ndarray, int]  # float32 samples [N], nominally in [-1, 1], and their rate in Hz

_LOUDEST = 2.0  # a resampled or mixed sound may leave [-1, 1]; one in another unit goes far beyond
_MOST_CHANNELS = 8
_MAX_FACTOR = 200_000  # of resampling up or down: the filter has 20 times as many taps
_OTHER_FORMATS = {
    b"fLaC": "FLAC", b"OggS": "Ogg", b"ID3": "MP3", b"\xff\xfb": "MP3", b"\xff\xf3": "MP3", b"\xff\xf2": "MP3",
    b"FORM": "AIFF", b"RF64": "RF64", b"caff": "CAF",
}  # fmt: skip

MAX_SECONDS = 3600.0
"""Longest sound that is read, unless a config sets another limit."""


@dataclass(frozen=True)
class WaveformInput:
    """A task's view of a sound.

    Attributes:
      field: field of the example.
      samples: length at the modality's rate; a multiple of the patch. A longer sound is cut, at a random
        place in training and in its middle otherwise; a shorter one is followed by zeros.
      sample_rate: samples per second of the field, if its values do not state it; 0 for the modality's.
      rms: root mean square that every sound is scaled to; 0 leaves it as recorded.
      gain_db: largest random change of loudness in training, up or down, in dB.
      token_drop: the part of the tokens that training drops, see `mmjax.modalities.base.dropped`.
    """

    field: str = "audio"
    samples: int = 16384
    sample_rate: int = 0
    rms: float = 0.0
    gain_db: float = 0.0
    token_drop: float = 0.0

    def __post_init__(self) -> None:
        check(self, samples=COUNT, sample_rate=SIZE, rms=AMOUNT, gain_db=AMOUNT, token_drop=PART)


@dataclass(frozen=True)
class Waveform(Placed, Modality[WaveformInput]):
    """Sound as it is sampled (VATT, Akbari et al. 2021: patches of 128; IMP: 256).

    Attributes:
      patch: samples of a patch.
      sample_rate: samples per second; other sounds are resampled to it.
      max_positions: position buckets; the patches of the longest sound at least.
      max_seconds: length of a sound as it is stored, beyond which it is not decoded.
      positions, positions_scale: see `mmjax.nn.positions.Placed`; without positions, a sound has any length.
    """

    Input = WaveformInput
    temporal = True
    patch: int = 256
    sample_rate: int = 16000
    max_positions: int = 512
    max_seconds: float = field(default=MAX_SECONDS, metadata=FREE)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, patch=COUNT, sample_rate=COUNT, max_positions=COUNT, max_seconds=POSITIVE)

    def stem(self, width: int) -> nnx.Module:
        return WaveformStem(
            self.patch, width, self.make_positions(width, {"t": self.max_positions})
        )

    def arrays(self, settings: WaveformInput) -> ArraySpec:
        count = patches(
            "waveform samples", settings.samples, self.patch, self.limit(self.max_positions)
        )
        if settings.token_drop:
            specs = dropped_arrays(count, self.patch, 1, settings.token_drop, np.float32)
            return {**specs, "valid": jax.ShapeDtypeStruct(specs["patches"].shape[:1], np.bool_)}
        return {
            "samples": jax.ShapeDtypeStruct((settings.samples,), np.float32),
            "valid": jax.ShapeDtypeStruct((count,), np.bool_),
        }

    def preprocess(
        self,
        settings: WaveformInput,
        value: Any,
        rng: np.random.Generator | None,
        time: float | None = None,
    ) -> dict[str, np.ndarray]:
        """Return the arrays of an example, `{"samples": float32[samples], "valid": bool[samples / patch]}`.

        A patch is valid where it holds at least one sample of the sound; the first one always is. Where tokens are
        dropped: patches, coordinates, and which of these tokens are valid.
        """
        samples = at_rate(
            read(value, settings.sample_rate or self.sample_rate, self.max_seconds),
            self.sample_rate,
        )
        samples, length = window(samples, settings.samples, rng, time)
        samples *= loudness(samples[:length], settings.rms, settings.gain_db, rng)
        valid_S = np.arange(0, settings.samples, self.patch) < max(length, 1)
        if not settings.token_drop:
            return {"samples": samples, "valid": valid_S}
        arrays, index_K = dropped(
            samples.reshape(-1, self.patch), valid_S.shape, settings.token_drop, rng
        )
        return {**arrays, "valid": valid_S[index_K]}

    def raw(self, value: Any) -> Sound:
        """Return `(float32[N], rate)` at the modality's rate, from what `read` takes."""
        return at_rate(
            read(value, self.sample_rate, self.max_seconds), self.sample_rate
        ), self.sample_rate


def patches(what: str, size: int, patch: int, buckets: float) -> int:
    """Return the number of patches of `size`; raise `UserError` if it is no multiple, or exceeds the buckets."""
    if size < 1 or size % patch:
        raise UserError(f"{what} {size}: not a positive multiple of the patch {patch}.")
    if size // patch > buckets:
        raise UserError(
            f"{what} {size} make {size // patch} patches; there are {buckets} position buckets."
        )
    return size // patch


class WaveformStem(nnx.Module):
    """`{"samples": float32[B, N], "valid": bool[B, N/p]} ->` a stream of N/p tokens."""

    def __init__(self, patch: int, width: int, positions: Positions | Table | None):
        self.patch = patch
        self.embed = Dense(patch, width, (None, "embed"))
        self.positions = positions

    def __call__(self, arrays: dict[str, jax.Array]) -> Stream:
        dtype = self.embed.kernel[...].dtype
        if "patches" in arrays:
            patches_BSP, coordinates = arrays["patches"], by_axis(arrays["coordinates"], ("t",))
        else:
            patches_BSP = arrays["samples"].reshape(arrays["samples"].shape[0], -1, self.patch)
            coordinates = grid(t=patches_BSP.shape[1])
        x_BSD = place(self.embed(patches_BSP.astype(dtype)), self.positions, coordinates)
        return Stream(x_BSD, arrays["valid"], coordinates, (("waveform", x_BSD.shape[1]),))


# --- reading sound -----------------------------------------------------------------------------


def read(value: Any, rate: int, max_seconds: float = MAX_SECONDS) -> Sound:
    """Return a sound from a value of a user or a data set.

    Args:
      value: samples `[N]` or `[N, channels]` (at most 8, averaged), float in [-1, 1] or integers of 8
        (unsigned), 16 or 32 bits; int64 as TFDS decodes sounds, in the range of 16 bits; or a tuple
        (samples, rate); or the bytes of a WAV file of integers or floats.
      rate: samples per second, if `value` does not state it.
      max_seconds: longest sound that is taken.

    Raises:
      UserError: a wrong type, shape, unit or format, or too long a sound.
      ValueError: damaged data: a WAV file that ends early, or samples that are not finite.
    """
    if isinstance(value, bytes):
        value = _wav(value, max_seconds)
    if isinstance(value, tuple):
        if len(value) != 2 or not _is_rate(value[1]):
            raise UserError("a sound as a tuple is (samples, rate), the rate a whole number of Hz.")
        value, rate = value[0], int(value[1])
    samples = np.asarray(value)
    check_seconds(len(samples) if samples.ndim else 0, rate, max_seconds)
    return _mono(_scaled(samples)), rate


def _is_rate(rate: Any) -> bool:
    """Return whether it is a whole number of Hz, of whatever type: some libraries give floats."""
    number = np.asarray(rate)
    if number.ndim or number.dtype.kind not in "iuf":
        return False
    return bool(number > 0) and float(number).is_integer()


def _wav(data: bytes, max_seconds: float) -> tuple[np.ndarray, int]:
    for start, name in _OTHER_FORMATS.items():
        if data.startswith(start):
            raise UserError(f"a sound is {name}; give WAV, or the decoded samples and their rate.")
    return read_wav(data, max_seconds)


def _scaled(samples: np.ndarray) -> np.ndarray:
    """Convert to float32, full scale 1."""
    scaled: np.ndarray
    if samples.dtype.kind == "f":
        scaled = samples.astype(np.float32)
    elif samples.dtype == np.uint8:
        scaled = samples.astype(np.float32) / 128 - 1
    elif samples.dtype == np.int32:
        scaled = (samples / 2**31).astype(np.float32)
    elif samples.dtype in (np.int16, np.int64):
        scaled = samples.astype(np.float32) / 2**15
    else:
        raise UserError(f"a sound is float, uint8, int16 or int32, found {samples.dtype}.")
    peak = float(np.abs(scaled).max(initial=0.0))
    if not math.isfinite(peak):
        raise ValueError("a sound has samples that are not finite")
    if peak > _LOUDEST:
        raise UserError(
            f"a sound of {samples.dtype} reaches {peak:g} times full scale: floats must lie in [-1, 1], "
            "int64 in the range of 16 bits. Scale it."
        )
    return scaled


def _mono(samples: np.ndarray) -> np.ndarray:
    if samples.ndim == 1:
        return samples
    if samples.ndim != 2 or not 1 <= samples.shape[1] <= _MOST_CHANNELS:
        raise UserError(
            f"a sound has shape [N] or [N, channels] with at most {_MOST_CHANNELS} channels, "
            f"found {list(samples.shape)}."
        )
    mean: np.ndarray = samples.mean(axis=1)
    return mean


def at_rate(sound: Sound, rate: int) -> np.ndarray:
    """Resample to float32 `[ceil(N rate / old rate)]`, by a polyphase low-pass filter."""
    samples, old = sound
    if old == rate or not len(samples):
        return samples
    from scipy.signal import resample_poly

    common = math.gcd(rate, old)
    up, down = rate // common, old // common
    if max(up, down) > _MAX_FACTOR:
        raise UserError(
            f"a sound of {old} Hz is not resampled to {rate} Hz: {up} samples for {down} are over the bound of "
            f"{_MAX_FACTOR}. Give it another rate."
        )
    resampled: np.ndarray = resample_poly(samples, up, down, window=_low_pass(max(up, down)))
    return resampled


@lru_cache(maxsize=16)
def _low_pass(factor: int) -> np.ndarray:
    """Return the filter that `scipy.signal.resample_poly` would design at every call, in most of its time."""
    from scipy.signal import firwin

    taps: np.ndarray = firwin(20 * factor + 1, 1 / factor, window=("kaiser", 5.0))
    return taps.astype(np.float32)


def window(
    samples: np.ndarray, size: int, rng: np.random.Generator | None, time: float | None = None
) -> tuple[np.ndarray, int]:
    """Return a copy float32 `[size]` of the samples, and how many of it are the sound's.

    A longer sound is cut to a stretch that begins at a random place (that of `time`, see `base.start_of`), or to the
    middle one if `rng` is None; a shorter one is followed by zeros.
    """
    over = len(samples) - size
    if over > 0:
        start = start_of(over, rng, time)
        return samples[start : start + size].copy(), size
    whole = np.zeros(size, np.float32)
    whole[: len(samples)] = samples
    return whole, len(samples)


def loudness(
    samples: np.ndarray, level: float, gain: float, rng: np.random.Generator | None
) -> np.float32:
    """Return a factor that brings the samples' root mean square to `level` (`rms`, if any), then a random gain."""
    factor = 1.0
    if level > 0 and len(samples):
        # Silence stays silence: nothing is raised by more than 80 dB.
        factor = level / max(float(np.sqrt(np.square(samples).mean())), level * 1e-4)
    if gain > 0 and rng is not None:
        factor *= 10 ** (rng.uniform(-gain, gain) / 20)
    return np.float32(factor)
