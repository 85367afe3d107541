"""Log-mel spectrograms against SciPy's short-time Fourier transform and the published mel scale."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
import pytest
import scipy.signal
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.core.errors import UserError
from mmjax.core.parameters import Declaration
from mmjax.modalities.base import Input
from mmjax.modalities.spectrogram import Spectrogram, SpectrogramInput, cut, mel, triangles

SMALL = Spectrogram(
    patch_frames=2, patch_mels=4, mels=8, sample_rate=8000, window=256, hop=64, high=3800
)


def reference(samples: np.ndarray, m: Spectrogram) -> np.ndarray:
    """Return the class's documented formula, by SciPy's transform and loops over bands, in float64."""
    size = 2 ** math.ceil(math.log2(m.window))
    _, _, z = scipy.signal.stft(
        samples.astype(np.float64),
        window=scipy.signal.get_window("hann", m.window, fftbins=True),
        nperseg=m.window, noverlap=m.window - m.hop, nfft=size,
        boundary=None, padded=False, detrend=False, scaling="spectrum",
    )  # fmt: skip
    power = np.abs(2 * z) ** 2
    low, high = (1127.0104803 * math.log(1 + f / 700) for f in (m.low, m.high))
    step = (high - low) / (m.mels + 1)
    energy = np.zeros((z.shape[1], m.mels))
    for band in range(m.mels):
        knots = [low + band * step, low + (band + 1) * step, low + (band + 2) * step]
        for k in range(size // 2 + 1):
            place = 1127.0104803 * math.log(1 + k * m.sample_rate / size / 700)
            energy[:, band] += np.interp(place, knots, [0, 1, 0], left=0, right=0) * power[k]
    return (10 * np.log10(np.maximum(energy, 1e-8)) + 50) / 20


def sound(length: int, seed: int = 0) -> np.ndarray:
    """Return noise with a tone that sweeps, at most about 0.8."""
    rng = np.random.default_rng(seed)
    time = np.arange(length) / 8000
    tone = 0.5 * np.sin(2 * np.pi * (200 + 1500 * time) * time)
    return (tone + 0.05 * rng.normal(size=length)).astype(np.float32)


@pytest.mark.parametrize(
    "modality",
    [
        Spectrogram(),
        SMALL,
        Spectrogram(sample_rate=8000, window=200, hop=80, mels=16, low=100, high=4000),
        Spectrogram(sample_rate=16000, window=2048, hop=1024, mels=128, low=80),
        Spectrogram(sample_rate=8000, window=300, hop=77, mels=16, low=0, high=3999),
    ],
)
def test_log_mel_is_that_of_scipy(modality):
    samples = sound(5000)
    found = modality.log_mel(samples)
    expected = reference(samples, modality)
    assert found.dtype == np.float32 and found.flags.c_contiguous
    assert found.shape == (1 + (5000 - modality.window) // modality.hop, modality.mels)
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_mel_scale_by_hand():
    # 1000 mel at 1 kHz, and 2595 log10(2) at 700 Hz.
    assert mel(0) == 0
    assert mel(1000) == pytest.approx(999.99, abs=0.01)
    assert mel(700) == pytest.approx(781.17, abs=0.01)
    assert mel(8000) == pytest.approx(2840.02, abs=0.01)


def test_triangles_by_hand():
    # One band from 0 to 8000 Hz has its centre at 1420.01 mel; bins at 0, 4000 (2146.06 mel), 8000 Hz.
    found = triangles(16000, 4, 1, 0, 8000)
    np.testing.assert_allclose(found, [[0, 1 - (2146.06 - 1420.01) / 1420.01, 0]], atol=1e-4)


@given(mels=st.integers(1, 40), low=st.floats(0, 500), high=st.floats(1000, 8000))
def test_bands_share_each_bin_between_first_and_last_centre(mels, low, high):
    weights = triangles(16000, 1024, mels, low, high)
    hertz = np.arange(513) * 16000 / 1024
    step = (mel(high) - mel(low)) / (mels + 1)
    inside = (mel(hertz) >= mel(low) + step) & (mel(hertz) <= mel(high) - step)
    np.testing.assert_allclose(weights.sum(axis=0)[inside], 1, atol=1e-9)
    assert (weights.sum(axis=0)[(hertz <= low) | (hertz >= high)] < 1e-9).all()
    assert weights.min() >= 0 and weights.max() <= 1


def test_a_tone_stands_in_its_band_at_its_loudness():
    modality = Spectrogram()
    hertz = 64 * 16000 / 1024  # the middle of a bin: 1 kHz
    time = np.arange(4096) / 16000
    loud, soft = (
        modality.log_mel(a * np.sin(2 * np.pi * hertz * time).astype(np.float32)) for a in (1, 0.1)
    )
    centres = np.linspace(mel(60), mel(7600), 66)[1:-1]
    band = int(np.abs(centres - mel(hertz)).argmin())
    assert (loud.argmax(axis=1) == band).all()
    # A tenth of the amplitude is 20 dB less, one unit.
    np.testing.assert_allclose(loud[:, band] - soft[:, band], 1, atol=1e-3)
    # Hann spreads a tone of full scale over three bins with powers 1/4, 1, 1/4, each shared by two bands.
    energy = 10 ** ((loud.astype(float) * 20 - 50) / 10)
    np.testing.assert_allclose(energy.sum(axis=1), 1.5, rtol=1e-3)


def test_silence_is_80_decibel_below_full_scale():
    made = SMALL.preprocess(SpectrogramInput(frames=4), np.zeros(100), None)
    np.testing.assert_allclose(made["mel"], np.full((4, 8), -1.5), atol=1e-5)


# --- cutting -----------------------------------------------------------------------------------


@settings(deadline=None)
@given(length=st.integers(0, 900), patches=st.integers(1, 5), train=st.booleans())
def test_frames_are_those_of_a_stretch_or_of_the_sound_and_zeros(length, patches, train):
    frames = 2 * patches
    size = (frames - 1) * 64 + 256
    samples = sound(length)
    rng = np.random.default_rng(length) if train else None
    view = Input("sound", SMALL, SpectrogramInput(frames=frames, sample_rate=8000))
    made = view.preprocess({"audio": samples}, rng)
    if length > size:
        starts = range(length - size + 1) if train else [(length - size) // 2]
        stretches = [samples[s : s + size] for s in starts]
    else:
        stretches = [np.pad(samples, (0, size - length))]
    assert any(np.array_equal(made["mel"], SMALL.log_mel(s)) for s in stretches)
    begins = [[f * 64 < length for f in (2 * p, 2 * p + 1)] for p in range(patches)]
    assert made["valid"].tolist() == [p == 0 or any(b) for p, b in enumerate(begins)]


def test_training_cuts_at_different_places():
    view = SpectrogramInput(frames=2)
    made = [SMALL.preprocess(view, sound(4000), np.random.default_rng(i))["mel"] for i in (1, 1, 2)]
    np.testing.assert_array_equal(made[0], made[1])
    assert not np.allclose(made[0], made[2])


def test_gain_shifts_what_is_above_the_floor():
    samples, view = sound(448), SpectrogramInput(frames=4, gain_db=10.0)
    plain = SMALL.preprocess(view, samples, None)["mel"]
    shifts = []
    for seed in range(30):
        shift = SMALL.preprocess(view, samples, np.random.default_rng(seed))["mel"] - plain
        assert np.ptp(shift) < 1e-3
        shifts.append(float(shift.mean()))
    assert -0.5 < min(shifts) < -0.3 and 0.3 < max(shifts) < 0.5


def test_a_sound_of_another_rate_is_resampled():
    time = np.arange(22050) / 22050
    tone = 0.5 * np.sin(2 * np.pi * 1000 * time)
    view, modality = SpectrogramInput(frames=32, sample_rate=22050), Spectrogram()
    bare = modality.preprocess(view, tone, None)
    said = modality.preprocess(SpectrogramInput(frames=32), (tone, 22050), None)
    raw = modality.preprocess(view, modality.raw((tone, 22050)), None)
    for other in (said, raw):
        np.testing.assert_array_equal(bare["mel"], other["mel"])
    expected = modality.preprocess(
        view, (0.5 * np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000), 16000), None
    )
    assert (bare["mel"][2:-2].argmax(axis=1) == expected["mel"][2:-2].argmax(axis=1)).all()


# --- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"high": 9000.0}, "between 0 and 8000, half the rate"),
        ({"low": 7700.0}, "do not lie in order"),
        ({"mels": 60}, "mels 60: not a positive multiple of the patch 16"),
        ({"mels": 0}, "Spectrogram.mels is 0; it must be at least 1"),
    ],
)
def test_structural_settings_that_do_not_fit(change, message):
    with pytest.raises(UserError, match=message):
        Spectrogram(**change)


def test_bands_narrower_than_a_bin_are_refused():
    modality = Spectrogram(mels=128, window=256)
    with pytest.raises(UserError, match="of 128 mel bands, the first of them band 1"):
        modality.arrays(SpectrogramInput())


@pytest.mark.parametrize(
    ("frames", "message"),
    [(30, "30: not a positive multiple of the patch 16"), (64, "64 make 4 patches; there are 2")],
)
def test_lengths_that_do_not_fit(frames, message):
    with pytest.raises(UserError, match=message):
        Spectrogram(max_positions=2).arrays(SpectrogramInput(frames=frames))


# --- tokens ------------------------------------------------------------------------------------


def built(modality: Any, width: int = 6) -> tuple[Any, dict[str, np.ndarray]]:
    """Return a modality's stem as a function of arrays, and its (random) parameters."""
    declaration = Declaration(modality.stem(width))
    rng = np.random.default_rng(0)
    p = {name: rng.normal(size=s.shape).astype(np.float32) for name, s in declaration.specs.items()}
    call = jax.jit(lambda p, arrays: declaration.merge(p)(arrays))
    return lambda arrays: call(p, arrays), p


def normed(p: dict[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Return `Positions`' layer norm of summed table rows, in NumPy."""
    centred = rows - rows.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + 1e-6)
    return scaled * p["positions/norm/scale"] + p["positions/norm/bias"]


def test_tokens_are_projected_patches_and_positions_time_first():
    modality = Spectrogram(patch_frames=2, patch_mels=4, mels=12, max_positions=6)
    stem, p = built(modality)
    grid = np.random.default_rng(1).normal(size=(2, 6, 12)).astype(np.float32)
    valid = np.array([[1, 0, 0], [1, 1, 1]], bool)
    stream = stem({"mel": grid, "valid": valid})
    tables = p["positions/tables/t"], p["positions/tables/f"]
    assert tables[1].shape == (3, 6)
    for b in range(2):
        for t in range(3):
            for f in range(3):
                patch = grid[b, 2 * t : 2 * t + 2, 4 * f : 4 * f + 4].ravel()
                token = patch @ p["embed/kernel"] + p["embed/bias"]
                token = token + normed(p, tables[0][2 * t] + tables[1][f])
                np.testing.assert_allclose(stream.x_BSD[b, 3 * t + f], token, rtol=1e-4, atol=1e-5)
                assert bool(stream.valid_BS[b, 3 * t + f]) == bool(valid[b, t])


def test_cut_keeps_every_value():
    grid = np.arange(2 * 4 * 6).reshape(2, 4, 6)
    patches = np.asarray(cut(grid, (2, 3)))
    assert patches.shape == (2, 4, 6)
    np.testing.assert_array_equal(patches[1, 2], grid[1, 2:4, 0:3].ravel())


def test_another_length_reads_the_same_parameters():
    modality = Spectrogram(patch_frames=2, patch_mels=4, mels=8, max_positions=8)
    stem, _ = built(modality)

    def positions(steps: int) -> np.ndarray:
        arrays = {"mel": np.zeros((1, 2 * steps, 8)), "valid": np.ones((1, steps), bool)}
        return np.asarray(stem(arrays).x_BSD).reshape(steps, 2, -1)

    np.testing.assert_allclose(positions(4), positions(8)[::2], atol=1e-6)
    assert len(np.unique(positions(8).reshape(16, -1), axis=0)) == 16
