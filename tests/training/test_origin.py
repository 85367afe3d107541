"""Check what a run began with: the code of extension files, the version of mmjax, and what its parameters came from."""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import toyrun
from etils import epath

from mmjax.core import config
from mmjax.core.errors import UserError
from mmjax.core.parameters import to_canonical
from mmjax.training import origin, session

OBJECTIVE = toyrun.EXTRA / "objectives" / "toy.py"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_extensions_are_what_a_config_names_and_what_these_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = {
        "objectives/first": "from mmjax.objectives import second, contrastive\nimport os\n",
        "objectives/second": "import mmjax.blocks.third\nfrom mmjax.nn.dense import Dense\n",
        "blocks/third": "from mmjax.objectives.first import X\n",
        "sources/unused": "",
    }
    for name, text in written.items():
        (tmp_path / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(text)
    for kind in ("objectives", "blocks", "sources"):
        package = importlib.import_module(f"mmjax.{kind}")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / kind)])
    found = config.digests_of_extensions({("objectives", "first"), ("objectives", "contrastive")})
    used = ["blocks/third", "objectives/first", "objectives/second"]
    assert found == {name: digest(tmp_path / f"{name}.py") for name in used}


def test_a_checkpoint_records_the_code_of_its_run(tmp_path: Path) -> None:
    toyrun.run(tmp_path, "steps=2")
    saved = toyrun.meta(tmp_path)
    kinds = ("blocks", "modalities", "objectives", "sources")
    code = {k: v for k, v in saved["identities"].items() if k.startswith("code.")}
    assert code == {f"code.{kind}/toy": digest(toyrun.EXTRA / kind / "toy.py") for kind in kinds}
    root = Path(session.__file__).parents[2]
    head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode == 0:
        assert saved["environment"]["commit"].removesuffix("+") == head.stdout.strip()
    assert saved["environment"]["mmjax"]


def test_all_processes_must_have_the_same_code() -> None:
    toy = toyrun.parts()
    facts = origin.started_with(toy.experiment, toy.mesh)
    assert facts["code.objectives/toy"] == digest(OBJECTIVE) and facts["mmjax"]


def test_a_commit_is_read_where_there_is_one(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", "-C", tmp_path, *who, *words], capture_output=True, text=True)
        return done.stdout.strip()

    assert origin._git(tmp_path, "rev-parse", "HEAD") == ""
    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "first")
    assert origin._git(tmp_path, "rev-parse", "HEAD") == git("rev-parse", "HEAD") != ""


def test_what_the_parameters_came_from_stays_what_it_was(tmp_path: Path) -> None:
    workdir, path = tmp_path / "run", tmp_path / "begin.npz"
    toy = toyrun.parts()
    held = to_canonical(toy.experiment.declaration.specs, toy.state.parameters)

    def save(value: float) -> str:
        np.savez(path, **{n: np.full(x.shape, value, np.float32) for n, x in held.items()})
        return digest(path)

    first = save(1)
    words = (f"init_from.path={path}", "checkpoint.every=0")
    folder = epath.Path(workdir)
    folder.mkdir()
    experiment = toyrun.parts(*words).experiment
    session.begin(experiment, folder, toy.mesh, False, print)
    second = save(2)
    with pytest.raises(UserError, match=r"init_from has changed since .*--allow_change"):
        session.begin(experiment, folder, toy.mesh, False, print)
    assert json.loads((workdir / "init_from.json").read_text())["sha256"] == first != second
    toyrun.run(workdir, *words, "steps=2", allow_change=True)
    kept = json.loads(toyrun.meta(workdir)["identities"]["init_from"])
    assert kept == {"path": str(path), "sha256": second}
    path.unlink()  # a run that has a checkpoint no longer needs it
    toyrun.run(workdir, *words, "steps=4")
    assert json.loads(toyrun.meta(workdir)["identities"]["init_from"]) == kept
