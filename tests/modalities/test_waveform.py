"""Sound as samples: reading it in every form, cutting it, and its tokens against NumPy."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
import pytest
import scipy.signal
from hypothesis import given
from hypothesis import strategies as st
from wav_files import wav

from mmjax.core.errors import UserError
from mmjax.core.migrations import upgrade
from mmjax.core.parameters import Declaration
from mmjax.modalities.base import Input
from mmjax.modalities.spectrogram import Spectrogram
from mmjax.modalities.waveform import Waveform, WaveformInput, at_rate, read, window
from mmjax.nn.positions import Positions

RATE = 16000


def sine(hertz: float, seconds: float, rate: int = RATE, amplitude: float = 0.5) -> np.ndarray:
    return amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def built(modality: Any, width: int = 6) -> tuple[Any, dict[str, np.ndarray]]:
    """Return a modality's stem as a function of arrays, and its (random) parameters."""
    declaration = Declaration(modality.stem(width))
    rng = np.random.default_rng(0)
    p = {name: rng.normal(size=s.shape).astype(np.float32) for name, s in declaration.specs.items()}
    call = jax.jit(lambda p, arrays: declaration.merge(p)(arrays))
    return lambda arrays: call(p, arrays), p


# --- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (np.array([0, 16384, -32768], np.int16), [0, 0.5, -1]),
        (np.array([0, 16384, -32768], np.int64), [0, 0.5, -1]),
        (np.array([0, 2**30, -(2**31)], np.int32), [0, 0.5, -1]),
        (np.array([128, 192, 0], np.uint8), [0, 0.5, -1]),
        (np.array([0, 0.5, -1], np.float64), [0, 0.5, -1]),
        ([0.0, 0.5, -1.0], [0, 0.5, -1]),
        (np.array([[0, 0], [16384, 0], [-32768, -32768]], np.int16), [0, 0.25, -1]),
        (np.array([[0.5], [0.25]]), [0.5, 0.25]),
    ],
)
def test_samples_of_every_type_are_float_of_full_scale_1(samples, expected):
    found, rate = read(samples, 8000)
    assert found.dtype == np.float32 and rate == 8000
    np.testing.assert_allclose(found, expected, atol=1e-7)


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (wav(np.arange(100).reshape(-1, 1), 2)[:-10], "of 100 frames ends early"),
        (wav(np.arange(100).reshape(-1, 1), 2)[:20], "cannot be read: it ends early"),
        (b"RIFFxxxxWAVE", "cannot be read"),
        (np.array([0.0, np.nan]), "not finite"),
        ([np.inf], "not finite"),
    ],
)
def test_damaged_data_is_no_user_error_so_that_a_run_goes_on(damaged, message):
    with pytest.raises(ValueError, match=message):
        read(damaged, RATE)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"fLaC....", "FLAC"),
        (b"OggS....", "Ogg"),
        (np.zeros(4, bool), "found bool"),
        (np.array(["a"]), "found <U1"),
        (np.array([0.0, 12000.0]), "12000 times full scale"),
        (np.array([0, 70000]), "times full scale"),
        (np.zeros((2, 100)), r"found \[2, 100\]"),
        (np.zeros((2, 2, 2)), r"found \[2, 2, 2\]"),
        ((np.zeros(4), 0), "whole number of Hz"),
        ((np.zeros(4), 16000.5), "whole number of Hz"),
        ((np.zeros(4), -8000.0), "whole number of Hz"),
        ((np.zeros(4), float("inf")), "whole number of Hz"),
        ((np.zeros(4), True), "whole number of Hz"),
        ((np.zeros(4), [8000]), "whole number of Hz"),
        ((np.zeros(4), "8000"), "whole number of Hz"),
        ((np.zeros(4), 16000, 1), "whole number of Hz"),
    ],
)
def test_what_is_no_sound_is_said(value, message):
    with pytest.raises(UserError, match=message):
        read(value, RATE)


@pytest.mark.parametrize(
    "rate", [11025, 11025.0, np.float32(11025), np.int64(11025), np.array(11025)], ids=repr
)
def test_a_rate_is_a_whole_number_of_whatever_type(rate):
    found = read((np.zeros(4), rate), RATE)[1]
    assert found == 11025 and type(found) is int


# --- bounds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("modality", [Waveform, Spectrogram])
def test_the_bound_is_a_key(modality):
    sound = (np.zeros(8000, np.float32), 8000)
    modality(max_seconds=1.0).raw(sound)
    with pytest.raises(UserError, match="lasts 1 s, over the bound of 0.9 s"):
        modality(max_seconds=0.9).raw(sound)
    with pytest.raises(UserError, match="max_seconds is 0"):
        modality(max_seconds=0.0)


def test_a_rate_whose_filter_would_fill_the_memory_is_refused():
    with pytest.raises(UserError, match="2147483647 Hz is not resampled to 16000 Hz"):
        Waveform().raw((np.zeros(4), 2**31 - 1))
    assert len(Waveform().raw((np.zeros(192), 192000))[0]) == 16


def test_older_configs_have_no_bound():
    modalities = {"a": {"name": "waveform"}, "b": {"name": "spectrogram"}, "c": {"name": "text"}}
    upgraded = upgrade({"modalities": modalities}, 1)["modalities"]
    assert upgraded["a"]["max_seconds"] == upgraded["b"]["max_seconds"] == 1e9
    assert "max_seconds" not in upgraded["c"]


@pytest.mark.parametrize("old", [8000, 11025, 22050, 44100, 48000])
def test_resampling_is_that_of_scipy(old):
    samples = np.random.default_rng(0).normal(size=old // 5).astype(np.float32) / 4
    common = math.gcd(old, RATE)
    expected = scipy.signal.resample_poly(samples, RATE // common, old // common)
    found = at_rate((samples, old), RATE)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_resampled_tone_is_the_tone():
    found, rate = Waveform().raw((sine(440, 0.5, 22050), 22050))
    assert rate == RATE and abs(len(found) - RATE // 2) <= 1
    middle = slice(500, 7000)  # away from the ends, where the filter has no neighbours
    np.testing.assert_allclose(found[middle], sine(440, 0.5)[middle], atol=2e-3)


def test_raw_sounds_keep_their_rate_whatever_the_field_has():
    modality = Waveform(patch=4)
    settings = WaveformInput(samples=400, sample_rate=8000)
    raw = modality.raw((sine(300, 0.02, 48000), 48000))
    again = modality.raw(raw)
    np.testing.assert_array_equal(again[0], raw[0])
    made = modality.preprocess(settings, raw, None)["samples"]
    np.testing.assert_array_equal(made[: len(raw[0])], raw[0])
    bare = modality.preprocess(settings, sine(300, 0.02, 8000), None)
    assert bare["valid"].sum() == 320 / 4  # 160 samples at 8 kHz are 320 at 16 kHz


# --- cutting -----------------------------------------------------------------------------------


@given(length=st.integers(0, 60), patches=st.integers(1, 10), train=st.booleans())
def test_a_window_is_a_stretch_of_the_sound_or_the_sound_and_zeros(length, patches, train):
    modality, sound = Waveform(patch=4), np.arange(1, length + 1, dtype=np.float32) / 64
    settings = WaveformInput(samples=4 * patches)
    rng = np.random.default_rng(length) if train else None
    made = Input("sound", modality, settings).preprocess({"audio": sound}, rng)
    samples, valid = made["samples"], made["valid"]
    if length > len(samples):
        start = round(float(samples[0]) * 64) - 1
        np.testing.assert_array_equal(samples, sound[start : start + len(samples)])
        assert train or start == (length - len(samples)) // 2
    else:
        np.testing.assert_array_equal(samples[:length], sound)
        assert not samples[length:].any()
    holds = [p == 0 or p * 4 < length for p in range(patches)]
    assert valid.tolist() == holds


def test_training_sees_every_stretch_and_the_same_one_for_the_same_key():
    sound = np.arange(7, dtype=np.float32)
    starts = {int(window(sound, 4, np.random.default_rng(i))[0][0]) for i in range(60)}
    assert starts == {0, 1, 2, 3}
    pair = [window(sound, 4, np.random.default_rng(5))[0] for _ in range(2)]
    np.testing.assert_array_equal(*pair)


def test_a_window_leaves_the_sound_alone():
    sound = sine(100, 0.01).astype(np.float32)
    before = sound.copy()
    for size in (64, len(sound), 256):
        assert not np.shares_memory(window(sound, size, None)[0], sound)
        made = Waveform(patch=1).preprocess(WaveformInput(samples=size, rms=0.9), sound, None)
        made["samples"] += 1
    np.testing.assert_array_equal(sound, before)


def test_level_scales_the_sound_that_is_there_and_not_silence():
    modality, settings = Waveform(patch=8), WaveformInput(samples=1600, rms=0.2)
    made = modality.preprocess(settings, sine(200, 0.05, amplitude=0.01), None)["samples"]
    assert np.sqrt(np.square(made[:800]).mean()) == pytest.approx(0.2, rel=1e-5)
    for silence in (np.zeros(100), np.zeros(0), np.zeros(4000)):
        assert not modality.preprocess(settings, silence, None)["samples"].any()
    hiss = modality.preprocess(settings, np.full(1600, 1e-7), None)["samples"]
    np.testing.assert_allclose(hiss, 1e-3, rtol=1e-4)  # 80 dB up, no more


def test_gain_is_within_its_bounds_and_in_training_only():
    modality, settings = Waveform(patch=8), WaveformInput(samples=160, gain_db=6.0)
    sound = sine(200, 0.01)
    factors = [
        modality.preprocess(settings, sound, np.random.default_rng(i))["samples"] @ sound / (sound @ sound)
        for i in range(50)
    ]  # fmt: skip
    decibel = 20 * np.log10(factors)
    assert -6 < decibel.min() < -4 and 4 < decibel.max() < 6
    np.testing.assert_allclose(modality.preprocess(settings, sound, None)["samples"], sound, 1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (WaveformInput(samples=100), "100: not a positive multiple of the patch 8"),
        (WaveformInput(samples=88), "88 make 11 patches; there are 10 position buckets"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(UserError, match=message):
        Waveform(patch=8, max_positions=10).arrays(settings)


# --- tokens ------------------------------------------------------------------------------------


def normed(p: dict[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Return `Positions`' layer norm of summed table rows, in NumPy."""
    centred = rows - rows.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + 1e-6)
    return scaled * p["positions/norm/scale"] + p["positions/norm/bias"]


def test_tokens_are_projected_patches_and_positions():
    stem, p = built(Waveform(patch=4, max_positions=8))
    samples = np.random.default_rng(1).normal(size=(2, 16)).astype(np.float32)
    valid = np.array([[1, 1, 0, 0], [1, 1, 1, 1]], bool)
    stream = stem({"samples": samples, "valid": valid})
    for b in range(2):
        for s in range(4):
            patch = samples[b, 4 * s : 4 * s + 4]
            token = patch @ p["embed/kernel"] + p["embed/bias"]
            token = token + normed(p, p["positions/tables/t"][2 * s])
            np.testing.assert_allclose(stream.x_BSD[b, s], token, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(stream.valid_BS, valid)
    np.testing.assert_allclose(stream.coordinates["t"], [[0, 0.25, 0.5, 0.75]])


def test_another_length_reads_the_same_parameters():
    modality = Waveform(patch=4, max_positions=8)
    stem, _ = built(modality)

    def positions(count: int) -> np.ndarray:
        arrays = {"samples": np.zeros((1, 4 * count)), "valid": np.ones((1, count), bool)}
        return np.asarray(stem(arrays).x_BSD[0])

    np.testing.assert_allclose(positions(4), positions(8)[::2], atol=1e-6)
    assert len(np.unique(positions(8), axis=0)) == 8
    assert isinstance(modality.stem(4).positions, Positions)
