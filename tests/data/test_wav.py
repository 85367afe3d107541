"""WAV files as programs write them."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
from wav_files import wav

from mmjax.core.errors import UserError
from mmjax.modalities.waveform import Waveform, read

RATE = 16000


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


SAMPLES = np.random.default_rng(1).integers(-(2**15), 2**15, (800, 2)).astype("<i2")


def riff(
    form: bytes, content: bytes, *, riff_size: int | None = None, size: int | None = None
) -> bytes:
    """Return a WAV file of a `fmt ` and a `data` chunk, with other sizes in its header where they are given."""
    size = len(content) if size is None else size
    body = b"WAVE" + b"fmt " + struct.pack("<I", len(form)) + form + b"data"
    whole = len(body) + 4 + len(content) if riff_size is None else riff_size
    return b"RIFF" + struct.pack("<I", whole) + body + struct.pack("<I", size) + content


def form(tag: int, bits: int, channels: int = 2, rate: int = 8000) -> bytes:
    block = channels * bits // 8
    return struct.pack("<HHIIHH", tag, channels, rate, rate * block, block, bits)


def extensible(tag: int, bits: int) -> bytes:
    """Return a file as Microsoft's WAVEFORMATEXTENSIBLE: size 22, valid bits, speakers, and the id of the format."""
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


def test_a_sound_that_is_too_long_is_not_decoded():
    """By the header: 200 kB that are 20,000 s at 10 Hz would be 1.3 GB at 16 kHz."""
    data = riff(form(1, 8, channels=1, rate=10), bytes(200_000))
    tracemalloc.start()
    with pytest.raises(UserError, match="lasts 20000 s, over the bound of 3600 s"):
        Waveform().raw(data)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    with pytest.raises(UserError, match="lasts 20000 s"):
        Waveform().raw((np.zeros(200_000, np.int16), 10))
