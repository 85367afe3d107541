"""Profiles on request: a trace of some steps, what was compiled, and a port for a profiler."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import jax
from etils import epath

from mmjax.core.errors import UserError
from mmjax.core.files import is_local
from mmjax.engine.compile import Program

TRACES = "profile"
DUMPS = "dumps"
_MEMORY = ("argument", "output", "alias", "temp", "generated_code")


@dataclass(frozen=True)
class ProfileConfig:
    """Steps to profile and programs to dump. All of it is off unless asked for, and changes nothing of a run.

    Attributes:
      start: the first step of the trace.
      steps: steps to trace into `WORKDIR/profile`, for TensorBoard or Perfetto; 0 for none.
        Where there are several processes, each into a folder of its own there: `process_0`, ...
      dumps: whether each program's compiled HLO and memory are written to `WORKDIR/dumps`, and there
        also the arrays on the devices when the first step begins (`memory.prof`, for pprof; of several
        processes `memory_0.prof`, ...).
      port: where a profiler can connect during the run; 0 for none. Process i is at `port` + i.
    """

    start: int = 10
    steps: int = 0
    dumps: bool = False
    port: int = 0

    def __post_init__(self) -> None:
        for name, value in {"start": self.start, "steps": self.steps, "port": self.port}.items():
            if value < 0:
                raise UserError(f"config.profile.{name} is {value}; it must be at least 0.")


class Profile:
    """Starts and stops what a config asks for; to be used in a `with` block around the steps.

    Raises:
      UserError: files are asked for, and the workdir is an object store, where no profiler can write;
        the port is taken.
    """

    def __init__(self, config: ProfileConfig, workdir: epath.Path) -> None:
        if (config.steps or config.dumps) and not is_local(workdir):
            raise UserError(f"config.profile writes to a local --workdir only; {workdir} is none.")
        self._config, self._workdir, self._is_tracing = config, workdir, False

    def next(self, step: int) -> list[int]:
        """Return the steps after `step` at which `at` must be called."""
        edges = (self._config.start, self._config.start + self._config.steps)
        return [edge for edge in edges if edge > step] if self._config.steps else []

    def at(self, step: int) -> None:
        """Start or stop the profile; call it when `step` is about to begin and no step is in flight."""
        first, last = self._config.start, self._config.start + self._config.steps
        if first <= step < last and not self._is_tracing:
            jax.profiler.start_trace(os.fspath(self._workdir / TRACES / _by_process("process_")))
            self._is_tracing = True
        elif step >= last:
            self._stop()

    def __enter__(self) -> Self:
        if self._config.dumps:
            folder = self._workdir / DUMPS
            folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.save_device_memory_profile(
                os.fspath(folder / f"memory{_by_process('_')}.prof")
            )
        if self._config.port:
            port = self._config.port + jax.process_index()
            try:
                jax.profiler.start_server(port)
            except Exception as error:
                raise UserError(
                    f"config.profile.port: no profiler on port {port}: {error}. "
                    "Choose another port."
                ) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        if self._config.port:
            jax.profiler.stop_server()

    def _stop(self) -> None:
        if self._is_tracing:
            self._is_tracing = False
            jax.profiler.stop_trace()


def _by_process(prefix: str) -> str:
    """Return the part of a file name that is this process's: nothing where it is alone."""
    return f"{prefix}{jax.process_index()}" if jax.process_count() > 1 else ""


def dump(programs: Mapping[str, Program], workdir: epath.Path) -> None:
    """Write `WORKDIR/dumps/NN_NAME.hlo.txt` and `.json` of each program: what XLA made, bytes and FLOPs."""
    folder = workdir / DUMPS
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, program) in enumerate(programs.items()):
        stem = f"{number:02d}_{re.sub(r'[^0-9A-Za-z]+', '_', name).strip('_')}"
        (folder / f"{stem}.hlo.txt").write_text(program.call.as_text() or "")  # type: ignore[attr-defined]
        facts = {"program": name, **program.report, "memory": _memory(program.call)}
        (folder / f"{stem}.json").write_text(json.dumps(facts, indent=1))


def _memory(compiled: Any) -> dict[str, int]:
    """Return the bytes of one device by kind, as XLA states them."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return {}
    return {kind: int(getattr(analysis, f"{kind}_size_in_bytes")) for kind in _MEMORY}
