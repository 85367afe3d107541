"""Weights & Biases, where a config asks for it (`log.wandb`) and the package is there."""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from mmjax.core.errors import UserError


def require(project: str) -> Any:
    """Return the package, as a config that names a project needs it.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(
            f"log.wandb is '{project}', but the package wandb is not installed. "
            "Install it (pip install wandb), or leave log.wandb empty."
        ) from error


class WandbRun:
    """A run of Weights & Biases that resumes when ours does; one process of a run makes it.

    Where a run is killed and repeats steps, W&B shows these twice, at the same `step`: it cannot take
    back what it holds. `metrics.jsonl` and TensorBoard can.

    Args:
      project: its name there.
      workdir: the run's folder, which gives the run its identity.
      config: the config as plain data.
    """

    def __init__(self, project: str, workdir: epath.Path, config: Mapping[str, Any]) -> None:
        identity = hashlib.sha256(os.fspath(workdir).encode()).hexdigest()[:16]
        self._run = require(project).init(
            project=project, id=identity, name=workdir.name, resume="allow", config=dict(config)
        )
        # Our steps may go back after a kill, which W&B's own count of steps must not.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def add(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Add numbers of a step, by name."""
        self._run.log({"step": step, **{name: float(value) for name, value in scalars.items()}})

    def flush(self) -> None:
        """Do nothing: W&B sends in the background."""

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()
