"""The voice engine: the same words sound the same, whatever was rendered before."""

from __future__ import annotations

import sys
from pathlib import Path

import espeakng_loader
import numpy as np
import pytest

from mmjax.core.errors import UserError
from mmjax.datasets import espeak

FOLDER = Path(espeakng_loader.__file__).parent
VOICES = ("en", "en+f2")
TEXTS = ("red apple", "egg", "grinning face with big eyes", "Côte d’Ivoire", "egg")


def _say(texts, voices=VOICES):
    return list(espeak.say(FOLDER, voices, texts))


@pytest.fixture(scope="module")
def said():
    return _say(TEXTS)


def test_what_was_said_before_is_not_heard(said):
    """The engine alone does not do this: see the next test."""
    assert said[1] == said[4]
    assert _say(TEXTS[::-1]) == said[::-1]
    assert _say(["red apple"]) == said[:1]


def test_the_engine_alone_remembers():
    engine = espeak.Engine(FOLDER)
    assert engine.say("en", "egg") != engine.say("en", "egg")


def test_a_caption_is_as_long_as_speech(said):
    seconds = {
        (text, voice): len(samples) / 2 / espeak.RATE
        for text, utterances in zip(TEXTS, said, strict=True)
        for voice, samples in zip(VOICES, utterances, strict=True)
    }
    for voice in VOICES:
        assert 0.15 < seconds["egg", voice] < 0.6
        assert 1.0 < seconds["grinning face with big eyes", voice] < 2.5
        assert seconds["egg", voice] < seconds["red apple", voice]


def test_no_utterance_loses_its_end(said):
    """With a short buffer, a voice with an echo is cut off; this one's takes 140 ms."""
    for utterances in said:
        for samples in utterances:
            sound = np.frombuffer(samples, "<i2").astype(float)
            assert np.std(sound[-110:]) < 0.12 * np.std(sound)
            assert 3000 < np.abs(sound).max() < 2**15 - 1
        plain, echoing = (len(samples) / 2 / espeak.RATE for samples in utterances)
        assert echoing > plain + 0.1


def test_letters_beyond_ascii_are_said(said):
    """English reads ô as o; taken for Latin-1, two letters would be four."""
    assert _say(["Cote d'Ivoire"])[0] == said[3]
    assert _say([TEXTS[3].encode().decode("latin-1")])[0] != said[3]
    assert 0.5 < len(said[3][0]) / 2 / espeak.RATE < 1.5


def test_a_voice_that_is_not_there():
    with pytest.raises(UserError, match="cannot render 'egg' in the voice zz: it has no voice zz"):
        _say(["egg"], ["zz"])


def test_a_package_without_its_library(tmp_path):
    with pytest.raises(UserError, match="cannot render 'egg'.*has no library"):
        list(espeak.say(tmp_path, VOICES, ["egg"]))


def test_a_process_that_dies_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UserError, match="cannot render 'egg'.*it ended with status 3"):
        _say(["egg"])


def test_who_stops_listening_leaves_no_process(monkeypatch):
    started = []
    popen = espeak.subprocess.Popen

    def remember(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(espeak.subprocess, "Popen", remember)
    spoken = espeak.say(FOLDER, VOICES, list(TEXTS) * 50)
    next(spoken)
    spoken.close()
    assert started[0].poll() is not None
