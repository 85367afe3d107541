"""The origin of a run, apart from config and data: its code, and the run or file that its first parameters are of."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from mmjax.core import config as configs
from mmjax.engine.checkpoint import Restored
from mmjax.engine.warm_start import pinned
from mmjax.experiment import Experiment

_VERSIONED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def code_of(experiment: Experiment) -> dict[str, str]:
    """Return the digests of the extension files of a config as identities: `code.KIND/NAME`."""
    return {f"code.{name}": digest for name, digest in experiment.extensions.items()}


@cache
def mmjax_version() -> dict[str, str]:
    """Return the version of mmjax and, if it runs from a checkout, its git commit (`+` if files have changed since)."""
    package = Path(__file__).resolve().parents[1]
    commit = ""
    if (package.parent / ".git").exists():
        commit = _git(package, "rev-parse", "HEAD")
        is_changed = _git(package, "status", "--porcelain", "--untracked-files=no", "--", ".")
        commit += "+" if commit and is_changed else ""
    return {"mmjax": importlib.metadata.version("mmjax"), **({"commit": commit} if commit else {})}


def _git(folder: Path, *words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True)
    except OSError:
        return ""  # not installed
    return done.stdout.strip() if done.returncode == 0 else ""


def beginning(workdir: epath.Path, restored: Restored | None) -> dict[str, str]:
    """Return the identity of the run or file that the first parameters were taken from."""
    if restored is not None:
        return {k: v for k, v in restored.meta["identities"].items() if k == "init_from"}
    source = pinned(workdir)
    return {"init_from": json.dumps(source, sort_keys=True)} if source else {}


def environment(mesh: Mesh) -> dict[str, Any]:
    """Return what the bits of a run depend on, apart from its config."""
    device = mesh.devices.flat[0]
    return {
        **mmjax_version(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _VERSIONED},
        "devices": int(mesh.devices.size),
        "mesh": {axis: int(size) for axis, size in mesh.shape.items()},
        "device_kind": device.device_kind,
        "processes": jax.process_count(),
        "cores": os.cpu_count(),
        "processor": _processor(),
    }


def started_with(experiment: Experiment, mesh: Mesh) -> dict[str, Any]:
    """Return what all processes of a run must have in common, by key: config, code, versions and mesh."""
    block = experiment.block
    config = {f"config.{key}": value for key, value in configs.flat(block)}
    here = environment(mesh)
    alike = ("python", *mmjax_version(), *_VERSIONED, "devices", "mesh")
    return {**config, **code_of(experiment), **{key: here[key] for key in alike}}


def _processor() -> str:
    try:
        lines = epath.Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
