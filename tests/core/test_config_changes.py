"""Check what a change of a key means for a run that exists."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from config_files import _JSON, _NAMES, ROOT, TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.core import config as configs
from mmjax.core.errors import UserError
from mmjax.run_config import RunConfig

QUICKSTART = ROOT / "configs" / "quickstart.py"


_BLOCKS = st.dictionaries(_NAMES, _JSON, max_size=4)


@settings(deadline=None)
@given(_BLOCKS)
def test_a_config_is_compatible_with_itself(block):
    again = json.loads(json.dumps(block, sort_keys=True))
    assert configs.check_compatible(block, again, allow_change=False, schema=RunConfig) == []


@settings(deadline=None)
@given(_BLOCKS, _BLOCKS)
def test_a_difference_is_seen_from_both_sides(one, two):
    there, back = configs.compare(one, two, RunConfig), configs.compare(two, one, RunConfig)
    assert [(d.key, d.kind, d.saved, d.new) for d in there] == [
        (d.key, d.kind, d.new, d.saved) for d in back
    ]


@settings(deadline=None)
@given(_BLOCKS, st.data())
def test_every_changed_leaf_is_found(block, data):
    leaves = [(k, v) for k, v in configs.flat(block) if not isinstance(v, dict)]
    if not leaves:
        return
    key, value = data.draw(st.sampled_from(leaves))
    changed = json.loads(json.dumps(block))
    *parents, last = key.split(".")
    inner = changed
    for parent in parents:
        inner = inner[int(parent) if isinstance(inner, list) else parent]
    inner[int(last) if isinstance(inner, list) else last] = new = f"not {value}"
    assert [(d.key, d.saved, d.new) for d in configs.compare(block, changed, RunConfig)] == [
        (key, value, new)
    ]


MADE_OF_STATE = (
    ["algorithm", "name"],
    ["algorithm", "moments_dtype"],
    ["algorithm", "factored"],
)


def expected_class(key: str) -> str:
    """Return the rules of `design.md`, by the words of the key."""
    first, *rest = key.split(".")
    if first in ("steps", "log", "checkpoint", "mesh", "loader", "limits", "evaluation"):
        return "free"
    if first == "schedule" or first == "optimizer" and rest not in MADE_OF_STATE:
        return "schedule"
    if first == "tasks":
        inner = rest[1]
        if inner in ("weight", "batch", "inputs", "objective", "view"):
            return "schedule"
        if inner in ("evaluators", "microbatches") or rest[1:] == ["source", "folder"]:
            return "free"
    if key == "model.remat" or first == "modalities" and rest[1:] == ["folder"]:
        return "free"
    return "structural"


@pytest.mark.parametrize("path", [TINY, QUICKSTART], ids=["tiny", "quickstart"])
def test_every_key_has_its_class(path):
    block = configs.read_file(str(path))
    found = {key: configs.key_class(key, RunConfig, block) for key, _ in configs.flat(block)}
    assert found == {key: expected_class(key) for key in found}
    assert set(found.values()) == {"free", "schedule", "structural"}


# What the blocks named a are; those of other names are not in the config.
NAMED: dict[str, Any] = {
    "modalities": {
        "image": {"name": "image"},
        "text": {"name": "text"},
        "video": {"name": "video"},
        "sound": {"name": "spectrogram"},
        "wave": {"name": "waveform"},
        "colours": {"name": "colours"},
        "gone": {"name": "module_of_a_folder_not_added"},
    },
    "model": {"layers": [{"blocks": [{"name": "transformer"}, {"name": "mamba"}]}]},
    "optimizer": {"algorithm": {"name": "muon"}},
    "tasks": {
        "a": {"source": {"name": "tfds"}, "objective": {"name": "contrastive"}},
        "b": {"source": {"name": "array_record"}},
        "c": {"source": {"name": "moving_emoji"}},
        "d": {"source": {"name": "joined", "left": {"name": "tfds"}}},
        "gone": {"source": {"name": "module_of_a_folder_not_added"}},
    },
}


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("steps", "free"),
        ("log.flush_every", "free"),
        ("mesh.data", "free"),
        ("loader.threads", "free"),
        ("limits.programs", "free"),
        ("limits.watchdog_seconds", "free"),
        ("limits.max_non_finite_steps", "schedule"),
        ("limits.divergence", "schedule"),
        ("limits.divergence_visits", "schedule"),
        ("limits.old", "free"),
        ("profile.steps", "free"),
        ("checkpoint.keep", "free"),
        ("evaluation.batch", "free"),
        ("model.remat", "free"),
        ("tasks.a.evaluators.b.at", "free"),
        ("tasks.a.source.folder", "free"),
        ("tasks.c.source.folder", "free"),
        ("tasks.b.source.partial", "free"),
        ("tasks.b.source.path", "structural"),
        ("tasks.d.source.left.folder", "structural"),
        ("modalities.text.folder", "free"),
        ("modalities.image.folder", "free"),
        ("modalities.text.pad_vocabulary_to", "free"),
        ("modalities.text.vocabulary", "structural"),
        ("modalities.image.max_pixels", "free"),
        ("modalities.colours.max_pixels", "free"),
        ("modalities.video.max_frames", "free"),
        ("modalities.sound.max_seconds", "free"),
        ("modalities.wave.max_seconds", "free"),
        ("modalities.wave.name", "structural"),
        ("tasks.a.weight", "schedule"),
        ("tasks.a.batch", "schedule"),
        ("tasks.a.inputs.image.size", "schedule"),
        ("tasks.a.shapes.b.weight", "schedule"),
        ("tasks.a.objective.init_temperature", "schedule"),
        ("tasks.a.update_scope", "schedule"),
        ("tasks.a.microbatches", "free"),
        ("init_from.path", "structural"),
        ("init_from.strict", "free"),
        ("init_from.non_finite", "free"),
        ("optimizer.update_scope", "schedule"),
        ("optimizer.rules.0.freeze", "schedule"),
        ("schedule.rule", "schedule"),
        ("optimizer.learning_rate", "schedule"),
        ("optimizer.algorithm.momentum", "schedule"),
        ("optimizer.algorithm.eps", "schedule"),
        ("optimizer.algorithm.name", "structural"),
        ("optimizer.algorithm.moments_dtype", "structural"),
        ("optimizer.algorithm.old", "structural"),
        ("seed", "structural"),
        ("dtype.parameters", "structural"),
        ("model.width", "structural"),
        ("model.layers.0.repeat", "structural"),
        ("modalities.image.patch", "structural"),
        ("tasks.a.source.split", "structural"),
        ("tasks.a.source.dataset", "structural"),
        # A name that only begins like one of a freer class.
        ("steps_of_old", "structural"),
        ("logs", "structural"),
        ("tasks.a.shares", "structural"),
        ("steps.old", "free"),
        # Blocks of layers.
        ("model.layers.0.blocks.0.attention_impl", "free"),
        ("model.layers.0.blocks.1.attention_impl", "free"),
        ("model.layers.7.blocks.0.attention_impl", "free"),
        ("model.layers.0.blocks.0.experts.losses_over", "schedule"),
        ("model.layers.0.blocks.0.experts.count", "structural"),
        ("model.layers.0.blocks.0.experts.kernel", "structural"),
        ("model.layers.0.blocks.0.num_heads", "structural"),
        ("tasks.a.objective.unimodal.0.blocks.0.attention_impl", "schedule"),
        # Whole blocks, where one of the configs has an empty one.
        ("schedule", "schedule"),
        ("optimizer", "schedule"),
        ("loader", "free"),
        ("tasks.a.evaluators", "free"),
        ("tasks", "structural"),
        ("modalities.text", "structural"),
        # Keys that are no more, and components that are not there.
        ("optimizer.old", "schedule"),
        ("schedule.phases.0.old", "schedule"),
        ("init_from.old", "structural"),
        ("modalities.text.old", "structural"),
        ("modalities.text.max_pixels", "structural"),
        ("modalities.gone.size", "structural"),
        ("tasks.gone.source.size", "structural"),
        ("tasks.gone.weight", "schedule"),
        ("tasks.other.evaluators.b.old", "free"),
        ("old.key", "structural"),
    ],
)
def test_key_classes(key, kind):
    assert configs.key_class(key, RunConfig, NAMED) == kind


@pytest.mark.parametrize(
    ("algorithm", "kinds"),
    [
        ({"name": "adafactor"}, {"factored": "structural"}),
        ({"name": "lion"}, {"b1": "schedule", "b2": "schedule", "moments_dtype": "structural"}),
        ({"name": "module_of_a_folder_not_added"}, {"b1": "structural"}),
        # Without a name it is AdamW.
        (
            {},
            {"b1": "schedule", "b2": "schedule", "eps": "schedule", "moments_dtype": "structural"},
        ),
    ],
    ids=str,
)
def test_each_algorithm_of_the_optimizer_states_its_keys(
    algorithm: dict[str, Any], kinds: dict[str, str]
) -> None:
    block = {"optimizer": {"algorithm": algorithm}}
    keys = {key: f"optimizer.algorithm.{key}" for key in kinds}
    assert {key: configs.key_class(at, RunConfig, block) for key, at in keys.items()} == kinds


def test_a_run_that_names_no_algorithm_may_change_the_numbers_of_the_default():
    new = {"steps": 1, "optimizer": {"algorithm": {"b2": 0.95}}}
    found = configs.compare({"steps": 1}, new, RunConfig)
    assert [str(d) for d in found] == ["optimizer.algorithm.b2 (schedule): saved None, now 0.95"]


@dataclass
class Leaf:
    stated: int = field(default=0, metadata=configs.STRUCTURAL)
    silent: int = 0


@dataclass
class Root:
    one: Leaf = field(metadata=configs.FREE)
    many: tuple[Leaf, ...] = field(metadata=configs.SCHEDULE)
    by_name: dict[str, Leaf] | None = field(default=None, metadata=configs.FREE)
    later: dict[str, dict[str, Any]] = field(
        default_factory=dict, metadata=configs.holds(Leaf, {"silent": "schedule"})
    )
    silent: int = 0


def test_a_field_states_the_class_of_what_it_holds_unless_that_states_its_own():
    expected = {
        "one.stated": "structural",
        "one.silent": "free",
        "many.3.stated": "structural",
        "many.3.silent": "schedule",
        "by_name.x.silent": "free",
        "by_name.x.stated": "structural",
        "later.x.stated": "structural",
        "later.x.silent": "schedule",
        "silent": "structural",
    }
    assert {key: configs.key_class(key, Root) for key in expected} == expected


def test_the_name_of_a_block_is_that_of_the_new_config_or_else_of_the_saved_one():
    """A key counts as what it is in the config that has the component."""
    saved = {"modalities": {"a": {"name": "image", "max_pixels": 9}, "b": {"name": "text"}}}
    new = {"modalities": {"a": {"name": "image"}, "b": {"name": "text", "max_pixels": 9}}}
    kinds = {d.key: d.kind for d in configs.compare(saved, new, RunConfig)}
    assert kinds == {"modalities.a.max_pixels": "free", "modalities.b.max_pixels": "structural"}
    seen = {"model": {"towers": {"trunk": {}, "eye": {"width": 8, "remat": "full"}}}}
    other = {"model": {"towers": {"trunk": {}, "eye": {"width": 4}}}}
    kinds = {d.key: d.kind for d in configs.compare(seen, other, RunConfig)}
    assert kinds == {"model.towers.eye.width": "structural", "model.towers.eye.remat": "free"}


def test_a_modality_or_tower_that_comes_or_goes_is_one_change_of_the_schedule() -> None:
    two = {"a": {"name": "image", "max_pixels": 9}, "b": {"name": "text"}}
    one = {"width": 4, "norm": "rms"}
    saved = {"modalities": two, "model": one}
    new = {
        "modalities": {"a": two["a"]},
        "model": {"towers": {"trunk": one, "eye": {"width": 8}}},
    }
    for before, after in ((saved, new), (new, saved)):
        kinds = {d.key: d.kind for d in configs.compare(before, after, RunConfig)}
        assert kinds == {"modalities.b": "schedule", "model.towers.eye": "schedule"}


def saved() -> dict[str, Any]:
    return {
        "steps": 10,
        "model": {"width": 8},
        "tasks": {"a": {"weight": 1, "source": {"name": "x"}}},
    }


def changed(**keys: Any) -> dict[str, Any]:
    return configs.override(saved(), [f"{k.replace('__', '.')}={v!r}" for k, v in keys.items()])


def test_free_changes_are_told():
    found = configs.check_compatible(
        saved(), changed(steps=20), allow_change=False, schema=RunConfig
    )
    assert [str(d) for d in found] == ["steps (free): saved 10, now 20"]


def test_schedule_changes_ask_for_a_word():
    new = changed(tasks__a__weight=3)
    with pytest.raises(UserError, match="--allow_change") as raised:
        configs.check_compatible(saved(), new, allow_change=False, schema=RunConfig)
    assert "tasks.a.weight (schedule): saved 1, now 3" in str(raised.value)
    [difference] = configs.check_compatible(saved(), new, allow_change=True, schema=RunConfig)
    assert difference.kind == "schedule"


@pytest.mark.parametrize("allow_change", [False, True])
def test_structural_changes_are_refused(allow_change):
    with pytest.raises(UserError, match="another --workdir") as raised:
        configs.check_compatible(
            saved(), changed(model__width=16, steps=11), allow_change, RunConfig
        )
    assert "model.width (structural): saved 8, now 16" in str(raised.value)
    assert "steps" not in str(raised.value), "only what is in the way is shown"


def test_a_whole_task_comes_and_goes_as_schedule():
    new = saved()
    new["tasks"]["b"] = {"weight": 1, "source": {"name": "y"}}
    [came], [went] = (
        configs.compare(saved(), new, RunConfig),
        configs.compare(new, saved(), RunConfig),
    )
    assert (came.kind, went.kind) == ("schedule", "schedule")
    assert (str(came), str(went)) == (
        "tasks.b (schedule): saved None, now {...}",
        "tasks.b (schedule): saved {...}, now None",
    )


def test_a_task_that_changes_its_data_is_structural_still():
    new = changed(tasks__a__source__name="y")
    assert [d.kind for d in configs.compare(saved(), new, RunConfig)] == ["structural"]


def test_a_key_that_one_side_lacks_is_a_difference():
    new = saved() | {"seed": 3}
    [difference] = configs.compare(saved(), new, RunConfig)
    assert (difference.key, difference.saved, difference.new) == ("seed", None, 3)
