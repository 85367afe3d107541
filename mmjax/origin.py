"""The origin of a run, apart from config and data: its code, and the run or file that its first parameters are of."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from etils import epath

from mmjax.checkpoint import Restored
from mmjax.errors import UserError
from mmjax.experiment import Experiment
from mmjax.warm_start import pinned


def code_of(experiment: Experiment) -> dict[str, str]:
    """Return the digests of the extension files of a config as identities: `code.KIND/NAME`."""
    return {f"code.{name}": digest for name, digest in experiment.extensions.items()}


@cache
def mmjax_version() -> dict[str, str]:
    """Return the version of mmjax and, if it runs from a checkout, its git commit (`+` if files have changed since)."""
    package = Path(__file__).resolve().parent
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


def check_code(
    saved: Mapping[str, str],
    experiment: Experiment,
    allow_change: bool,
    say: Callable[[str], None],
) -> None:
    """Compare the extension files (`--extra`) of a config with those that a run had.

    Args:
      saved: the identities of a checkpoint.
      experiment: the config as it is now.
      allow_change: whether they may differ, which is said.
      say: prints a line.

    Raises:
      UserError: they differ and may not.
    """
    now = code_of(experiment)
    changed = sorted(key for key in saved.keys() & now.keys() if saved[key] != now[key])
    if not changed:
        return
    words = f"Code of the run has changed since it was saved: {', '.join(changed)}"
    if not allow_change:
        raise UserError(
            f"{words}. Restore it, add --allow_change to continue with it, or use another --workdir."
        )
    say(f"{words}.")


def beginning(workdir: epath.Path, restored: Restored | None) -> dict[str, str]:
    """Return the identity of the run or file that the first parameters were taken from."""
    if restored is not None:
        return {k: v for k, v in restored.meta["identities"].items() if k == "init_from"}
    source = pinned(workdir)
    return {"init_from": json.dumps(source, sort_keys=True)} if source else {}
