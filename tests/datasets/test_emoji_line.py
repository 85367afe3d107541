"""Line art of the emoji concepts: what is drawn, of which concepts, in which split."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image, ImageDraw, ImageFont

from mmjax.core.errors import UserError
from mmjax.datasets import build, emoji, emoji_line


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build.build("emoji_line", epath.Path(tmp_path_factory.mktemp("line")))


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


def test_every_concept_of_one_code_point_is_drawn_once(records, every, concepts):
    found = [record["concept"] for record in every]
    assert sorted(found) == [c.index for c in concepts if "-" not in c.codepoints]
    assert {split: len(part) for split, part in records.items()} == {
        "test_line": 1181,
        "test_line_concept": 196,
    }


def test_fields_and_labels_are_those_of_the_emoji_data(every, info, concepts):
    features = emoji.features(concepts, emoji.VENDORS)
    assert set(info.features) == set(features)
    assert info.features["vendor"].names == ["noto_line"]
    for name in ("group", "subgroup"):
        assert info.features[name].names == features[name].names
    for record in every:
        concept = concepts[record["concept"]]
        assert record["codepoints"].decode() == concept.codepoints
        assert record["caption"].decode() == concept.caption
        assert info.features["group"].int2str(record["group"]) == concept.group
        assert record["image"].shape == (64, 64, 4)


def test_concepts_are_in_the_split_that_the_emoji_data_gives_them(records):
    for split, found in records.items():
        for record in found:
            drawn = emoji.split_of(record["codepoints"].decode(), "twemoji")
            assert (drawn == "test_concept") == (split == "test_line_concept")


def test_drawings_are_black_lines_within_the_picture(every):
    for record in every:
        image = record["image"]
        assert not image[..., :3].any()
        inked = np.argwhere(image[..., 3] > 128)
        assert 15 < len(inked) < 3600, record["caption"]
        edge = np.concatenate([image[[0, -1], :, 3].ravel(), image[:, [0, -1], 3].ravel()])
        assert edge.max() < 255, record["caption"]
        assert np.abs(inked.mean(0) - 31.5).max() < 18, record["caption"]


def test_no_two_drawings_of_other_glyphs_are_the_same(every):
    different = {record["image"].tobytes() for record in every}
    assert len(different) > 0.99 * len(every)


def test_drawings_match_the_font_drawn_large(every):
    """Eight times the size, shrunk by averaging; against the next glyph it is far off."""
    path = str(emoji_line.VENDOR.source.path("NotoEmoji[wght].ttf"))
    font = ImageFont.truetype(path, 400, layout_engine=ImageFont.Layout.BASIC)
    chosen = every[::60]
    references = [_large(font, chr(int(r["codepoints"].decode(), 16))) for r in chosen]
    own = [_off(r["image"], reference) for r, reference in zip(chosen, references, strict=True)]
    other = [_off(r["image"], wrong) for r, wrong in zip(chosen[1:], references, strict=False)]
    assert np.median(own) < 12 and max(own) < 25
    assert np.median(other) > 50


def _large(font, character):
    image = Image.new("L", (512, 512))
    ImageDraw.Draw(image).text((256, 256), character, fill=255, font=font, anchor="mm")
    return np.asarray(image.resize((64, 64), Image.Resampling.BOX)).astype(float)


def _off(image, reference):
    return np.abs(image[..., 3] - reference).mean()


def test_a_glyph_that_the_font_lacks_is_left_out(monkeypatch, tmp_path, concepts):
    lacking = next(c for c in concepts if "-" not in c.codepoints)
    unknown = emoji.Concept(
        lacking.index, "10fffe", "nothing", {}, lacking.group, lacking.subgroup, {}
    )
    monkeypatch.setattr(
        emoji, "load_concepts", lambda: [unknown if c is lacking else c for c in concepts]
    )
    again = build.build("emoji_line", tmp_path)
    counts = [facts["examples"] for facts in again.manifest["splits"].values()]
    assert sum(counts) == again.manifest["concepts"]["built"] == 1376


def test_a_small_build_is_a_part_of_the_whole(tmp_path, built, every):
    whole = {record["concept"]: record for record in every}
    small = build.build("emoji_line", tmp_path, limit=30)
    sources = tfds.builder_from_directory(small.path).as_data_source()
    found = [source[i] for source in sources.values() for i in range(len(source))]
    assert len(found) == 30
    for record in found:
        assert all(np.array_equal(record[n], whole[record["concept"]][n]) for n in record)
    assert small.manifest["concepts"]["sha256"] == built.manifest["concepts"]["sha256"]


def test_the_manifest_states_the_licences(built):
    sources = {source["package"]: source for source in built.manifest["sources"]}
    assert sources["manimgx-fonts"]["licence"] == "OFL-1.1"
    assert "Noto Emoji" in sources["manimgx-fonts"]["attribution"]


def test_a_drawing_is_a_png():
    png = emoji_line.draw(emoji_line.load_font(), "\N{RED APPLE}")
    with Image.open(io.BytesIO(png)) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGBA", (64, 64))


def test_a_missing_package_is_named_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "manimgx_fonts", None)
    with pytest.raises(UserError, match=r"manimgx-fonts.*pip install 'mmjax\[data\]'"):
        build.build("emoji_line", tmp_path)


def test_a_limit_that_empties_a_split(tmp_path):
    with pytest.raises(UserError, match=r"limit=1 the split '\w+' would be empty"):
        build.build("emoji_line", tmp_path, limit=1)
