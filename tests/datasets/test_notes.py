"""Instrument notes: what is in the data set, and that the recordings are in tune."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pretty_midi
import pytest
import tensorflow_datasets as tfds
from etils import epath

from mmjax.core.errors import UserError
from mmjax.datasets import build, notes
from mmjax.datasets.soundfont import SoundFont

LIMIT = 120
# Pianos, guitars, basses, bowed strings, brass, reeds, pipes: sounds with one clear pitch.
IN_TUNE = [
    *range(8),
    *range(24, 31),
    *range(32, 44),
    *range(56, 61),
    *range(64, 72),
    *range(72, 76),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build.build("notes", epath.Path(tmp_path_factory.mktemp("notes")), limit=LIMIT)


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
def font():
    return SoundFont(notes.SOUNDFONT.path("TimGM6mb.sf2"))


# What is in it


def test_names_are_those_of_general_midi(info, every):
    """Against the package's own interface."""
    names = [pretty_midi.program_to_instrument_name(program).lower() for program in range(128)]
    families = [pretty_midi.program_to_instrument_class(program).lower() for program in range(128)]
    assert info.features["program"].names == names
    assert info.features["family"].names == list(dict.fromkeys(families))
    for record in every:
        assert record["caption"].decode() == names[record["program"]]
        assert info.features["family"].int2str(record["family"]) == families[record["program"]]
    assert names[0] == "acoustic grand piano" and families[0] == "piano"


def test_records_have_the_documented_types(every, info):
    assert set(info.features) == {"audio", "program", "family", "pitch", "velocity", "caption"}
    assert len(every) == len({(r["program"], r["pitch"]) for r in every}) == LIMIT
    for record in every:
        assert record["audio"].shape == (11_025,) and record["audio"].dtype == np.int16
        assert record["pitch"] in notes.PITCHES and 48 <= record["velocity"] <= 127


def test_notes_are_loud_by_their_velocity_and_end_in_silence(every):
    for record in every:
        sound = record["audio"].astype(int)
        assert np.abs(sound).max() == pytest.approx(0.9 * 2**15 * record["velocity"] / 127, abs=1)
        assert np.std(sound) > 200, record["caption"]
        assert np.abs(sound[-5:]).max() < 0.1 * np.abs(sound).max()


def test_every_instrument_plays_nearly_every_key(font, built):
    """The whole data set, without playing it."""
    there = [note for note in notes._all_notes() if font.regions(0, *note, 100)]
    left_out = [list(note) for note in notes._all_notes() if note not in there]
    assert len(there) == 4991 and built.manifest["audio"]["notes_left_out"] == left_out
    counts = {split: sum(notes.split_of(p) == split for _, p in there) for split in notes.SPLITS}
    assert counts == {"train": 4351, "test_pitch": 640}
    assert {program for program, _ in there} == set(range(128))


# Splits


def test_held_out_pitches_are_in_no_other_split(records):
    pitches = {split: {r["pitch"] for r in found} for split, found in records.items()}
    assert not pitches["train"] & pitches["test_pitch"]
    assert pitches["test_pitch"] <= {42, 45, 46, 54, 66}


def test_shares_of_the_splits():
    """Of more keys than there are: the hash takes 15 %."""
    splits = [notes.split_of(pitch) for pitch in range(20_000)]
    assert splits.count("test_pitch") / len(splits) == pytest.approx(0.15, abs=0.01)


def test_splits_are_pinned():
    """Another hash would move test notes into the training of runs that are half done."""
    assert [p for p in notes.PITCHES if notes.split_of(p) == "test_pitch"] == [42, 45, 46, 54, 66]


def test_velocity_says_nothing_of_the_instrument():
    means = [np.mean([notes.velocity_of(p, k) for k in notes.PITCHES]) for p in notes.PROGRAMS]
    assert np.mean(means) == pytest.approx(87.5, abs=1)
    assert np.std(means) < 6  # of the means of 39 draws: 3.7


# Pitch


@pytest.mark.parametrize("pitch", [42, 54, 66, 77])
def test_instruments_are_in_tune(font, pitch):
    """Within 30 cents of equal temperament, by the autocorrelation of the note's middle."""
    hertz = 440 * 2 ** ((pitch - 69) / 12)
    for program in IN_TUNE:
        if font.regions(0, program, pitch, 100):
            found = _pitch(notes.render(font, (program, pitch)), hertz)
            assert abs(1200 * np.log2(found / hertz)) < 30, (program, found, hertz)


def test_the_measure_hears_a_semitone(font):
    for program in IN_TUNE[::6]:
        sound = notes.render(font, (program, 60))
        for semitones in (-1, 1):
            wrong = 440 * 2 ** ((60 + semitones - 69) / 12)
            off = 1200 * np.log2(_pitch(sound, wrong) / wrong)
            assert off == pytest.approx(-100 * semitones, abs=30)


def _pitch(sound, near):
    """Return the frequency (Hz) of the highest autocorrelation within two semitones of `near`."""
    middle = sound[1200:7000].astype(float)
    middle -= middle.mean()
    size = 1 << 14
    correlation = np.fft.irfft(np.abs(np.fft.rfft(middle, size)) ** 2)[:500]
    correlation /= len(middle) - np.arange(500)
    period = notes.RATE / near
    low, high = int(period * 2 ** (-2 / 12)), int(period * 2 ** (2 / 12)) + 2
    top = low + int(correlation[low:high].argmax())
    left, peak, right = correlation[top - 1 : top + 2]
    return notes.RATE / (top + (left - right) / (2 * (left - 2 * peak + right)))


def test_instruments_differ(font):
    """No two play the same sound: the spectra of their notes on one key."""
    spectra = np.stack([_spectrum(notes.render(font, (p, 60))) for p in notes.PROGRAMS])
    likeness = spectra @ spectra.T - np.eye(len(spectra))
    assert np.median(likeness) < 0.7
    assert likeness.max() < 0.9999


def _spectrum(sound):
    frames = sound[:11_008].reshape(43, 256) * np.hanning(256)
    levels = np.log1p(np.abs(np.fft.rfft(frames))).ravel()
    levels -= levels.mean()
    return levels / np.linalg.norm(levels)


# Identity


def test_the_manifest_states_the_licences(built):
    (source,) = built.manifest["sources"]
    assert "GPL-2.0" in source["licence"] and "TimGM6mb" in source["attribution"]
    audio = built.manifest["audio"]
    assert audio["synthetic"] is False and audio["rate"] == 11_025
    assert audio["pitches"]["test_pitch"] == [42, 45, 46, 54, 66]


def test_two_builds_give_equal_records(built, records, tmp_path):
    """In another process, without importing the package that has the soundfont."""
    code = (
        "import sys; from mmjax.datasets import build;"
        f"build.build('notes', sys.argv[1], limit={LIMIT});"
        "assert not {'tensorflow', 'pretty_midi', 'mido'} & set(sys.modules)"
    )
    path = os.pathsep.join(entry for entry in sys.path if entry)
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": path},
        check=True,
        timeout=300,
    )
    other = build.find("notes", tmp_path)
    assert other.manifest["digest"] == built.manifest["digest"]
    first = tfds.builder_from_directory(other.path).as_data_source(split="train")[3]
    assert np.array_equal(first["audio"], records["train"][3]["audio"])


# Errors


def test_a_missing_package_is_named_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pretty_midi", None)
    with pytest.raises(UserError, match=r"pretty_midi.*pip install 'mmjax\[data\]'"):
        build.build("notes", tmp_path, limit=LIMIT)


def test_a_package_of_another_layout(monkeypatch, tmp_path):
    package = tmp_path / "pretty_midi"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pretty_midi", raising=False)
    with pytest.raises(UserError, match=r"pretty_midi has no constants\.py"):
        notes.load_names()
    (package / "constants.py").write_text(
        "INSTRUMENT_MAP = ['Piano']\nraise AssertionError('run')\n"
    )
    with pytest.raises(UserError, match="does not name the 128 instruments"):
        notes.load_names()


def test_a_limit_that_empties_a_split(tmp_path):
    with pytest.raises(UserError, match=r"limit=1 the split '\w+' would be empty"):
        build.build("notes", tmp_path, limit=1)
