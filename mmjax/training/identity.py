"""The identities of a run: digests of its data, files and code, and whether a checkpoint's are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from etils import epath
from jax.sharding import Mesh

from mmjax.core.errors import UserError
from mmjax.data.identity import is_same
from mmjax.data.tokenizer import how_to_get
from mmjax.experiment import Experiment
from mmjax.sources.base import Examples
from mmjax.training.origin import code_of, environment


@dataclass(frozen=True)
class Here:
    """The run as it is here and now, with which its checkpoints are compared.

    Attributes:
      identities: digests of the data and files (`identities_of`).
    """

    experiment: Experiment
    workdir: epath.Path
    mesh: Mesh
    identities: Mapping[str, str]

    def check(
        self, meta: Mapping[str, Any], allow_change: bool, log: Callable[[str], None]
    ) -> None:
        """Compare data, files and code with those of a checkpoint, and announce another environment.

        Raises:
          UserError: data or files differ; or code does, and `allow_change` is False.
        """
        check_identities(meta["identities"], self.identities, self.workdir)
        check_code(meta["identities"], self.experiment, allow_change, log)
        announce_environment(meta["environment"], environment(self.mesh), log)


def identities_of(experiment: Experiment, data: Mapping[str, Examples]) -> dict[str, str]:
    """Return the digests of the data of each task and of the files that modalities name.

    Raises:
      UserError: a file is missing.
    """
    sources = {f"tasks.{name}.source": examples.identity for name, examples in data.items()}
    return sources | _identities_of_files(experiment)


def _identities_of_files(experiment: Experiment) -> dict[str, str]:
    identities = {}
    for name, modality in experiment.used.items():
        for file, path in modality.files().items():
            if not path.exists():
                raise UserError(f"modalities.{name}: file '{path}' is missing. {how_to_get(path)}")
            identities[f"modalities.{name}/{file}"] = digest(path.read_bytes())
    return identities


def digest(content: bytes) -> str:
    """Return the SHA-256 of `content` in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def check_identities(saved: Mapping[str, str], now: Mapping[str, str], workdir: epath.Path) -> None:
    """Compare the data and files of a checkpoint with those that are there now.

    Args:
      saved: the identities of a checkpoint in `workdir`; those that `now` lacks are not compared.
      now: the identities of what was opened.
      workdir: for the message.

    Raises:
      UserError: they differ.
    """
    changed = [key for key in saved.keys() & now.keys() if not is_same(saved[key], now[key])]
    if changed:
        raise UserError(
            f"The data of the run in '{workdir}' has changed since: {', '.join(sorted(changed))}. "
            "Restore the data it began with, or use another --workdir."
        )


def check_code(
    saved: Mapping[str, str],
    experiment: Experiment,
    allow_change: bool,
    log: Callable[[str], None],
) -> None:
    """Compare the extension files (`--extra`) of a config with those that a run had.

    Args:
      saved: the identities of a checkpoint.
      experiment: the config as it is now.
      allow_change: whether they may differ, which is logged.
      log: prints a line.

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
    log(f"{words}.")


def announce_environment(
    saved: Mapping[str, Any], now: Mapping[str, Any], log: Callable[[str], None]
) -> None:
    """Log what differs from the environment that a checkpoint was made in."""
    # An older version has not recorded all of them.
    changed = [f"{k} {saved[k]} -> {now[k]}" for k in now if k in saved and saved[k] != now[k]]
    if changed:
        log(
            f"The run began in another environment, so results may differ in rounding: {', '.join(changed)}."
        )
