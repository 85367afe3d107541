"""Towers: who reads what, and mistakes in it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mmjax.core import config as configs
from mmjax.core.errors import UserError
from mmjax.nn.towers import TowerConfig, Towers, Widths, connect

LAYERS = [{"repeat": 1, "blocks": [{"name": "transformer", "num_heads": 2, "mlp_dim": 4}]}]
TAKEN = {"stems", "heads"}


def connected(towers: dict[str, dict[str, Any]], **readers: str) -> Towers:
    """Return towers of width 8, and modalities by the tower that each names."""
    built = {
        name: configs.build(TowerConfig, {"width": 8, "layers": LAYERS, **keys}, f"model.{name}")
        for name, keys in towers.items()
    }
    modalities = {m: SimpleNamespace(tower=tower) for m, tower in readers.items()}
    return connect(built, modalities, TAKEN)


THREE: dict[str, dict[str, Any]] = {
    "eye": {},
    "ear": {},
    "mind": {"reads": ["eye", "ear"]},
}
TWO: dict[str, dict[str, Any]] = {"eye": {}, "ear": {}}
IMAGE = {"image": "eye"}
BOTH = {"image": "eye", "sound": "ear"}


def test_modalities_are_read_by_the_only_tower_or_by_trunk_where_they_name_none() -> None:
    assert connected({"eye": {}}, image="").reader("image") == "eye"
    two = connected({"trunk": {}, "eye": {}}, text="", image="eye")
    assert (two.reader("text"), two.reader("image")) == ("trunk", "eye")
    assert two.reader("fusion") == ""


def test_the_joint_tower_is_the_reader_or_the_nearest_that_reads_all_readers() -> None:
    towers = connected({**THREE, "top": {"reads": ["mind"]}}, image="eye", video="eye", sound="ear")
    assert towers.joint(["image"]) == towers.joint(["image", "video"]) == "eye"
    assert towers.joint(["image", "sound"]) == "mind"
    assert towers["top"].below == {"top", "mind", "eye", "ear"}


def test_widths_are_those_of_the_readers_and_of_the_joint_tower() -> None:
    widths = Widths(connected({"eye": {}, "ear": {"width": 6}}, image="eye", sound="ear"))
    assert (widths["image"], widths["sound"]) == (8, 6)
    assert Widths.same(5)["any"] == Widths.same(5).one(["a", "b"], "x") == 5
    with pytest.raises(UserError) as error:
        widths.one(["image", "sound"], "fusion")
    for word in ("fusion", "'image' by tower 'eye' (width 8)", "'sound' by tower 'ear' (width 6)"):
        assert word in str(error.value)
    assert "modalities.NAME.tower" in str(error.value)


def test_two_towers_that_join_the_same_are_none() -> None:
    both = connected({**THREE, "soul": {"reads": ["eye", "ear"]}}, image="eye", sound="ear")
    with pytest.raises(UserError, match="towers mind, soul all join them"):
        both.joint(["image", "sound"])


@pytest.mark.parametrize(
    ("towers", "readers", "message"),
    [
        (TWO, {"image": "eye", "sound": "er"}, "modalities.sound.tower is 'er', which .* Did you mean 'ear'"),
        (TWO, {"image": "eye", "sound": ""}, "modalities.sound.tower is empty.*eye, ear"),
        (TWO, {"image": "eye"}, "model.towers.ear reads nothing.*modalities.NAME.tower=ear"),
        ({"heads": {}}, {"image": ""}, "model.towers: 'heads' is the name of another part.*another name"),
        ({"a/b": {}}, {"image": ""}, "model.towers: 'a/b' is no name; use letters"),
        ({"eye": {}, "a": {"reads": ["eyes"]}}, IMAGE, "towers.a.reads names tower 'eyes'.*Did you mean 'eye'"),
        ({"eye": {}, "a": {"context": "no"}}, {**IMAGE, "text": "a"}, "towers.a.context names tower 'no'"),
        ({"eye": {"width": 6}, "a": {"reads": ["eye"]}}, IMAGE, "names tower 'eye' of width 6, and its own width is 8"),
        ({"eye": {"reads": ["a"]}, "a": {"context": "eye"}}, IMAGE, "eye -> a -> eye is a cycle"),
        ({"eye": {"reads": ["eye"]}}, IMAGE, "eye -> eye is a cycle"),
        ({**THREE, "top": {"reads": ["mind", "eye"]}}, BOTH, "tower 'eye' reaches it on two ways"),
    ],
)  # fmt: skip
def test_mistakes_in_connections(
    towers: dict[str, dict[str, Any]], readers: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        connected(towers, **readers)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("dtype", "float16", "model.eye.dtype is 'float16'"),
        ("remat", "most", "model.eye.remat is 'most'"),
        ("width", 0, "model.eye.width is 0; it must be at least 1"),
    ],
)
def test_mistakes_in_a_tower(key: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        connected({"eye": {key: value}}, image="")
