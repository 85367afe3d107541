"""Test sets of one more vendor's drawings: which concepts, in which split."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from mmjax.core.errors import UserError
from mmjax.datasets import drawings, emoji
from mmjax.datasets.drawings import Vendor
from mmjax.datasets.packages import PackageSource

# A stand-in for the vendor's package: one that is installed.
PACKAGE = PackageSource("pillow", "PIL", "the drawings", "CC0", "someone")
VENDOR = Vendor("emoji_made", "made", ("old", "new"), PACKAGE, "Made drawings.")


@pytest.fixture(scope="module")
def concepts() -> list[emoji.Concept]:
    return emoji.load_concepts()


def png(concept: emoji.Concept) -> bytes:
    out = io.BytesIO()
    Image.new("RGBA", (64, 64), (concept.index % 256, 0, 0, 255)).save(out, "PNG")
    return out.getvalue()


def test_a_concept_is_in_the_split_of_what_training_has_seen(concepts: list[emoji.Concept]) -> None:
    for concept in concepts[:200]:
        held_out = emoji.split_of(concept.codepoints, emoji.VENDORS[0]) == "test_concept"
        assert VENDOR.split_of(concept.codepoints) == ("new" if held_out else "old")


def test_only_concepts_with_a_drawing_are_written_and_all_with_their_own(
    concepts: list[emoji.Concept], tmp_path: Path
) -> None:
    seen = [c for c in concepts if emoji.seen(c.codepoints)][:3]
    unseen = [c for c in concepts if not emoji.seen(c.codepoints)][:2]
    wanted = {c.codepoints: c for c in seen + unseen}
    result = drawings.make(
        VENDOR, epath.Path(tmp_path), None, has=lambda c: c.codepoints in wanted, draw=png
    )
    assert result.path.parent.name == "emoji_made"
    source = tfds.builder_from_directory(result.path).as_data_source()
    for split, members in (("old", seen), ("new", unseen)):
        records = [source[split][i] for i in range(len(source[split]))]
        keys = sorted(record["codepoints"].decode() for record in records)
        assert keys == sorted(c.codepoints for c in members)
        for record in records:
            concept = wanted[record["codepoints"].decode()]
            assert record["concept"] == concept.index
            assert record["image"][0, 0, 0] == concept.index % 256


def test_a_limit_that_leaves_a_split_empty_writes_nothing(
    concepts: list[emoji.Concept], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="the split 'new' would be empty"):
        drawings.make(
            VENDOR, epath.Path(tmp_path), 2, has=lambda c: emoji.seen(c.codepoints), draw=png
        )
    assert not list(tmp_path.iterdir())


def test_the_missing_package_is_named() -> None:
    absent = PackageSource(
        "absent-one", "absent_one", "the drawings", "CC0", "no one", extra="noto"
    )
    with pytest.raises(UserError, match=r"absent-one.*'mmjax\[noto\]'"):
        Vendor("emoji_made", "made", ("old", "new"), absent, "").check()
