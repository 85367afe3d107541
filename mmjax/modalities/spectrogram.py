"""Sound as a log-mel spectrogram, cut into patches of time and frequency."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmjax.core.bounds import AMOUNT, COUNT, PART, POSITIVE, SIZE, check
from mmjax.core.config import FREE
from mmjax.core.errors import UserError
from mmjax.modalities.base import ArraySpec, Modality, by_axis, dropped, dropped_arrays
from mmjax.modalities.waveform import (
    MAX_SECONDS,
    Sound,
    at_rate,
    loudness,
    patches,
    read,
    window,
)
from mmjax.nn.dense import Dense
from mmjax.nn.positions import Placed, Positions, Table, grid, place
from mmjax.nn.stream import Stream

FLOOR = 1e-8
"""The smallest energy that is distinguished, -80 dB of full scale."""

CENTRE, SPREAD = -50.0, 20.0
"""dB that a spectrogram is centred at and divided by: -80 dB becomes -1.5, full scale 2.5.

Rounded from what the defaults give: synthetic speech -53 with a standard deviation of 17, recorded notes
of instruments -51 and 19.
"""


@dataclass(frozen=True)
class SpectrogramInput:
    """A task's view of a sound.

    Attributes:
      field: field of the example.
      frames: length; a multiple of the patch. A sound longer than its `(frames - 1) hop + window` samples
        is cut, at a random place in training and in its middle otherwise; a shorter one is followed by
        zeros.
      sample_rate: samples per second of the field, if its values do not state it; 0 for the modality's.
      gain_db: largest random change of loudness in training, up or down, in dB.
      token_drop: the part of the tokens that training drops, see `mmjax.modalities.base.dropped`.
    """

    field: str = "audio"
    frames: int = 64
    sample_rate: int = 0
    gain_db: float = 0.0
    token_drop: float = 0.0

    def __post_init__(self) -> None:
        check(self, frames=COUNT, sample_rate=SIZE, gain_db=AMOUNT, token_drop=PART)


@dataclass(frozen=True)
class Spectrogram(Placed, Modality[SpectrogramInput]):
    """Log-mel spectrograms, made on the host.

    Frame i is the samples `x[i hop : i hop + window]` under a periodic Hann window w, its power spectrum
    `P_k = |2 / sum(w) * rfft(w x)_k|^2` (a sine of full scale has 1 at its bin), over the next power of
    two of samples. Band m of M adds `max(0, 1 - |mel(f_k) - c_m| / d) P_k`: triangles in HTK's
    `mel(f) = 2595 log10(1 + f / 700)` at centres `c_m = mel(low) + m d`, m = 1..M, with
    `d = (mel(high) - mel(low)) / (M + 1)`. The value is `(10 log10(max(energy, 1e-8)) + 50) / 20`.

    IMP has 128 bands, 80 to 7600 Hz, a window of 2048 and a hop of 1024 at 16 kHz, 128 frames.

    Attributes:
      patch_frames, patch_mels: sides of a patch.
      mels: bands M; a multiple of `patch_mels`.
      sample_rate: samples per second; other sounds are resampled to it.
      window: samples of a frame.
      hop: samples from frame to frame.
      low, high: Hz where the first band begins and the last one ends; at most half the rate.
      max_positions: position buckets in time; the patches of the longest sound at least.
      max_seconds: length of a sound as it is stored, beyond which it is not decoded.
      positions, positions_scale: see `mmjax.nn.positions.Placed`; without positions, a sound has any length.
    """

    Input = SpectrogramInput
    temporal = True
    patch_frames: int = 16
    patch_mels: int = 16
    mels: int = 64
    sample_rate: int = 16000
    window: int = 1024
    hop: int = 256
    low: float = 60.0
    high: float = 7600.0
    max_positions: int = 64
    max_seconds: float = field(default=MAX_SECONDS, metadata=FREE)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self, patch_frames=COUNT, patch_mels=COUNT, mels=COUNT, sample_rate=COUNT, window=COUNT
        )
        check(self, hop=COUNT, low=AMOUNT, high=AMOUNT, max_positions=COUNT, max_seconds=POSITIVE)
        if not 0 <= self.low < self.high <= self.sample_rate / 2:
            raise UserError(
                f"spectrogram: bands from {self.low:g} to {self.high:g} Hz do not lie in order "
                f"between 0 and {self.sample_rate / 2:g}, half the rate."
            )
        if self.mels < 1 or self.mels % self.patch_mels:
            raise UserError(
                f"spectrogram mels {self.mels}: not a positive multiple of the patch {self.patch_mels}."
            )

    def stem(self, width: int) -> nnx.Module:
        size = (self.patch_frames, self.patch_mels)
        buckets = {"t": self.max_positions, "f": self.mels // self.patch_mels}
        return SpectrogramStem(size, width, self.make_positions(width, buckets))

    def arrays(self, settings: SpectrogramInput) -> ArraySpec:
        count = patches(
            "spectrogram frames", settings.frames, self.patch_frames, self.limit(self.max_positions)
        )
        self._bands()
        if settings.token_drop:
            values, bands = self.patch_frames * self.patch_mels, self.mels // self.patch_mels
            specs = dropped_arrays(count * bands, values, 2, settings.token_drop, np.float32)
            return {**specs, "valid": jax.ShapeDtypeStruct(specs["patches"].shape[:1], np.bool_)}
        return {
            "mel": jax.ShapeDtypeStruct((settings.frames, self.mels), np.float32),
            "valid": jax.ShapeDtypeStruct((count,), np.bool_),
        }

    def preprocess(
        self,
        settings: SpectrogramInput,
        value: Any,
        rng: np.random.Generator | None,
        time: float | None = None,
    ) -> dict[str, np.ndarray]:
        """Return the arrays of an example, `{"mel": float32[frames, mels], "valid": bool[frames / patch_frames]}`.

        `valid` marks the patches of time that hold at least one frame that begins within the sound; the first
        one always is. Where tokens are dropped: patches, coordinates, and which of these tokens are valid.
        """
        samples = at_rate(
            read(value, settings.sample_rate or self.sample_rate, self.max_seconds),
            self.sample_rate,
        )
        size = (settings.frames - 1) * self.hop + self.window
        samples, length = window(samples, size, rng, time)
        samples *= loudness(samples[:length], 0.0, settings.gain_db, rng)
        starts = np.arange(0, settings.frames, self.patch_frames) * self.hop
        mel_TM, valid_T = self.log_mel(samples), starts < max(length, 1)
        if not settings.token_drop:
            return {"mel": mel_TM, "valid": valid_T}
        bands = self.mels // self.patch_mels
        values_SP = cut(mel_TM[None], (self.patch_frames, self.patch_mels))[0]
        arrays, index_K = dropped(values_SP, (len(valid_T), bands), settings.token_drop, rng)
        return {**arrays, "valid": np.repeat(valid_T, bands)[index_K]}

    def raw(self, value: Any) -> Sound:
        """Return `(float32[N], rate)` at the modality's rate, from what `mmjax.modalities.waveform.read` takes."""
        return at_rate(
            read(value, self.sample_rate, self.max_seconds), self.sample_rate
        ), self.sample_rate

    def log_mel(self, samples: np.ndarray) -> np.ndarray:
        """Return the log-mel spectrogram, float32 `[1 + (N - window) // hop, mels]`, of samples float32 `[N]`."""
        from scipy import fft

        hann, size = _hann(self.window), _fft_size(self.window)
        frames = np.lib.stride_tricks.sliding_window_view(samples, self.window)[:: self.hop]
        spectrum = fft.rfft(frames * hann, n=size)
        power_KF = np.ascontiguousarray((np.square(spectrum.real) + np.square(spectrum.imag)).T)
        decibel = 10 * np.log10(np.maximum((self._bands() @ power_KF).T, FLOOR))
        return np.ascontiguousarray((decibel - CENTRE) / SPREAD, np.float32)

    def _bands(self) -> Any:
        return _bands(self.sample_rate, self.window, self.mels, self.low, self.high)


def _fft_size(window: int) -> int:
    return 1 << (window - 1).bit_length()


@lru_cache(maxsize=16)
def _hann(window: int) -> np.ndarray:
    phase = 2 * np.pi * np.arange(window) / window
    return (0.5 - 0.5 * np.cos(phase)).astype(np.float32)


def mel(hertz: Any) -> Any:
    """Return HTK's mel scale, `2595 log10(1 + f / 700)`."""
    return 2595 * np.log10(1 + np.asarray(hertz) / 700)


def triangles(rate: int, size: int, mels: int, low: float, high: float) -> np.ndarray:
    """Return weights float64 `[mels, size // 2 + 1]` of the bins of an FFT of `size` samples in each band."""
    edges = np.linspace(mel(low), mel(high), mels + 2)
    bins = mel(np.arange(size // 2 + 1) * rate / size)
    weights: np.ndarray = np.maximum(
        0, 1 - np.abs(bins - edges[1:-1, None]) / (edges[1] - edges[0])
    )
    return weights


@lru_cache(maxsize=16)
def _bands(rate: int, window: int, mels: int, low: float, high: float) -> Any:
    """Return `triangles`, scaled for the window, as a sparse matrix: a product that starts no BLAS threads."""
    from scipy.sparse import csr_array

    weights = triangles(rate, _fft_size(window), mels, low, high)
    empty = np.flatnonzero(weights.sum(axis=1) == 0)
    if len(empty):
        raise UserError(
            f"spectrogram: {len(empty)} of {mels} mel bands, the first of them band {empty[0]}, hold no "
            f"frequency of a window of {window} samples at {rate} Hz. Take fewer bands or a longer window."
        )
    scale = (2 / _hann(window).sum(dtype=np.float64)) ** 2
    return csr_array((weights * scale).astype(np.float32))


class SpectrogramStem(nnx.Module):
    """`{"mel": float32[B, T, M], "valid": bool[B, T/p]} ->` a stream of `(T/p)(M/q)` tokens, time first."""

    bound = None  # see `mmjax.modalities.base.Stem`

    def __init__(self, patch: tuple[int, int], width: int, positions: Positions | Table | None):
        self.patch = patch
        self.embed = Dense(patch[0] * patch[1], width, (None, "embed"))
        self.positions = positions

    def values(self, arrays: dict[str, jax.Array], dtype: Any) -> jax.Array:
        if "patches" in arrays:
            return arrays["patches"].astype(dtype)
        values_BSP: jax.Array = cut(arrays["mel"].astype(dtype), self.patch)
        return values_BSP

    def __call__(self, arrays: dict[str, jax.Array], values_BSP: jax.Array | None = None) -> Stream:
        dtype = self.embed.kernel[...].dtype
        if values_BSP is None:
            values_BSP = self.values(arrays, dtype)
        coordinates, valid_BS = self._places(arrays)
        x_BSD = place(self.embed(values_BSP.astype(dtype)), self.positions, coordinates)
        layout = (("spectrogram", x_BSD.shape[1]),)
        return Stream(x_BSD, valid_BS, coordinates, layout, grids=self._grids(arrays))

    def _places(self, arrays: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array]:
        if "coordinates" in arrays:
            return by_axis(arrays["coordinates"], ("t", "f")), arrays["valid"]
        steps, bands = self._grids(arrays)[0]
        return grid(t=steps, f=bands), jnp.repeat(arrays["valid"], bands, axis=1)

    def _grids(self, arrays: dict[str, jax.Array]) -> tuple[tuple[int, ...], ...]:
        if "coordinates" in arrays:  # of some of the tokens
            return ()
        sizes = zip(arrays["mel"].shape[1:], self.patch, strict=True)
        return (tuple(size // side for size, side in sizes),)


def cut(mel_BTM: Any, patch: tuple[int, int]) -> Any:
    """Cut `[B, T, M] -> [B, (T/p)(M/q), p q]`, patches and their values in row-major order, time first."""
    b, t, m = mel_BTM.shape
    p, q = patch
    x = mel_BTM.reshape(b, t // p, p, m // q, q).transpose(0, 1, 3, 2, 4)
    return x.reshape(b, (t // p) * (m // q), p * q)
