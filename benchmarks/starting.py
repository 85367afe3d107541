"""Time from the start of a run to its first step, with compilations kept and without; and from a kill to the next step.

Each start is a process of `mmjax train`. `cold` has an empty folder of compiled programs, `warm` the one that the start
before filled; both begin from nothing. `killed` is a run that has saved, killed by SIGKILL a few steps later, and
started again at once: until a step that it had not yet taken. What is timed ends when the step's line stands in
`metrics.jsonl`. Of all, so many rounds as a tenth of `--pairs`, and three at least.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks._pairs import Effort, Quantity, quantity
from mmjax.core.errors import UserError

SAVED, LATER = 5, 3  # steps until a checkpoint; steps behind it after which the run is killed
PATIENCE = 1800.0  # seconds


def measure(effort: Effort) -> list[Quantity]:
    """Return seconds, and ratios to a cold start."""
    rounds = max(3, effort.pairs // 10)
    times: dict[str, list[float]] = {"cold": [], "warm": [], "killed": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for name, seconds in _round(Path(folder), effort).items():
                times[name].append(seconds)
    result = [quantity(f"start to first step, {n}", times[n], "s") for n in ("cold", "warm")]
    result.append(quantity("kill to next step", times["killed"], "s"))
    for name in ("warm", "killed"):
        values = [a / b for a, b in zip(times[name], times["cold"], strict=True)]
        result.append(quantity(f"{name} to cold", values, wanted="below 1"))
    return result


def _round(folder: Path, effort: Effort) -> dict[str, float]:
    file = folder / "config.py"
    block = {**effort.block, "steps": 1_000_000, "checkpoint": {"every": SAVED}}
    block["evaluation"] = {**block.get("evaluation", {}), "every": 0}
    text = json.dumps(json.dumps(block))
    file.write_text(f"import json\n\n\ndef get_config():\n    return json.loads({text})\n")

    def start(name: str) -> Any:
        return _running(file, folder / name, folder / "compiled", effort.extra)

    result = {}
    for name in ("cold", "warm"):
        began = time.perf_counter()
        with start(name) as run:
            _until(run, folder / name, lambda step: step >= 0)
            result[name] = time.perf_counter() - began
            if name == "warm":
                _until(run, folder / name, lambda step: step >= SAVED + LATER)
    before = _last(folder / "warm")
    began = time.perf_counter()
    with start("warm") as run:
        _until(run, folder / "warm", lambda step: step > before)
        result["killed"] = time.perf_counter() - began
    return result


@contextmanager
def _running(
    config: Path, workdir: Path, compiled: Path, extra: Sequence[str]
) -> Iterator[subprocess.Popen[str]]:
    """Yield a run, killed at the end."""
    words = [sys.executable, "-m", "mmjax", "train", f"--config={config}", f"--workdir={workdir}"]
    words += [f"--extra={each}" for each in extra]
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(compiled)}
    with tempfile.TemporaryFile("w+") as said:
        run = subprocess.Popen(
            words, env=env, stdout=said, stderr=said, text=True, start_new_session=True
        )
        try:
            yield run
            if run.poll() is not None:
                said.seek(0)
                raise UserError(f"The run ended by itself: {said.read()[-2000:]}")
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
            run.wait()


def _until(run: subprocess.Popen[str], workdir: Path, there: Callable[[int], bool]) -> None:
    """Wait for a step; or until the run has ended, which is then reported."""
    deadline = time.monotonic() + PATIENCE
    while run.poll() is None and not there(_last(workdir)):
        if time.monotonic() > deadline:
            raise UserError(f"No step of the run came in {PATIENCE:.0f} s.")
        time.sleep(0.01)


def _last(workdir: Path) -> int:
    """Return the last step of a run whose line stands; -1 for none."""
    file = workdir / "metrics.jsonl"
    if not file.exists():
        return -1
    with file.open("rb") as lines:
        lines.seek(max(0, file.stat().st_size - 65_536))
        whole = [line for line in lines.read().split(b"\n")[:-1] if line.startswith(b"{")]
    steps = [json.loads(line)["step"] for line in whole if b'"kind": "train"' in line]
    return max(steps, default=-1)
