"""Command lines: `--config.KEY=VALUE`, unknown arguments, and where a workdir may be."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from etils import epath

from mmjax import commandline
from mmjax.errors import UserError


def parse(*argv: str):
    made = commandline.parser("A test.")
    made.add_argument("--workdir")
    made.add_argument("word", nargs="?")
    return commandline.parse(made, argv)


def test_overrides_stand_apart_in_their_order():
    arguments, overrides = parse("--config.a.b=1", "--workdir=x", "--config.c='y z'")
    assert arguments.workdir == "x"
    assert overrides == ["a.b=1", "c='y z'"]


def test_an_override_with_spaces_is_no_positional_argument():
    arguments, overrides = parse("--config.groups=[{'a': 1}, {'b': 2}]", "there")
    assert (arguments.word, overrides) == ("there", ["groups=[{'a': 1}, {'b': 2}]"])


def test_arguments_come_from_the_command_line_by_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--config.a= 1", "--workdir=w"])
    arguments, overrides = commandline.parse(commandline.parser("A test."), ["--config.b=1"])
    assert overrides == ["b=1"]
    made = commandline.parser("A test.")
    made.add_argument("--workdir")
    arguments, overrides = commandline.parse(made, None)
    assert (arguments.workdir, overrides) == ("w", ["a= 1"])


@pytest.mark.parametrize("argument", ["--wrkdir=x", "--work=x", "--config_a=1", "-x"])
def test_an_unknown_argument_is_named_with_the_usage_on_one_line(argument):
    with pytest.raises(UserError) as raised:
        parse(argument)
    message = str(raised.value)
    assert argument in message and "--workdir" in message and "--config.KEY=VALUE" in message
    assert "\n" not in message


@pytest.mark.parametrize("folder", ["nowhere", "tests/test_commandline.py"])
def test_extra_code_must_be_a_folder(folder):
    with pytest.raises(UserError, match=re.escape(f"--extra={folder}")):
        parse(f"--extra={folder}")


def test_paths_are_absolute_whatever_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert commandline.folder("runs/one") == epath.Path(tmp_path / "runs" / "one")
    assert commandline.folder("./a/../b") == epath.Path(tmp_path / "b")
    assert commandline.folder("~/runs") == epath.Path(tmp_path / "home" / "runs")
    assert commandline.folder("/runs") == epath.Path("/runs")
    assert os.fspath(commandline.folder("gs://bucket/runs")) == "gs://bucket/runs"


def test_a_workdir_is_made_and_may_be_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = commandline.make_workdir("a/b")
    assert made == epath.Path(tmp_path / "a" / "b") and made.is_dir()
    (made / "kept").write_text("x")
    assert (commandline.make_workdir("a/b") / "kept").exists()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("{file}", "is a file"),
        ("{file}/inner", "cannot be made"),
        ("{file}/inner/more", "cannot be made"),
        ("/proc/no_such_place", "cannot be made"),
        ("", "--workdir is empty"),
    ],
)
def test_a_workdir_that_cannot_be(tmp_path, path, words):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UserError, match=re.escape(words)) as raised:
        commandline.make_workdir(path.format(file=file))
    assert "Give a" in str(raised.value)
    assert file.read_text() == "mine" and sorted(os.listdir(tmp_path)) == ["file"]


def test_a_config_is_read_with_its_overrides(tmp_path):
    path = Path(tmp_path) / "c.py"
    path.write_text("def get_config():\n    return {'a': {'b': 1}}\n")
    assert commandline.read_config(str(path), ["a.b=2"]) == {"a": {"b": 2}}
