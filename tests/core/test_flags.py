"""Command lines: `--config.KEY=VALUE`, unknown arguments, and where a workdir may be."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import toyrun
from etils import epath
from jax._src import hardware_utils, xla_bridge

from mmjax import evaluate
from mmjax.core import flags
from mmjax.core.errors import UserError
from mmjax.report import page


def parse(*argv: str):
    parser = flags.parser("A test.")
    parser.add_argument("--workdir")
    parser.add_argument("word", nargs="?")
    return flags.parse(parser, argv)


def test_overrides_stand_apart_in_their_order():
    arguments, overrides = parse("--config.a.b=1", "--workdir=x", "--config.c='y z'")
    assert arguments.workdir == "x"
    assert overrides == ["a.b=1", "c='y z'"]


def test_an_override_with_spaces_is_no_positional_argument():
    arguments, overrides = parse("--config.groups=[{'a': 1}, {'b': 2}]", "there")
    assert (arguments.word, overrides) == ("there", ["groups=[{'a': 1}, {'b': 2}]"])


def test_arguments_come_from_the_command_line_by_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--config.a= 1", "--workdir=w"])
    arguments, overrides = flags.parse(flags.parser("A test."), ["--config.b=1"])
    assert overrides == ["b=1"]
    parser = flags.parser("A test.")
    parser.add_argument("--workdir")
    arguments, overrides = flags.parse(parser, None)
    assert (arguments.workdir, overrides) == ("w", ["a= 1"])


@pytest.mark.parametrize("argument", ["--wrkdir=x", "--work=x", "--config_a=1", "-x"])
def test_an_unknown_argument_is_named_with_the_usage_on_one_line(argument):
    with pytest.raises(UserError) as raised:
        parse(argument)
    message = str(raised.value)
    assert argument in message and "--workdir" in message and "--config.KEY=VALUE" in message
    assert "\n" not in message


@pytest.mark.parametrize("folder", ["nowhere", "tests/core/test_flags.py"])
def test_extra_code_must_be_a_folder(folder):
    with pytest.raises(UserError, match=re.escape(f"--extra={folder}")):
        parse(f"--extra={folder}")


def test_paths_are_absolute_whatever_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert flags.folder("runs/one") == epath.Path(tmp_path / "runs" / "one")
    assert flags.folder("./a/../b") == epath.Path(tmp_path / "b")
    assert flags.folder("~/runs") == epath.Path(tmp_path / "home" / "runs")
    assert flags.folder("/runs") == epath.Path("/runs")
    assert os.fspath(flags.folder("gs://bucket/runs")) == "gs://bucket/runs"


def test_a_workdir_is_made_and_may_be_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = flags.make_workdir("a/b")
    assert made == epath.Path(tmp_path / "a" / "b") and made.is_dir()
    (made / "kept").write_text("x")
    assert (flags.make_workdir("a/b") / "kept").exists()


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
        flags.make_workdir(path.format(file=file))
    assert "Give a" in str(raised.value)
    assert file.read_text() == "mine" and sorted(os.listdir(tmp_path)) == ["file"]


def test_a_config_is_read_with_its_overrides(tmp_path):
    path = Path(tmp_path) / "c.py"
    path.write_text("def get_config():\n    return {'a': {'b': 1}}\n")
    assert flags.read_config(str(path), ["a.b=2"]) == {"a": {"b": 2}}


# --- a TPU that is not there -------------------------------------------------------------------


@pytest.fixture
def factories(monkeypatch):
    """Return JAX's kinds of devices, of which one can be taken out; the environment does not name them."""
    result = {"tpu": 1, "cpu": 2}
    monkeypatch.setattr(xla_bridge, "_backend_factories", result)
    for name in list(os.environ):
        if name.startswith(("TPU_", "JAX_PLATFORMS", "CLOUD_TPU", "JAX_FORCE")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(()))
    monkeypatch.setattr(hardware_utils, "num_available_tpu_chips_and_device_id", lambda: (0, None))
    return result


def test_a_tpu_that_is_not_there_is_not_tried(factories):
    flags.parse(flags.parser("x"), [])
    assert factories == {"cpu": 2}


@pytest.mark.parametrize(
    "sign", ["chip", "file", "TPU_NAME", "TPU_WORKER_ID", "JAX_PLATFORMS", "JAX_FORCE_TPU_INIT"]
)
def test_a_tpu_that_may_be_there_is_tried(factories, monkeypatch, sign):
    if sign == "chip":
        chips = lambda: (4, None)  # noqa: E731
        monkeypatch.setattr(hardware_utils, "num_available_tpu_chips_and_device_id", chips)
    elif sign == "file":
        monkeypatch.setattr(Path, "glob", lambda self, p: iter([self / "accel0"] * (p == "accel*")))
    else:
        monkeypatch.setenv(sign, "tpu")
    flags.parse(flags.parser("x"), [])
    assert factories == {"tpu": 1, "cpu": 2}


def test_no_command_prints_what_libtpu_misses():
    pytest.importorskip("libtpu")
    words = [f"--extra={toyrun.EXTRA}", f"--config={toyrun.CONFIG}"]
    here = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY")}
    root = Path(toyrun.EXTRA).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv[1:] = {words!r}; from mmjax.core import errors; "
         "from mmjax import show; import jax; errors.run(lambda: (show.main(), print(jax.devices()[0].platform))[0])"],
        env={**here, "PYTHONPATH": str(root)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "") and done.stdout


def test_a_file_is_no_folder_of_a_run(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UserError, match="file' is a file. Give a folder."):
        flags.run_folder(str(file))
    assert flags.run_folder(str(tmp_path)) == epath.Path(tmp_path)
    assert flags.run_folder("gs://bucket/run") == epath.Path("gs://bucket/run")


def test_commands_that_read_a_run_refuse_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    for main in (evaluate.main, page.main):
        with pytest.raises(UserError, match="is a file"):
            main([f"--workdir={tmp_path}/file"])
