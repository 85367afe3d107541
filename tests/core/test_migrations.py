"""A changed default is written into older configs, and into no others."""

from __future__ import annotations

from unittest import mock

import pytest

from mmjax.core import migrations
from mmjax.core.migrations import Row, upgrade, upgrade_meta
from mmjax.core.renamed_keys import Rename, named, of_modality

TABLE = migrations.ROWS  # the real ones: tests here patch them
CONFIG = {
    "modalities": {"picture": {"name": "image"}, "text": {"name": "text"}},
    "model": {"groups": [{"pattern": [{"name": "mamba"}, {"name": "transformer"}]}]},
    "tasks": {"a": {"inputs": {"picture": {"size": 8}, "text": {}}}},
}


@pytest.fixture(autouse=True)
def rows() -> object:
    table = (
        Row(2, "model.groups.*.pattern.*", "norm", "layer", named("mamba")),
        Row(3, "tasks.*.inputs.*", "fit", "squash", of_modality("image")),
        Row(3, "optimizer", "final", 0.0),
        Row(3, "", "seed", 7),
    )
    with (
        mock.patch.object(migrations, "ROWS", table),
        mock.patch.object(migrations, "RENAMES", ()),
        mock.patch.object(migrations, "MOVES", {}),
    ):
        yield


def test_old_defaults_are_written_into_older_configs() -> None:
    found = upgrade(CONFIG, 1)
    assert found["model"]["groups"][0]["pattern"] == [
        {"name": "mamba", "norm": "layer"},
        {"name": "transformer"},
    ]
    assert found["tasks"]["a"]["inputs"] == {"picture": {"size": 8, "fit": "squash"}, "text": {}}
    assert found["seed"] == 7
    assert found["optimizer"] == {"final": 0.0}  # its default held, though the block was not there


def test_a_config_is_not_changed_in_place() -> None:
    before = repr(CONFIG)
    upgrade(CONFIG, 1)
    assert repr(CONFIG) == before


def test_only_rows_after_its_version_apply() -> None:
    found = upgrade(CONFIG, 2)
    assert "norm" not in found["model"]["groups"][0]["pattern"][0]
    assert found["tasks"]["a"]["inputs"]["picture"]["fit"] == "squash"
    assert upgrade(CONFIG, 3) == CONFIG


def test_what_a_config_says_stays() -> None:
    config = {**CONFIG, "seed": 1}
    assert upgrade(config, 1)["seed"] == 1


def test_renames_of_a_version_come_before_its_defaults() -> None:
    renames = (Rename(3, "optimizer", {"final": "end"}),)
    rows = (Row(3, "optimizer", "end", 0.0),)
    with (
        mock.patch.object(migrations, "RENAMES", renames),
        mock.patch.object(migrations, "ROWS", rows),
    ):
        assert upgrade({"optimizer": {"final": 0.5}}, 2)["optimizer"] == {"end": 0.5}


def test_losses_of_experts_were_over_the_batch() -> None:
    """Where there are any, in the trunk and in a decoder."""
    some, none = ({"count": 2, "losses": losses} for losses in ({"z": 1.0}, {}))
    groups = [{"pattern": [{"experts": some}, {"experts": none}, {"name": "mamba"}]}]
    config = {"model": {"groups": groups}, "tasks": {"a": {"objective": {"unimodal": groups}}}}
    with mock.patch.object(migrations, "ROWS", TABLE):
        found = upgrade(config, 1)
    for each in (found["model"]["groups"], found["tasks"]["a"]["objective"]["unimodal"]):
        assert [b.get("experts", {}).get("losses_over") for b in each[0]["pattern"]] == [
            "batch", None, None,
        ]  # fmt: skip


def test_meta_data_without_a_version_are_of_the_first() -> None:
    assert upgrade_meta({"config": CONFIG})["config"]["seed"] == 7
    assert upgrade_meta({"config": CONFIG, migrations.KEY: 3})["config"] == CONFIG
    assert upgrade_meta({"format": 1}) == {"format": 1}


def test_mambas_of_older_configs_keep_their_norm() -> None:
    """Version 2 made RMS the default; wherever a config holds layers."""
    layer = {"repeat": 1, "pattern": [{"name": "mamba"}]}
    config = {
        "model": {"groups": [layer]},
        "tasks": {"a": {"objective": {"unimodal": [layer], "between": ["image", "text"]}}},
    }
    with mock.patch.object(migrations, "ROWS", TABLE):
        old, new = upgrade(config, 1), upgrade(config, migrations.VERSION)
    assert old["model"]["groups"][0]["pattern"] == [{"name": "mamba", "norm": "layer"}]
    assert old["tasks"]["a"]["objective"]["unimodal"][0]["pattern"][0]["norm"] == "layer"
    assert new == config
