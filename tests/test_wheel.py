"""The wheel: built from the checkout, installed elsewhere, and used from there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mmjax import cli
from mmjax.core import config as configs

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("mmjax", "configs", "setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE")

# Runs in the installed wheel: where it lies, what it is, and the help of every command.
INSPECT = """
import contextlib, importlib.metadata, io, json, sys
import mmjax
from mmjax import cli
from mmjax.core import config
helps = {}
for command in cli.COMMANDS:
    sys.argv = ["mmjax", command, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        cli.main()
    helps[command] = out.getvalue()
files = {name: config.config_file(name) for name in config.shipped()}
print(json.dumps({
    "file": mmjax.__file__, "version": mmjax.__version__, "metadata": importlib.metadata.version("mmjax"),
    "helps": helps, "configs": files, "quickstart": config.read_file("quickstart"),
}))
"""


def pip(*words: str, cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *words], cwd=cwd, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel, built without the network from a copy of the sources, so that the checkout stays clean."""
    root = tmp_path_factory.mktemp("wheel")
    (root / "source").mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, root / "source" / name)
    pip(
        "wheel",
        "./source",
        "--wheel-dir=made",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        cwd=root,
    )
    (result,) = (root / "made").iterdir()
    return result


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """Return a folder that holds mmjax from the wheel, and nothing else."""
    target = wheel.parent.parent / "installed"
    pip("install", "--no-deps", "--no-index", f"--target={target}", str(wheel), cwd=wheel.parent)
    return target


def call(installed: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python outside the checkout, whose only mmjax on the path is that of the wheel."""
    others = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    path = os.pathsep.join([str(installed), *(p for p in others if Path(p).resolve() != ROOT)])
    elsewhere = installed.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, *words], cwd=elsewhere, env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def inspected(installed: Path) -> dict:
    done = call(installed, "-c", INSPECT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_module_and_config_is_in_the_wheel(wheel):
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "mmjax").rglob("*.py")}
    shipped = {f"mmjax/configs/{p.name}" for p in (ROOT / "configs").glob("*.py")}
    assert len(shipped) > 5
    names = {n for n in zipfile.ZipFile(wheel).namelist() if not re.match(r"mmjax-[\w.]+\.dist-info/", n)}  # fmt: skip
    assert names == {*modules, *shipped, "mmjax/py.typed"}


def test_the_version_is_that_of_the_metadata(inspected, installed):
    assert Path(inspected["file"]) == installed / "mmjax" / "__init__.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+", inspected["version"])
    assert inspected["version"] == inspected["metadata"]


def test_every_config_is_found_by_name(inspected, installed):
    folder = installed / "mmjax" / "configs"
    assert inspected["configs"] == {
        p.stem: str(folder / p.name) for p in sorted((ROOT / "configs").glob("[!_]*.py"))
    }
    assert inspected["quickstart"] == configs.read_file(str(ROOT / "configs" / "quickstart.py"))


def test_every_command_is_there_with_its_help(inspected):
    assert set(inspected["helps"]) == set(cli.COMMANDS)
    for command, text in inspected["helps"].items():
        assert text.startswith(f"usage: mmjax {command} [-h]"), text


def test_the_module_is_the_command(installed):
    done = call(installed, "-m", "mmjax", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == cli.overview() + "\n"
    done = call(installed, "-m", "mmjax", "train", "--config=quikstart", "--workdir=run")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("mmjax: error: No config 'quikstart'. Did you mean 'quickstart'?")
    assert not (installed.parent / "elsewhere" / "run").exists()
