"""Tasks, modalities and towers of a config, by name."""

from __future__ import annotations

from mmjax.core.parts import alike, blocks

SHORT = {"steps": 1, "model": {"width": 4, "towers": {}}}
LONG = {"steps": 1, "model": {"towers": {"eye": {"width": 8}}}}


def test_blocks_are_by_name_and_none_where_there_is_no_section() -> None:
    assert blocks(LONG, "model.towers") == {"eye": {"width": 8}}
    assert (
        blocks(SHORT, "model.towers") == blocks(SHORT, "tasks") == blocks({}, "model.towers") == {}
    )


def test_one_tower_gets_its_name_where_the_other_config_has_names() -> None:
    named = {"steps": 1, "model": {"towers": {"trunk": {"width": 4}}}}
    assert alike(SHORT, LONG) == (named, LONG) and alike(LONG, SHORT) == (LONG, named)
    assert alike(SHORT, SHORT) == (SHORT, SHORT) and alike({}, LONG) == ({}, LONG)
