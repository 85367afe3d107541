"""A changed default is written into older configs, and into no others."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import toyrun
from metafile import edited

from mmjax.core import config as configs
from mmjax.core import migrations
from mmjax.core.migrations import Row, upgrade, upgrade_meta
from mmjax.core.renamed_keys import Rename, named, of_modality
from mmjax.optim.config import OptimizerConfig

TABLE = migrations.ROWS  # the real ones: tests here patch them
MOVES, RENAMES = migrations.MOVES, migrations.RENAMES
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


EVERY = {
    "b1": 0.8, "b2": 0.9, "eps": 1e-6, "factored": 8, "moments_dtype": "bfloat16", "momentum": 0.7,
}  # fmt: skip


@pytest.mark.parametrize(
    ("old", "algorithm"),
    [
        (
            {"name": "adamw", **EVERY},
            {"name": "adamw", "b1": 0.8, "b2": 0.9, "eps": 1e-6, "moments_dtype": "bfloat16"},
        ),
        (EVERY, {"b1": 0.8, "b2": 0.9, "eps": 1e-6, "moments_dtype": "bfloat16"}),
        ({"name": "adafactor", **EVERY}, {"name": "adafactor", "min_dim_to_factor": 8}),
        (
            {"name": "lion", **EVERY},
            {"name": "lion", "b1": 0.8, "b2": 0.9, "moments_dtype": "bfloat16"},
        ),
        (
            {"name": "muon", **EVERY},
            {
                "name": "muon", "b1": 0.8, "b2": 0.9, "eps": 1e-6, "momentum": 0.7,
                "moments_dtype": "bfloat16",
            },
        ),
        ({"name": "muon"}, {"name": "muon"}),
        ({"b2": 0.9}, {"b2": 0.9}),
        ({"momentum": 0.7}, None),  # AdamW read none
        ({}, None),
    ],
    ids=str,
)  # fmt: skip
def test_the_algorithm_of_an_older_optimizer_has_a_block_of_its_own(
    old: dict[str, object], algorithm: dict[str, object] | None
) -> None:
    kept = {"learning_rate": 0.1, "rules": [{"match": "a"}]}
    expected = kept if algorithm is None else {**kept, "algorithm": algorithm}
    with mock.patch.multiple(migrations, ROWS=(), MOVES=MOVES, RENAMES=RENAMES):
        for version in (1, 2):
            upgraded = upgrade({"optimizer": {**kept, **old}}, version)["optimizer"]
            assert upgraded == expected
        assert upgrade({"optimizer": expected}, 3) == {"optimizer": expected}
    assert configs.build(OptimizerConfig, upgraded, "optimizer").learning_rate == 0.1


@pytest.mark.parametrize("config", [{}, {"optimizer": {}}, {"optimizer": [1]}], ids=str)
def test_an_optimizer_that_is_not_there_or_no_block_stays(config: dict[str, object]) -> None:
    with mock.patch.multiple(migrations, ROWS=(), MOVES=MOVES, RENAMES=RENAMES):
        assert upgrade(config, 2) == config


def test_a_run_from_before_the_block_is_resumed_in_the_same_bits(tmp_path: Path) -> None:
    """Its config has the keys of other algorithms too."""
    algorithm = {"name": "muon", "b2": 0.95, "momentum": 0.9, "moments_dtype": "bfloat16"}
    words = [f"optimizer.algorithm.{key}={value}" for key, value in algorithm.items()]
    with mock.patch.multiple(migrations, ROWS=TABLE, MOVES=MOVES, RENAMES=RENAMES):
        toyrun.run(tmp_path / "straight", *words)
        toyrun.run(tmp_path / "halved", *words, "steps=8")
        with edited(tmp_path / "halved", 8) as meta:
            optimizer = meta["config"]["optimizer"]
            assert optimizer.pop("algorithm") == algorithm
            optimizer |= {**algorithm, "factored": 8}
            meta[migrations.KEY] = 2
        toyrun.run(tmp_path / "halved", *words)
        assert toyrun.bits(tmp_path / "straight") == toyrun.bits(tmp_path / "halved")
