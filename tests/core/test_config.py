"""Config files: reading, overriding and checking them."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from config_files import _JSON, TINY
from hypothesis import given, settings

from mmjax.core import config as configs
from mmjax.core.errors import UserError


def written(tmp_path, text: str) -> str:
    path = tmp_path / "made.py"
    path.write_text(text)
    return str(path)


def test_a_file_gives_plain_data():
    block = configs.read_file(str(TINY))
    assert json.loads(json.dumps(block)) == block
    assert block["tasks"]["image_text"]["objective"]["modalities"] == ["image", "text"]
    assert list(block["tasks"]) == ["image_text", "masked_image"], "order decides who goes first"


def test_a_file_may_take_an_argument(tmp_path):
    path = written(tmp_path, "def get_config(steps='7'):\n    return {'steps': int(steps)}\n")
    assert configs.read_file(path) == {"steps": 7}
    assert configs.read_file(f"{path}:12") == {"steps": 12}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\n", ["get_config", "made.py"]),
        ("def get_config():\n    return None\n", ["NoneType", "ConfigDict"]),
        ("def get_config():\n    return [1]\n", ["list", "ConfigDict"]),
        ("def get_config():\n    return {'a': {'b': [1, len]}}\n", ["config.a.b[1]", "JSON"]),
        (
            "def get_config(size):\n    return {}\n",
            ["needs a setting: get_config(size)", ":SETTING"],
        ),
        ("import numpy\ndef get_config():\n    return {'a': numpy.zeros(2)}\n", ["config.a"]),
    ],
)
def test_what_is_no_config_is_refused(tmp_path, text, words):
    with pytest.raises(UserError) as raised:
        configs.read_file(written(tmp_path, text))
    for word in words:
        assert word in str(raised.value)


def test_an_argument_that_the_config_does_not_take_is_refused():
    with pytest.raises(UserError, match="has no settings, and 'small' was given") as raised:
        configs.read_file(f"{TINY}:small")
    assert str(raised.value).endswith(f" Write --config={TINY}.")


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match="No config file 'nowhere/x.py'"):
        configs.read_file("nowhere/x.py")


@pytest.fixture
def shipped_here(tmp_path, monkeypatch):
    """Return configs `one`, which takes a setting, and `two`; `_part` is none."""
    (tmp_path / "one.py").write_text("def get_config(size='s'):\n    return {'size': size}\n")
    (tmp_path / "two.py").write_text(
        "from pathlib import Path\nfrom mmjax.core.config import load_module\n"
        "def get_config():\n    return load_module(Path(__file__).with_name('one.py')).get_config('m')\n"
    )
    (tmp_path / "_part.py").write_text("def get_config():\n    return {}\n")
    monkeypatch.setattr(configs, "_shipped_folder", lambda: tmp_path)
    return tmp_path


def test_a_config_that_ships_is_found_by_name_from_anywhere(shipped_here, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert configs.shipped() == ["one", "two"]
    assert configs.read_file("one") == {"size": "s"}
    assert configs.read_file("one:l") == {"size": "l"}
    assert configs.read_file("two") == {"size": "m"}
    assert configs.read_file(f"{shipped_here / 'one.py'}:l") == {"size": "l"}


def test_a_setting_that_a_named_config_does_not_take_is_refused(shipped_here):
    with pytest.raises(UserError, match="'l' was given. Write --config=two."):
        configs.read_file("two:l")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("twoo", ["No config 'twoo'. Did you mean 'two'? Known: one, two. Give --config"]),
        ("zzzzzz:l", ["No config 'zzzzzz'. Known: one, two. Give --config"]),
        ("_part", ["No config '_part'."]),
        ("", ["No config ''.", "Known: one, two."]),
        ("configs/twoo.py", ["No config file 'configs/twoo.py'.", "Did you mean 'two'?"]),
        ("two.py", ["No config file 'two.py'.", "Did you mean 'two'?"]),
    ],
)
def test_an_unknown_config_names_those_that_ship(shipped_here, name, words):
    with pytest.raises(UserError) as raised:
        configs.read_file(name)
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_the_checkout_ships_its_configs():
    there = {p.stem for p in (Path(__file__).resolve().parents[2] / "configs").glob("[!_]*.py")}
    assert "quickstart" in there and set(configs.shipped()) == there


@settings(deadline=None)
@given(_JSON)
def test_json_data_passes_unchanged(value):
    assert configs.plain(value, "config") == value


@settings(deadline=None)
@given(_JSON)
def test_tuples_become_lists(value):
    assert configs.plain({"a": (value, (value,))}, "config") == {"a": [value, [value]]}


@pytest.mark.parametrize(
    "leaf", [len, object(), {1, 2}, b"bytes", 1j, np.float32(1), math.nan, math.inf, -math.inf]
)
def test_other_leaves_are_refused_by_key(leaf):
    with pytest.raises(UserError, match=r"config\.a\[0\]\.b "):
        configs.plain({"a": [{"b": leaf}]}, "config")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-3", -3),
        ("1e-3", 1e-3),
        ("true", True),
        ("False", False),
        ("none", None),
        ("null", None),
        ("word", "word"),
        ("a/b=c", "a/b=c"),
        ("'3'", "3"),
        ("[1, 'x']", [1, "x"]),
        ("(1, 2)", [1, 2]),
        ("{'start': 3}", {"start": 3}),
        ("", ""),
        ("train[:90%]", "train[:90%]"),
        ("__import__('os')", "__import__('os')"),
    ],
)
def test_values_are_literals_or_strings(text, value):
    found = configs.override({"a": {"b": 0}}, [f"a.b={text}"])["a"]["b"]
    assert found == value and type(found) is type(value)


def test_parents_that_the_file_lacks_are_made_and_checked_later():
    assert configs.override({}, ["mesh.data=2"]) == {"mesh": {"data": 2}}


def test_the_last_assignment_wins_and_the_original_stays():
    block = {"a": {"b": [1]}}
    assert configs.override(block, ["a.b=2", "a.b=3"]) == {"a": {"b": 3}}
    assert block == {"a": {"b": [1]}}


@pytest.mark.parametrize("key", ["layers.1.blocks.0.heads", "layers[1].blocks[0].heads"])
def test_a_key_inside_a_list_is_set_by_the_number_of_its_entry(key):
    block = {"layers": [{"repeat": 1}, {"blocks": [{"heads": 2}], "repeat": 3}]}
    new = configs.override(block, [f"{key}=8", "layers.0.repeat=5"])
    assert new == {"layers": [{"repeat": 5}, {"blocks": [{"heads": 8}], "repeat": 3}]}


def test_an_entry_of_a_list_is_set_whole():
    assert configs.override({"kernel": [3, 5]}, ["kernel[1]=7"]) == {"kernel": [3, 7]}


def test_every_leaf_of_a_config_can_be_set_by_its_path():
    config = configs.read_file("quickstart")
    for key, value in configs.flat(config):
        assert configs.override(config, [f"{key}={value!r}"]) == config


@pytest.mark.parametrize("name", ["2", "-1", "x", ""])
def test_an_entry_that_a_list_lacks_is_an_error_with_the_length(name):
    for assignment in (f"m.layers.{name}=1", f"m.layers.{name}.repeat=1"):
        with pytest.raises(
            UserError,
            match=f"'m.layers' has no entry '{name}'; its length is 2, numbered from 0 to 1",
        ):
            configs.override({"m": {"layers": [{}, {}]}}, [assignment])
    with pytest.raises(UserError, match="'a' has no entry '0'; its length is 0"):
        configs.override({"a": []}, ["a.0=1"])


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("a", "--config.a: write --config.KEY=VALUE"),
        ("a.b.c=1", "'a.b' is a value"),
        ("a.b=1e999", "a.b is inf"),
    ],
)
def test_assignments_that_cannot_be(assignment, words):
    with pytest.raises(UserError) as raised:
        configs.override({"a": {"b": 1}}, [assignment])
    assert words in str(raised.value)


@dataclass(frozen=True)
class Inner:
    size: int
    rate: float = 0.5


@dataclass(frozen=True)
class Outer:
    inner: Inner
    label: str = ""
    flag: bool = False
    many: tuple[Inner, ...] = ()
    maybe: int | None = None
    free: dict[str, Any] = field(default_factory=dict)
    by_name: dict[str, Inner] = field(default_factory=dict)


def test_blocks_become_dataclasses():
    block = {
        "inner": {"size": 3, "rate": 1},
        "many": [{"size": 1}],
        "maybe": 4,
        "by_name": {"x": {"size": 2}},
    }
    made = configs.build(Outer, block, "config")
    assert made == Outer(Inner(3, 1.0), many=(Inner(1),), maybe=4, by_name={"x": Inner(2)})
    assert isinstance(made.inner.rate, float)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({}, ["'config.inner' is missing", "a block of keys"]),
        ({"inner": {}}, ["'config.inner.size' is missing", "int"]),
        ({"inner": {"size": 1}, "labl": 1}, ["'config.labl'", "Did you mean 'label'?"]),
        ({"inner": {"size": 1, "rat": 1}}, ["'config.inner.rat'", "Did you mean 'rate'?"]),
        ({"inner": {"size": 1}, "many": [{"size": 1, "rats": 1}]}, ["config.many[0].rats"]),
        ({"inner": {"size": 1}, "by_name": {"x": {"sise": 1}}}, ["config.by_name.x.sise", "size"]),
        ({"inner": {"size": 1.5}}, ["'config.inner.size' is 1.5", "expected int"]),
        ({"inner": {"size": True}}, ["'config.inner.size' is True", "expected int"]),
        ({"inner": {"size": "1"}}, ["'config.inner.size' is '1'", "expected int"]),
        ({"inner": {"size": None}}, ["'config.inner.size' is None"]),
        ({"inner": {"size": 1, "rate": True}}, ["rate", "expected float"]),
        ({"inner": {"size": 1}, "flag": 1}, ["flag", "expected bool"]),
        ({"inner": {"size": 1}, "label": 1}, ["label", "expected str"]),
        ({"inner": {"size": 1}, "maybe": "x"}, ["maybe", "expected int"]),
        ({"inner": {"size": 1}, "many": {"size": 1}}, ["many", "a list"]),
        ({"inner": {"size": 1}, "free": 1}, ["free", "a block of keys"]),
        ({"inner": 3}, ["'config.inner' is 3", "a block of keys"]),
    ],
)
def test_wrong_blocks_name_the_key(block, words):
    with pytest.raises(UserError) as raised:
        configs.build(Outer, block, "config")
    for word in words:
        assert word in str(raised.value)


def test_names_are_the_modules_that_are_there():
    assert {"image", "text"} <= set(configs.names("modalities"))
    assert configs.resolve("evaluators", "held_out_loss", "x").__name__ == "HeldOutLoss"


@pytest.mark.parametrize(
    "name",
    [
        *("os", "os.path", "../train", "image.Image", "tfds.Tfds", "mmjax.train", "/tmp/x", ""),
        *("__init__", 5, None, ["image"], {}),
    ],
)
def test_only_a_listed_module_is_a_name(name):
    before = {*sys.modules, "mmjax.sources"}
    with pytest.raises(UserError, match=r"tasks\.a\.source\.name: no "):
        configs.component("sources", {"name": name}, "tasks.a.source")
    assert set(sys.modules) <= before, "a name that is none imports nothing"


def test_a_block_without_a_name_says_which_there_are():
    with pytest.raises(UserError, match="tasks.a.source: 'name' is missing.*tfds"):
        configs.component("sources", {}, "tasks.a.source")


def test_a_folder_of_ones_own(tmp_path, monkeypatch):
    import mmjax.evaluators

    monkeypatch.setattr(mmjax.evaluators, "__path__", list(mmjax.evaluators.__path__))
    (tmp_path / "evaluators").mkdir()
    own = tmp_path / "evaluators" / "own_of_this_test.py"
    own.write_text("class OwnOfThisTest:\n    pass\n")
    configs.add_folder(str(tmp_path))
    configs.add_folder(str(tmp_path))  # twice is once
    assert "own_of_this_test" in configs.names("evaluators")
    made = configs.resolve("evaluators", "own_of_this_test", "x")
    assert made.__module__ == "mmjax.evaluators.own_of_this_test"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], ["no folder in it", "modalities", "DIR/KIND/NAME.py"]),
        (["modalitys/x.py"], ["no folder in it"]),
        (["train/x.py"], ["no folder in it"]),
        (["evaluators/retrieval.py"], ["retrieval", "already"]),
    ],
)
def test_a_folder_that_would_not_be_heard(tmp_path, monkeypatch, files, words):
    import mmjax.evaluators

    monkeypatch.setattr(mmjax.evaluators, "__path__", list(mmjax.evaluators.__path__))
    for file in files:
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text("")
    with pytest.raises(UserError) as raised:
        configs.add_folder(str(tmp_path))
    for word in words:
        assert word in str(raised.value)


def test_a_module_without_its_class_is_named(tmp_path, monkeypatch):
    import mmjax.evaluators

    monkeypatch.setattr(mmjax.evaluators, "__path__", list(mmjax.evaluators.__path__))
    (tmp_path / "evaluators").mkdir()
    (tmp_path / "evaluators" / "hollow_of_this_test.py").write_text("")
    configs.add_folder(str(tmp_path))
    with pytest.raises(
        UserError, match=r"hollow_of_this_test.py does not define 'HollowOfThisTest'"
    ):
        configs.resolve("evaluators", "hollow_of_this_test", "evaluators.a")
