"""Check what bad input gets: one line that states what, where and what to do, and a non-zero exit.

Through the real command where the surroundings matter (a full disk, a file mode, a missing package of
data); otherwise through the same mains in this process.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import toyrun
from etils import epath
from mains import refused, run
from metafile import edited

from mmjax import train

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "configs" / "tiny.py"
TOY = (f"--extra={toyrun.EXTRA}", f"--config={toyrun.CONFIG}")


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line on standard error of a command that failed."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("mmjax: error: "), done.stderr
    return done.stderr.removeprefix("mmjax: error: ")


def trained(*words: str, config: Any = TINY) -> str:
    """Return the message of `mmjax train`, which is refused."""
    return refused(train.main, f"--config={config}", *words)


@pytest.fixture
def workdir(tmp_path: Path) -> str:
    return f"--workdir={tmp_path / 'run'}"


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return four steps of the toy config; copy it to change it."""
    folder = tmp_path_factory.mktemp("toy") / "run"
    toyrun.run(folder, "steps=4")
    return folder


@pytest.fixture
def toy_copy(toy_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(toy_run, tmp_path / "run")
    return tmp_path / "run"


# --- the config --------------------------------------------------------------------------------


def test_an_unknown_key_on_the_command_line(command, workdir, tmp_path):
    done = command("train", f"--config={TINY}", workdir, "--config.optimizer.lerning_rate=1")
    line = error_line(done)
    assert "'config.optimizer.lerning_rate'" in line and "Did you mean 'learning_rate'?" in line
    assert done.stdout == "" and sorted(os.listdir(tmp_path / "run")) == [], "nothing was begun"


_EDITS = [
    ("config.steps = 14", "config.stps = 14", ["'config.stps'", "'steps'"]),
    ('"width": 32', '"widht": 32', ["'config.model.widht'", "'width'"]),
    ('"weight": 2', '"wieght": 2', ["'tasks.image_text.wieght'", "'weight'"]),
    ('"embed_dim": 16', '"embed_dims": 16', ["'tasks.image_text.objective.embed_dims'", "'embed_dim'"]),
    ('"length": 8', '"lenght": 8', ["'tasks.image_text.inputs.text.lenght'", "'length'"]),
    ('"names": drawings', '"nams": drawings', ["image_text.evaluators.groups.nams'", "'names'"]),
    ('"patch": 8', '"pach": 8', ["'modalities.image.pach'", "'patch'"]),
    ('"repeat": 2', '"repeet": 2', ["'config.model.layers[0].repeet'", "'repeat'"]),
    ('"mlp_dim": 64', '"mlp_dm": 64', ["model.layers[0].blocks[0]", "mlp_dm"]),
    ("config.steps = 14", "config.steps = '14'", ["'config.steps' is '14'", "expected int"]),
    ('"batch": 16', '"batch": 16.0', ["'tasks.image_text.batch' is 16.0", "expected int"]),
    ('"split": s', '"split": 3', ["'tasks.image_text.source.split' is 3", "expected str"]),
    ("config.steps = 14", "pass", ["'config.steps' is missing"]),
    ('"batch": 16,', "", ["'tasks.image_text.batch' is missing"]),
    ('{"name": "image", "patch": 8}', '{"patch": 8}', ["modalities.image: 'name' is missing"]),
    ('"name": "transformer"', '"name": "transfomer"', ["no 'transfomer'", "'transformer'"]),
    ('{"name": "text"', '{"name": "txt"', ["modalities.text.name: no 'txt'", "'text'"]),
    ('"contrastive"', '"contrastiv"', ["image_text.objective.name: no 'contrastiv'", "'contrastive'"]),
    ('"retrieval"', '"retreival"', ["evaluators.drawings.name: no 'retreival'", "'retrieval'"]),
    ('"tfds"', '"tfsd"', ["source.name: no 'tfsd'", "'tfds'"]),
    ('"adamw"', '"adam"', ["optimizer.algorithm.name: no 'adam'", "'adamw'"]),
    ("config.seed = 0", "config.seed = print", ["config.seed is a builtin"]),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "words"), _EDITS)
def test_a_wrong_config_file_names_the_key_and_the_nearest(tmp_path, workdir, old, new, words):
    text = TINY.read_text()
    assert old in text
    (tmp_path / "edited.py").write_text(text.replace(old, new))
    message = trained(workdir, config=tmp_path / "edited.py")
    for word in words:
        assert word in message
    assert "\n" not in message


def test_a_missing_config(workdir):
    line = trained(workdir, config="configs/qickstart.py")
    assert "No config file 'configs/qickstart.py'" in line and "get_config()" in line


def test_a_file_that_is_no_config(tmp_path, workdir):
    (tmp_path / "x.py").write_text("config = {}\n")
    assert "x.py' has no function get_config()" in trained(workdir, config=tmp_path / "x.py")


def test_an_unknown_argument(workdir):
    line = trained(workdir, "--step=3")
    assert "Unknown argument --step=3. usage: " in line and "--workdir" in line


# --- data --------------------------------------------------------------------------------------


def test_missing_data_says_what_to_run(workdir, tmp_path, monkeypatch):
    monkeypatch.setenv("MMJAX_DATA_DIR", str(tmp_path / "data"))
    line = trained(workdir)
    assert "'emoji' is not there" in line
    assert f"mmjax build emoji --data_dir={tmp_path / 'data'}" in line


def broken_data(emoji_dir: epath.Path, folder: Path, fault: str) -> None:
    """Return a copy of the data set that a killed build or a bad copy could have left."""
    shutil.copytree(emoji_dir / "emoji", folder / "emoji")
    home = folder / "emoji" / "1.0.0"
    shard = next(home.glob("emoji-train*"))
    if fault == "cut":
        shard.write_bytes(shard.read_bytes()[:1000])
    else:
        {"manifest": home / "manifest.json", "shard": shard, "tokenizer": home / "tokenizer.model"}[
            fault
        ].unlink()


@pytest.mark.parametrize("fault", ["manifest", "shard", "cut", "tokenizer"])
def test_half_built_data_says_what_to_run(emoji_dir, tmp_path, monkeypatch, workdir, fault):
    broken_data(emoji_dir, tmp_path / "data", fault)
    monkeypatch.setenv("MMJAX_DATA_DIR", str(tmp_path / "data"))
    message = trained(workdir)
    assert "half-built" in message
    assert f"mmjax build emoji --data_dir={tmp_path / 'data'}" in message


def test_a_data_set_of_others_that_is_not_built(tmp_path, workdir):
    words = ["source.dataset=mnist", f"source.folder={tmp_path}"]
    message = trained(workdir, *(f"--config.tasks.image_text.{w}" for w in words))
    assert f"tfds build mnist --file_format=array_record --data_dir={tmp_path}" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("inputs.text.field=captoin", ["tasks.image_text reads field 'captoin'", "'caption'?"]),
        ("objective.positive_key=concpt", ["tasks.image_text reads field 'concpt'", "'concept'?"]),
        ("evaluators.groups.label=gruop", ["tasks.image_text.evaluators reads field 'gruop'", "'group'?"]),
        ("evaluators.drawings.positive_key=x", ["tasks.image_text.evaluators reads field 'x'"]),
    ],
)  # fmt: skip
def test_a_field_that_the_data_lacks(emoji_dir, workdir, override, words):
    message = trained(workdir, f"--config.tasks.image_text.{override}")
    for word in (*words, "emoji/1.0.0:", "lacks", "caption, ", "subgroup"):
        assert word in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("inputs.text.field=image", "[0]: field 'image' as modality 'text': a text is a string"),
        ("inputs.image.field=caption", "[0]: field 'caption' as modality 'image': an image has"),
        ("objective.positive_key=caption", "(str); expected an integer"),
        ("source.split=trian", "'emoji' has no split 'trian'. Did you mean 'train'?"),
        ("source.split=train[:0]", "split 'train[:0]' has no examples"),
    ],
)
def test_a_field_or_split_of_the_wrong_kind(emoji_dir, workdir, override, words):
    message = trained(workdir, f"--config.tasks.image_text.{override}")
    assert words in message and "\n" not in message


# --- shapes and devices ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tasks.image_text.batch=12", "tasks.image_text: batch 12 does not divide over the 8 parts"),
        ("evaluation.batch=20", "batch 20 does not divide over the 8 parts"),
        ("mesh.data=3", "mesh {'data': 3, 'fsdp': 1, "),
        ("mesh.fsdp=-1", "at most one is -1"),
        ("tasks.image_text.inputs.image.size=20", "tasks.image_text.inputs.image: image size 20 is not a multiple"),
        ("tasks.image_text.inputs.text.length=200", "tasks.image_text.inputs.text: text length 200"),
        ("modalities.text.vocabulary=100", "modalities.text.vocabulary is 100; the tokenizer has 2048"),
        ("limits.programs=1", "over limits.programs = 1"),
        ("dtype.compute=float64", "JAX_ENABLE_X64=1"),
    ],
)  # fmt: skip
def test_what_does_not_fit(emoji_dir, workdir, override, words):
    assert words in trained(workdir, f"--config.{override}")


def test_a_run_without_a_tokenizer_says_what_to_give(emoji_dir, workdir):
    message = trained(workdir, "--config.modalities.text.tokenizer=''")
    assert "modalities.text.tokenizer is not set" in message and "of 2048 pieces" in message
    assert "mmjax tokenizer train SOURCE --field=caption --size=2048 --out=FILE" in message


def test_a_tokenizer_that_is_not_there_says_what_to_run(emoji_dir, workdir):
    message = trained(workdir, "--config.modalities.text.tokenizer=/nowhere/my.model")
    assert "No tokenizer model at /nowhere/my.model" in message
    assert "mmjax tokenizer train" in message
    assert "build emoji" not in message


def test_a_mesh_for_other_devices_says_how_many_there_are(tmp_path):
    line = refused(train.main, *TOY, f"--workdir={tmp_path}", "--config.mesh.data=2")
    assert "does not make up the 8 devices here" in line and "--config.mesh.AXIS" in line


# --- a workdir that holds a run ----------------------------------------------------------------


def test_a_structural_change_is_refused(toy_copy):
    message = refused(
        train.main, *TOY, f"--workdir={toy_copy}", "--config.steps=4", "--config.seed=1"
    )
    assert "seed (structural): saved None, now 1" in message and "another --workdir" in message
    assert "steps" not in message


def test_a_schedule_change_asks_for_a_word(toy_copy):
    words = (*TOY, f"--workdir={toy_copy}", "--config.steps=4", "--config.tasks.one.weight=5")
    message = refused(train.main, *words)
    assert "tasks.one.weight (schedule): saved 2, now 5" in message and "--allow_change" in message


def test_a_free_change_is_taken_up_and_told(toy_copy):
    ended = run(
        train.main, *TOY, f"--workdir={toy_copy}", "--config.steps=4", "--config.log.flush_every=7"
    )
    assert (ended.status, ended.err) == (0, "")
    assert "log.flush_every (free): saved None, now 7" in ended.out and "Done" in ended.out


def test_a_checkpoint_of_other_shapes(toy_copy):
    """Width is structural, so that only a checkpoint that was changed gets this far."""
    with edited(toy_copy, 4) as meta:
        meta["config"]["model"]["width"] = 16
    words = ("--config.steps=4", "--config.model.width=16")
    message = refused(train.main, *TOY, f"--workdir={toy_copy}", *words)
    assert str(toy_copy / "checkpoints" / "4") in message
    assert (
        "parameters/stems/toy/embed/kernel: expected float32[6, 16], found float32[6, 8]" in message
    )
    assert (toy_copy / "checkpoints" / "4").exists(), "a checkpoint that is whole is not set aside"


def test_a_workdir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    line = refused(train.main, *TOY, f"--workdir={tmp_path / 'file'}")
    assert "is a file. Give a folder." in line
    assert (tmp_path / "file").read_text() == "mine"


def test_a_relative_workdir_is_as_good_as_an_absolute_one(tmp_path, monkeypatch):
    """Orbax takes absolute paths only; the README's command gives a relative one."""
    monkeypatch.chdir(tmp_path)
    ended = run(train.main, *TOY, "--workdir=runs/x", "--config.steps=2")
    assert (ended.status, ended.err) == (0, "")
    assert (tmp_path / "runs" / "x" / "checkpoints" / "2").is_dir()


# --- no permission -----------------------------------------------------------------------------

# Root may write anywhere. Without this capability it is held to file modes, as everybody is.
_HELD_TO_MODES = """
import ctypes, os, sys
if os.geteuid() == 0:
    assert ctypes.CDLL(None, use_errno=True).prctl(24, 1, 0, 0, 0) == 0, os.strerror(ctypes.get_errno())
os.execv(sys.executable, [sys.executable, "-m", "mmjax", "train", *sys.argv[1:]])
"""


def ordinary(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _HELD_TO_MODES, *TOY, *words],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture
def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}


def test_a_folder_that_may_not_be_written(tmp_path, environment):
    (tmp_path / "locked").mkdir(mode=0o555)
    done = ordinary(environment, f"--workdir={tmp_path / 'locked' / 'run'}")
    assert f"Permission denied: {tmp_path / 'locked' / 'run'}" in error_line(done)
    assert "--workdir" in done.stderr


@pytest.mark.parametrize("locked", ["", "checkpoints"])
def test_a_run_that_may_not_be_written(toy_copy, environment, locked):
    (toy_copy / locked).chmod(0o555)
    done = ordinary(environment, f"--workdir={toy_copy}", "--config.steps=8")
    (toy_copy / locked).chmod(0o755)
    assert f"Permission denied: {toy_copy / locked}" in error_line(done)
    assert [p.name for p in (toy_copy / "checkpoints").iterdir()] == ["4"]


# --- no space ----------------------------------------------------------------------------------

# On a file system of 8 MiB where mounting is allowed; elsewhere a limit on the size of files has to do.
_FULL = """
cd "$1"; shift; mkdir run
if [ "$MOUNTS" = 1 ]; then mount -t tmpfs -o size=8m tmpfs run; fi
"$@" --config.steps=4 > first.out 2> first.err || exit 11
if [ "$MOUNTS" = 1 ]; then
  cat /dev/zero > run/filler 2> /dev/null; truncate -s -256K run/filler
  "$@" > second.out 2> second.err; echo $? > second.status
  rm run/filler
else
  (ulimit -f 128; "$@" > second.out 2> second.err; echo $? > second.status)
fi
ls run/checkpoints > left
"$@" > third.out 2> third.err || exit 12
"""


def may_mount() -> list[str] | None:
    """Return the words in front of a command that may mount, if this user has such."""
    for words in (["unshare", "-m"], ["unshare", "-rm"]):
        test = [*words, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        if shutil.which("unshare") and subprocess.run(test, capture_output=True).returncode == 0:
            return words
    return None


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, environment):
    """Four steps, a disk that fills, a clear error; then space again, and on from step 4."""
    mounting = may_mount()
    workdir = tmp_path / "run"
    words = [sys.executable, "-m", "mmjax", "train", *TOY, f"--workdir={workdir}"]
    done = subprocess.run(
        [*(mounting or []), "sh", "-c", _FULL, "sh", str(tmp_path), *words,
         "--config.model.width=256", "--config.evaluation.every=0"],
        env={**environment, "MOUNTS": str(int(bool(mounting)))},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    text = {name: (tmp_path / name).read_text() for name in os.listdir(tmp_path) if name != "run"}
    assert done.returncode == 0, (done, text)
    assert int(text["second.status"]) == 2, text
    # TensorStore's threads may print words of their own about other writes that it gives up, even
    # into the line before ours.
    [line] = re.findall(r"mmjax: error: .*", text["second.err"])
    reason = "No space left on device: " if mounting else "File too large: "
    assert line.startswith(f"mmjax: error: {reason}{workdir}") and "run again" in line
    assert "mmjax/" not in text["second.err"].replace(str(workdir), ""), "no traceback of ours"
    assert "4" in text["left"].split() and "8" not in text["left"].split()
    assert f"Resuming from step 4 in {workdir}" in text["third.out"]
    assert "Finished" in text["third.out"] and text["third.err"] == ""


def test_a_file_that_may_not_grow(toy_copy, environment):
    words = [
        sys.executable,
        "-m",
        "mmjax",
        "train",
        *TOY,
        f"--workdir={toy_copy}",
        "--config.steps=8",
    ]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -f 0; "$@"', "sh", *words],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert f"File too large: {toy_copy}" in error_line(done)
