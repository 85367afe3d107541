"""Values as people see or hear them."""

import base64
import io
import wave
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmjax.core.config import component
from mmjax.modalities.base import Input
from mmjax.report.preview import as_given, is_sound, preview, shown, strip, wav

Parse = Callable[[str], Any]


@pytest.mark.parametrize(
    "value",
    [
        Image.new("RGBA", (300, 150), (255, 0, 0, 128)),
        Image.new("CMYK", (300, 150)),
        np.zeros((150, 300), np.uint8),
        np.ones((150, 300, 3), np.float32),
        np.zeros((150, 300, 4), np.uint8),
    ],
)
def test_pictures_become_small_png(parse: Parse, value: Any) -> None:
    ((element, attributes),) = parse(preview(value, "a <label>")).elements
    assert element == "img" and attributes["alt"] == "a <label>"
    data = base64.b64decode(attributes["src"].removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(data)).size == (128, 64)


@pytest.mark.parametrize(
    "form", [lambda frames: frames, lambda frames: list(map(Image.fromarray, frames))]
)
def test_clips_move_unless_motion_is_unwanted(parse: Parse, form: Callable[[Any], Any]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)
    page = parse(preview(form(frames), "a clip"))
    (source,), (image,) = page.all("source"), page.all("img")
    assert "prefers-reduced-motion" in source["media"]
    still = Image.open(io.BytesIO(base64.b64decode(source["srcset"].partition(",")[2])))
    assert (np.asarray(still.convert("RGB")) == frames[0]).all()
    moving = Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2])))
    assert getattr(moving, "n_frames", 1) == 5


@pytest.mark.parametrize("rate", [8000, 16_000, 44_100])
@pytest.mark.parametrize("kind", [np.int16, np.int64, np.float32])
def test_sounds_become_wav(rate: int, kind: Any) -> None:
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    samples = (tone * 32768).astype(kind) if np.issubdtype(kind, np.integer) else tone.astype(kind)
    with wave.open(io.BytesIO(wav(np.stack([samples, samples], 1), rate))) as file:
        assert file.getnchannels() == 1 and file.getframerate() == min(rate, 16_000)
        read = np.frombuffer(file.readframes(10**6), "<i2") / 32767
    assert len(read) == pytest.approx(min(rate, 16_000), abs=1)
    peak = np.argmax(np.abs(np.fft.rfft(read)))  # one second: bins are hertz
    assert peak == 440 and np.abs(read[100:-100]).max() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("data", "element", "kind"),
    [
        (b"fLaC rest", "audio", "audio/flac"),
        (b"RIFF1234WAVEfmt ", "audio", "audio/wav"),
        (b"RIFF1234WEBPVP8 ", "img", "image/webp"),
        (b"\x89PNG rest", "img", "image/png"),
        (b"caf\xc3\xa9 <b>", "span", None),
    ],
)
def test_files_are_known_by_how_they_begin(
    parse: Parse, data: bytes, element: str, kind: str | None
) -> None:
    page = parse(preview(data, "label"))
    assert page.elements[0][0] == element
    if kind is None:
        assert page.text == "caf\u00e9 <b>"
    else:
        assert page.elements[0][1]["src"].startswith(f"data:{kind};base64,")


def test_a_modality_may_say_how_it_is_shown() -> None:
    plain = SimpleNamespace(raw=lambda v: v, sample_rate=11_025)
    own = SimpleNamespace(raw=lambda v: v, preview=lambda v: f"seen: {v}")
    samples = np.zeros(10)
    assert shown(Input("own", own, None), "x") == "seen: x"
    assert shown(Input("plain", plain, None), "x") == "x"
    assert shown(Input("plain", plain, None), samples) == (samples, 11_025)


@pytest.mark.parametrize("name", ["waveform", "spectrogram"])
@pytest.mark.parametrize(("rate", "heard"), [(8000, 8000), (0, 16_000)])
def test_sounds_of_a_field_keep_the_rate_that_the_task_states(
    name: str, rate: int, heard: int
) -> None:
    sound = component("modalities", {"name": name}, "modalities.sound")
    each = Input("sound", sound, SimpleNamespace(field="audio", sample_rate=rate))
    tone = np.sin(2 * np.pi * 440 * np.arange(heard) / heard).astype(np.float32)
    samples, found = shown(each, as_given(each, tone))
    assert found == 16_000 and len(samples) == 16_000
    assert np.argmax(np.abs(np.fft.rfft(samples))) == 440


def _picture(attributes: dict[str, str]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(attributes["src"].partition(",")[2])))


@pytest.mark.parametrize("rate", [8000, 11_025, 44_100])
def test_a_sound_has_a_picture_in_which_higher_is_higher(parse: Parse, rate: int) -> None:
    """A low tone, then a high one, is light at the bottom left and the upper right."""
    half = np.arange(rate) / rate
    low, high = (0.5 * np.sin(2 * np.pi * f * half) for f in (rate / 40, min(rate, 16_000) / 4))
    page = parse(preview((np.concatenate([low, high]), rate), "two tones"))
    (image,) = page.all("img")
    assert image["class"] == "spectrum" and image["alt"] == ""
    light = np.asarray(_picture(image).convert("L")).astype(float)
    assert light.shape[0] == 40
    first, second = np.array_split(light, 2, axis=1)
    below, above = first.mean(axis=1).argmax(), second.mean(axis=1).argmax()
    assert below > above + 5
    assert light[below].max() > light.mean() + 40


@pytest.mark.parametrize("samples", [np.zeros(0), np.zeros(3), np.zeros(5000)])
@pytest.mark.parametrize("rate", [50, 8000])
def test_silence_and_hardly_anything_are_sounds_too(
    parse: Parse, samples: np.ndarray, rate: int
) -> None:
    page = parse(preview((samples, rate), "silence"))
    assert len(page.all("audio")) == len(page.all("img")) == 1
    assert is_sound((samples, 8000)) and not is_sound(samples)


def test_a_clip_has_a_film_strip_of_its_frames_in_order(parse: Parse) -> None:
    frames = np.stack([np.full((16, 16, 3), 30 * i, np.uint8) for i in range(8)])
    (image,) = parse(strip(frames) or "").all("img")
    row = np.asarray(_picture(image))[8]
    assert row.shape == (4 * 16 + 3 * 2, 3)
    assert [int(row[i * 18 + 8, 0]) for i in range(4)] == [0, 60, 150, 210]
    for still in (frames[0], frames[:1], "words", b"bytes", (np.zeros(9), 8000)):
        assert strip(still) is None
