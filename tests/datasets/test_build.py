"""Building: finished data is reused, anything less is recognised and built again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from etils import epath

import mmjax.data
from mmjax.core.errors import UserError
from mmjax.datasets import build

LIMIT = 20


@pytest.fixture
def root(tmp_path):
    return epath.Path(tmp_path) / "data"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = epath.Path(tmp_path_factory.mktemp("finished"))
    build.build("emoji", root, limit=LIMIT)
    return root


@pytest.fixture
def copied(finished, root):
    """Return a finished data set for this test alone, to damage."""
    path = build.dataset_dir("emoji", root)
    path.mkdir(parents=True)
    for file in build.dataset_dir("emoji", finished).iterdir():
        file.copy(path / file.name)
    return root


def _python(code, *arguments, **kwargs):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=_environment(), text=True, **kwargs)


def _environment():
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {**os.environ, "PYTHONPATH": path}


@pytest.fixture(autouse=True)
def _temporary(monkeypatch, tmp_path):
    """Remove what killed processes leave in the temporary directory, with the test's own."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))


def _command(*arguments):
    command = [sys.executable, "-m", "mmjax", "build", *map(str, arguments)]
    return subprocess.run(
        command, env=_environment(), capture_output=True, text=True, timeout=300, check=False
    )


def test_where_data_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("MMJAX_DATA_DIR", str(tmp_path / "here"))
    assert mmjax.data.data_dir() == epath.Path(tmp_path / "here")
    assert build.dataset_dir("emoji") == epath.Path(tmp_path / "here/emoji/1.0.0")
    monkeypatch.setenv("MMJAX_DATA_DIR", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert mmjax.data.data_dir() == epath.Path(tmp_path / ".cache/mmjax/data")
    assert build.dataset_dir("emoji", "~/x") == epath.Path(tmp_path / "x/emoji/1.0.0")


def test_finished_data_is_reused_untouched(finished):
    path = build.dataset_dir("emoji", finished)
    before = {file.name: file.stat() for file in path.iterdir()}
    again = build.build("emoji", finished, limit=LIMIT)
    assert again.reused
    assert {file.name: file.stat() for file in path.iterdir()} == before
    assert again == build.find("emoji", finished)
    assert [entry.name for entry in path.parent.iterdir()] == ["1.0.0"]


def test_reuse_imports_nothing_heavy(finished):
    code = (
        "import sys; from mmjax.datasets import build;"
        f"assert build.build('emoji', sys.argv[1], limit={LIMIT}).reused;"
        "print({'tensorflow_datasets', 'numpy', 'jax', 'grain', 'PIL', 'sentencepiece', 'absl'}"
        " & set(sys.modules))"
    )
    process = _python(code, finished, stdout=subprocess.PIPE)
    assert process.communicate(timeout=120)[0].strip() == "set()"


def test_the_manifest_describes_every_file(finished):
    path = build.dataset_dir("emoji", finished)
    manifest = build.find("emoji", finished).manifest
    sizes = {file.name: len(file.read_bytes()) for file in path.iterdir()}
    assert sizes.pop("manifest.json") > 0
    assert manifest["files"] == sizes
    assert any(name.endswith("array_record-00000-of-00001") for name in sizes)
    assert (manifest["name"], manifest["version"], manifest["limit"]) == ("emoji", "1.0.0", LIMIT)


def test_force_builds_again_with_equal_content(copied):
    path = build.dataset_dir("emoji", copied)
    (path / "stray").write_text("x")
    before = build.find("emoji", copied).manifest
    again = build.build("emoji", copied, limit=LIMIT, force=True)
    assert not again.reused and not (path / "stray").exists()
    assert again.manifest["digest"] == before["digest"]
    assert [entry.name for entry in path.parent.iterdir()] == ["1.0.0"]


def test_another_limit_is_other_data(copied):
    again = build.build("emoji", copied, limit=LIMIT + 1)
    assert not again.reused
    assert sum(s["examples"] for s in again.manifest["splits"].values()) == 2 * (LIMIT + 1)


def _lose_manifest(path):
    (path / "manifest.json").unlink()


def _tear_manifest(path):
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text[: len(text) // 2])


def _empty_manifest(path):
    (path / "manifest.json").write_text("[]")


def _lose_records(path):
    (path / "emoji-train.array_record-00000-of-00001").unlink()


def _tear_records(path):
    file = path / "emoji-test_concept.array_record-00000-of-00001"
    file.write_bytes(file.read_bytes()[:1000])


def _older_format(path):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 0}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_lose_manifest, "is half-built: it has no manifest.json"),
        (_tear_manifest, "has an unreadable manifest.json"),
        (_empty_manifest, "has an unreadable manifest.json"),
        (_lose_records, "is half-built: it lacks emoji-train"),
        (_tear_records, "is half-built: emoji-test_concept.* does not have its"),
        (_older_format, "is not of format"),
    ],
)
def test_half_built_data_is_refused_and_built_again(copied, damage, message):
    content = build.find("emoji", copied).manifest["digest"]
    damage(build.dataset_dir("emoji", copied))
    with pytest.raises(UserError, match=f"'emoji' {message}.*mmjax build emoji"):
        build.find("emoji", copied)
    again = build.build("emoji", copied, limit=LIMIT)
    assert not again.reused
    assert build.find("emoji", copied).manifest["digest"] == content


KILL = """
import os, signal, sys
from mmjax.datasets import build, emoji
module = {{"build": build, "emoji": emoji}}["{module}"]
whole, calls = getattr(module, "{function}"), []
def killed(*args):
    calls.append(args)
    if len(calls) == {call}:
        {before}
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*args)
setattr(module, "{function}", killed)
build.build("emoji", sys.argv[1], limit={limit}, force=True)
"""


@pytest.mark.parametrize(
    ("module", "function", "call", "before", "kept"),
    [
        ("emoji", "rasterise", 15, "pass", True),
        ("build", "_copy", 1, "(args[2] / 'dataset_info.json').write_text('{}')", True),
        ("build", "swap_in", 1, "pass", True),
        ("build", "swap_in", 1, "args[1].rename(args[0].parent / 'old')", False),
    ],
)
def test_a_killed_build_leaves_what_was_there_or_nothing(
    copied, module, function, call, before, kept
):
    """Killed while drawing, while copying, before the exchange and in its middle."""
    code = KILL.format(module=module, function=function, call=call, before=before, limit=LIMIT)
    assert _python(code, copied).wait(timeout=300) == -signal.SIGKILL
    path = build.dataset_dir("emoji", copied)
    if kept:
        build.find("emoji", copied)
    else:
        with pytest.raises(UserError, match="'emoji' is not there"):
            build.find("emoji", copied)
    # Nothing that lists the versions of the data set takes the remains for one.
    (remains,) = [entry for entry in path.parent.iterdir() if entry.name != path.name]
    assert remains.name.startswith(".") and not (remains / "dataset_info.json").exists()
    build.build("emoji", copied, limit=LIMIT)
    build.find("emoji", copied)


def test_old_remains_are_removed_and_new_ones_are_not(copied):
    parent = build.dataset_dir("emoji", copied).parent
    for name, age in ((".part-1.0.0-old", 7200), (".part-1.0.0-new", 60)):
        (parent / name).mkdir()
        os.utime(parent / name, (time.time() - age,) * 2)
    build.build("emoji", copied, limit=LIMIT, force=True)
    assert {entry.name for entry in parent.iterdir()} == {"1.0.0", ".part-1.0.0-new"}


def test_builds_at_the_same_time(root):
    code = (
        "import sys; from mmjax.datasets import build;"
        f"print(build.build('emoji', sys.argv[1], limit={LIMIT}).manifest['digest'])"
    )
    processes = [_python(code, root, stdout=subprocess.PIPE) for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert set(outputs) == {build.find("emoji", root).manifest["digest"]}
    assert [entry.name for entry in (root / "emoji").iterdir()] == ["1.0.0"]


def test_an_interrupted_build_cleans_up(monkeypatch, root):
    from mmjax.datasets import emoji

    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(emoji, "rasterise", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build.build("emoji", root, limit=LIMIT)
    assert list((root / "emoji").iterdir()) == []


def test_missing_data_says_what_to_run(root):
    with pytest.raises(UserError, match=f"mmjax build emoji --data_dir={root}"):
        build.find("emoji", root)


# The command


def test_the_command_reports_what_is_there(copied):
    """The whole set under a manifest of this one's: the command has no limit to ask for."""
    path = build.dataset_dir("emoji", copied)
    manifest = {**json.loads((path / "manifest.json").read_text()), "limit": None}
    (path / "manifest.json").write_text(json.dumps(manifest))
    done = _command("emoji", f"--data_dir={copied}")
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == f"emoji: {2 * LIMIT} examples"
    assert [line.split()[0] for line in lines[1:4]] == ["test_concept", "test_drawing", "train"]
    assert lines[4].startswith("already built") and lines[4].endswith(str(path))


def test_the_command_builds_several_in_turn_and_each_once(monkeypatch, capsys):
    asked = []

    def remember(name, root, *, force):
        asked.append((name, root, force))
        return build.Built(epath.Path("/there"), {"name": name, "splits": {}}, reused=False)

    monkeypatch.setattr(build, "build", remember)
    monkeypatch.setattr(sys, "argv", ["build", "notes", "quickstart", "emoji", "--force"])
    build.main()
    names = ["notes", "emoji", "speech", "emoji_line"]
    assert asked == [(name, None, True) for name in names]
    printed = [line for line in capsys.readouterr().out.splitlines() if "examples" in line]
    assert [line.split(":")[0] for line in printed] == names


def test_bundles_are_of_data_sets_that_exist():
    assert set(build.known()) >= {"emoji", "emoji_line", "emoji_noto", "notes", "speech"}
    for bundle, names in build.BUNDLES.items():
        assert bundle not in build.known() and set(names) <= set(build.known())


def test_the_command_refuses_a_wrong_name_before_it_builds_the_others(root):
    done = _command("emoji", "speach", f"--data_dir={root}")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "mmjax: error: Unknown embedded data set 'speach'. Did you mean 'speech'?\n"
    )
    assert not root.exists()
    assert "Did you mean 'quickstart'?" in _command("quikstart", f"--data_dir={root}").stderr


def test_the_command_refuses_an_unknown_name(root):
    done = _command("emojy", f"--data_dir={root}")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "mmjax: error: Unknown embedded data set 'emojy'. Did you mean 'emoji'?\n"
    )
    assert not root.exists()


def test_a_module_without_data_is_no_data_set(root):
    with pytest.raises(UserError, match="'tokenizer'. Known: emoji"):
        build.build("tokenizer", root)


def test_the_command_refuses_a_place_it_cannot_write_to(tmp_path):
    (tmp_path / "file").write_text("")
    done = _command("emoji", f"--data_dir={tmp_path / 'file'}")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"mmjax: error: Cannot write to the data directory {tmp_path}")
    assert done.stderr.count("\n") == 1


def test_the_command_names_a_missing_package(root):
    code = (
        "import sys; sys.modules['tensorflow_datasets'] = None;"
        "sys.argv = ['build', 'emoji', '--data_dir', sys.argv[1]];"
        "from mmjax.core import errors; from mmjax.datasets import build; errors.run(build.main)"
    )
    process = _python(code, root, stderr=subprocess.PIPE)
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 2 and stderr.count("\n") == 1
    assert "needs the package tensorflow_datasets" in stderr
    assert "pip install 'mmjax[data]'" in stderr
