"""Sound as samples: reading it in every form, cutting it, and its tokens against NumPy."""

from __future__ import annotations

import io
import math
import struct
import tracemalloc
import wave
from typing import Any

import jax
import numpy as np
import pytest
import scipy.signal
from hypothesis import given
from hypothesis import strategies as st

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


def wav(samples: np.ndarray, width: int, rate: int = 8000) -> bytes:
    """A WAV file of integer samples `[N, channels]`, written by the standard library."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        if width == 1:
            file.writeframes(samples.astype(np.uint8).tobytes())
        else:
            each = [int(s).to_bytes(width, "little", signed=True) for s in samples.ravel()]
            file.writeframes(b"".join(each))
    return out.getvalue()


def built(modality: Any, width: int = 6) -> tuple[Any, dict[str, np.ndarray]]:
    """A modality's stem as a function of arrays, and its (random) parameters."""
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


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_wav_files(width, channels):
    full = 2 ** (8 * width - 1)
    rng = np.random.default_rng(0)
    samples = rng.integers(-full, full, size=(50, channels))
    stored = samples + 128 if width == 1 else samples
    found, rate = read(wav(stored, width, 11025), RATE)
    assert rate == 11025
    np.testing.assert_allclose(found, (samples / full).mean(axis=1), atol=1e-6)


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


# --- WAV as other programs write it ------------------------------------------------------------

SAMPLES = np.random.default_rng(1).integers(-(2**15), 2**15, (800, 2)).astype("<i2")


def riff(
    form: bytes, content: bytes, *, riff_size: int | None = None, size: int | None = None
) -> bytes:
    """A WAV file of a `fmt ` and a `data` chunk, with other sizes in its header where they are given."""
    size = len(content) if size is None else size
    body = b"WAVE" + b"fmt " + struct.pack("<I", len(form)) + form + b"data"
    whole = len(body) + 4 + len(content) if riff_size is None else riff_size
    return b"RIFF" + struct.pack("<I", whole) + body + struct.pack("<I", size) + content


def form(tag: int, bits: int, channels: int = 2, rate: int = 8000) -> bytes:
    block = channels * bits // 8
    return struct.pack("<HHIIHH", tag, channels, rate, rate * block, block, bits)


def extensible(tag: int, bits: int) -> bytes:
    """As Microsoft's WAVEFORMATEXTENSIBLE: size 22, valid bits, speakers, and the id of the format."""
    tail = bytes.fromhex("0000 0000 1000 8000 00aa 0038 9b71".replace(" ", ""))
    return form(0xFFFE, bits) + struct.pack("<HHIH", 22, bits, 3, tag) + tail


@pytest.mark.parametrize(
    ("riff_size", "size"),
    [(0xFFFFFFFF, 0xFFFFFFFF), (None, 0xFFFFFFFF), (0x7FFFF024, 0x7FFFF000), (0, 0), (36, 0)],
)
@pytest.mark.parametrize("tail", [b"", b"\0", b"\0\0\0"])
def test_a_file_written_into_a_pipe_reaches_to_the_end_of_its_bytes(riff_size, size, tail):
    """Sizes as ffmpeg, SoX and recorders that were killed leave them; half a frame at the end is none."""
    data = riff(form(1, 16), SAMPLES.tobytes() + tail, riff_size=riff_size, size=size)
    found, rate = read(data, RATE)
    assert rate == 8000
    np.testing.assert_allclose(found, (SAMPLES / 2**15).mean(axis=1), atol=1e-6)


def test_a_sound_of_no_samples_has_none():
    assert len(read(riff(form(1, 16), b""), RATE)[0]) == 0


@pytest.mark.parametrize("bits", [8, 16, 24, 32])
def test_the_extensible_format_of_integers(bits):
    full = 2 ** (bits - 1)
    samples = np.random.default_rng(0).integers(-full, full, (50, 2))
    width = bits // 8
    stored = [int(s + 128 if bits == 8 else s) for s in samples.ravel()]
    content = b"".join(s.to_bytes(width, "little", signed=bits > 8) for s in stored)
    found, _ = read(riff(extensible(1, bits), content), RATE)
    np.testing.assert_allclose(found, (samples / full).mean(axis=1), atol=1e-6)


@pytest.mark.parametrize("make", [form, extensible])
@pytest.mark.parametrize("dtype", ["<f4", "<f8"])
def test_floats(make, dtype):
    samples = np.random.default_rng(0).uniform(-1, 1, (50, 2)).astype(dtype)
    found, _ = read(riff(make(3, 8 * samples.itemsize), samples.tobytes()), RATE)
    np.testing.assert_allclose(found, samples.mean(axis=1), atol=1e-6)


def test_other_chunks_are_passed_over():
    data = riff(form(1, 16), SAMPLES.tobytes())
    note = b"LIST" + struct.pack("<I", 3) + b"abc\0"  # an odd size is padded
    found, _ = read(data[:12] + note + data[12:] + note, RATE)
    np.testing.assert_allclose(found, (SAMPLES / 2**15).mean(axis=1), atol=1e-6)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (form(6, 8), r"holds A-law \(format 6\); give PCM"),
        (form(0x11, 4), r"holds IMA ADPCM \(format 17\)"),
        (form(0x1234, 16), r"holds another format \(format 4660\)"),
        (form(1, 64), r"holds PCM of 64 bits \(format 1\)"),
        (form(3, 16), r"holds floats of 16 bits \(format 3\)"),
        (extensible(7, 8), r"holds mu-law \(format 7\)"),
        (extensible(1, 16)[:-1] + b"\0", r"is of format 0100[0-9a-f]+00; give PCM"),
    ],
)
def test_a_format_that_is_not_read_is_named_and_is_no_damage(header, words):
    with pytest.raises(UserError, match=words):
        read(riff(header, bytes(64)), RATE)


@pytest.mark.parametrize(
    "data",
    [
        riff(form(1, 16, channels=0), bytes(64)),
        riff(form(1, 16, rate=0), bytes(64)),
        riff(form(1, 16), bytes(64), size=65),
        riff(extensible(1, 16)[:30], bytes(64)),
        riff(form(1, 16)[:10], bytes(64)),
        b"no sound at all",
        b"",
    ],
)
def test_damage_is_no_format(data):
    with pytest.raises(ValueError, match="a WAV file"):
        read(data, RATE)


# --- bounds ------------------------------------------------------------------------------------


def test_a_sound_that_is_too_long_is_not_decoded():
    """The header says so: 200 kB that are 20,000 s at 10 Hz would be 1.3 GB at 16 kHz."""
    data = riff(form(1, 8, channels=1, rate=10), bytes(200_000))
    tracemalloc.start()
    with pytest.raises(UserError, match="lasts 20000 s, over the bound of 3600 s"):
        Waveform().raw(data)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    with pytest.raises(UserError, match="lasts 20000 s"):
        Waveform().raw((np.zeros(200_000, np.int16), 10))


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
    """`Positions`' layer norm of summed table rows, in NumPy."""
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
