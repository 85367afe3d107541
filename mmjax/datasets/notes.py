"""Notes of the 128 General MIDI instruments: recordings of a soundfont, played one note at a time.

Real sound, unlike `mmjax.datasets.speech`: the soundfont TimGM6mb holds recorded instruments. Each
instrument plays every key of `PITCHES` for one second, in one loudness that the hash of both
chooses; a key that the soundfont has no recording for is skipped. Every note is scaled to a peak
of 0.9 `velocity` / 127, so that loudness does not reveal the instrument. Keys are held out, by
hash:

- `train`: most keys, of all instruments.
- `test_pitch`: about 15 % of the keys, in which training hears no instrument.

Each record: `audio` int16 [11025] at 11,025 samples per second, `program` (class label, the
instrument), `family` (class label, its kind), `pitch` (MIDI key, 60 is middle C), `velocity`
(MIDI, to 127) and `caption` (the instrument's name).
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from numpy.typing import NDArray

from mmjax.core.errors import UserError
from mmjax.datasets import packages, writer
from mmjax.datasets.build import Made
from mmjax.datasets.packages import PackageSource
from mmjax.datasets.soundfont import SoundFont, play

RATE = 11_025
SECONDS = 1.0
PITCHES = range(40, 79)
PROGRAMS = range(128)
SPLITS = ("train", "test_pitch")
HELD_OUT = 0.15

SOUNDFONT = PackageSource(
    "pretty_midi",
    "pretty_midi",
    "recorded instruments (TimGM6mb.sf2), and their names",
    "GPL-2.0 (TimGM6mb.sf2, as Debian states), MIT (pretty_midi)",
    "TimGM6mb, a soundfont by Tim Brechbill, in the pretty_midi package, copyright Colin Raffel"
    " (https://github.com/craffel/pretty-midi). Changed: played as single notes.",
)
_SOURCES = (SOUNDFONT,)
_TOOLS = {"scipy": "scipy"} | packages.WRITING
_HELD = 0.8  # seconds until the key is let go
_FADE = 0.01  # seconds at the end, so that no note ends in a click
_SOFTEST, _LOUDEST = 48, 127
_PEAK = 0.9
_MELODIC_BANK = 0

Note = tuple[int, int]
"""Program and pitch."""


def prepare(root: epath.Path, limit: int | None = None) -> Made:
    """Write the data set under `root` (local); `limit` takes that many notes, for tests."""
    packages.check(_SOURCES, _TOOLS)
    names, families = load_names()
    font = SoundFont(SOUNDFONT.path("TimGM6mb.sf2"))
    all_notes = [note for note in _all_notes() if _regions(font, note)]
    chosen = sorted(sorted(all_notes, key=lambda note: _fraction("limit", *note))[:limit])
    of = {split: [note for note in chosen if split_of(note[1]) == split] for split in SPLITS}
    writer.check_splits({split: len(entries) for split, entries in of.items()}, limit)

    def records(split: str) -> Iterator[tuple[str, writer.Record]]:
        for note in of[split]:
            yield "{}/{}".format(*note), _record(font, note, names, families)

    path = writer.write(
        "notes",
        root,
        description=__doc__ or "",
        features=_features(names, families),
        licence=packages.licences(_SOURCES),
        splits={split: records(split) for split in SPLITS},
    )
    audio = {
        "rate": RATE,
        "synthetic": False,
        "statement": "Recorded instruments of a soundfont, played note by note by a sampler.",
        "pitches": {split: [p for p in PITCHES if split_of(p) == split] for split in SPLITS},
        "notes_left_out": [list(note) for note in _all_notes() if not _regions(font, note)],
    }
    return Made(path, {"audio": audio, **packages.facts(_SOURCES, _TOOLS)})


def split_of(pitch: int) -> str:
    """Return the split that the notes of this key belong to."""
    return "test_pitch" if _fraction("pitch", pitch) < HELD_OUT else "train"


def velocity_of(program: int, pitch: int) -> int:
    """Return how hard the key is struck, as MIDI velocity."""
    return _SOFTEST + int(_fraction("velocity", program, pitch) * (_LOUDEST + 1 - _SOFTEST))


def _fraction(purpose: str, *numbers: int) -> float:
    """Return a number in [0, 1), fixed by the numbers; independent between purposes."""
    words = ".".join(str(number) for number in numbers)
    digest = hashlib.sha256(f"notes/{purpose}:{words}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _all_notes() -> list[Note]:
    return [(program, pitch) for program in PROGRAMS for pitch in PITCHES]


def load_names() -> tuple[list[str], list[str]]:
    """Return the names of the 128 instruments and of the 16 families of eight, in lower case."""
    path = SOUNDFONT.path("constants.py")
    names, families = (
        [name.lower() for name in _constant(path, constant)]
        for constant in ("INSTRUMENT_MAP", "INSTRUMENT_CLASSES")
    )
    if len(set(names)) != len(PROGRAMS) or 8 * len(families) != len(PROGRAMS):
        raise UserError(
            f"The installed {SOUNDFONT.package} does not name the 128 instruments of General MIDI."
            " Install the one that mmjax names: pip install 'mmjax[data]'"
        )
    return names, families


def _constant(path: Path, name: str) -> list[str]:
    """Return the list that the module gives to `name`, read from its text: importing it takes a library."""
    for statement in ast.parse(path.read_text("utf-8")).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            return list(ast.literal_eval(statement.value))
    return []


def _features(names: list[str], families: list[str]) -> dict[str, tfds.features.FeatureConnector]:
    return {
        "audio": writer.audio(round(SECONDS * RATE)),
        "program": tfds.features.ClassLabel(names=names),
        "family": tfds.features.ClassLabel(names=families),
        "pitch": tfds.features.Scalar(dtype=np.int64),
        "velocity": tfds.features.Scalar(dtype=np.int64),
        "caption": tfds.features.Text(),
    }


def _record(font: SoundFont, note: Note, names: list[str], families: list[str]) -> writer.Record:
    program, pitch = note
    return {
        "audio": render(font, note),
        "program": program,
        "family": program // 8,
        "pitch": pitch,
        "velocity": velocity_of(*note),
        "caption": names[program],
    }


def _regions(font: SoundFont, note: Note) -> list:
    return font.regions(_MELODIC_BANK, *note, velocity_of(*note))


def render(font: SoundFont, note: Note) -> NDArray[np.int16]:
    """Return the note as int16 `[11025]`."""
    sound = play(_regions(font, note), SECONDS, _HELD, RATE)
    left = np.arange(len(sound))[::-1] / RATE
    sound *= np.minimum(left / _FADE, 1)
    peak = _PEAK * 2**15 * velocity_of(*note) / _LOUDEST
    return np.rint(sound * (peak / np.abs(sound).max())).astype(np.int16)
