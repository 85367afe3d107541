"""The golden runs: small runs that one commit wrote, and what it found in them.

    PYTHONPATH=. python tests/golden/runs.py COMMIT [NAME ...]

writes `tests/golden/COMMIT/NAME.zip`: a run as it stood at a checkpoint in its middle (`run/`) and `expected.json`:
a digest of the checkpoint, its evaluation, what `mmjax.load` embeds, and the parameters and results at the run's end.
Write them by the code of that commit, once; later versions read them (tests/test_golden_runs.py).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parent / "configs"
sys.path[:0] = [str(HERE.parent / "extra"), str(HERE.parent / "pod")]

import toyrun  # noqa: E402

import mmjax  # noqa: E402
from mmjax import evaluate  # noqa: E402
from mmjax.core import config as configs  # noqa: E402
from mmjax.core.config import Block  # noqa: E402
from mmjax.engine import checkpoint  # noqa: E402
from mmjax.objectives.base import embedded  # noqa: E402

TEXTS = ("a red apple", "violin", "")


@dataclass(frozen=True)
class Golden:
    """A golden run.

    Attributes:
      config: a config in `tests/configs`.
      overrides: what differs from it.
      step: the checkpoint that the zip holds.
    """

    config: str
    overrides: tuple[str, ...] = ()
    step: int = 4


_EXPERTS = {
    "name": "transformer",
    "num_heads": 2,
    "mlp_dim": 16,
    "experts": {
        "count": 4,
        "router": {"name": "token_choice", "top_k": 2, "noise": 1.0},
        "group_size": 8,
        "losses": {"importance": 0.01, "load": 0.01},
    },
}
RUNS = {
    "toy": Golden("toy.py"),
    "quickstart": Golden("quickstart_tiny.py", step=11),
    "experts": Golden(
        "toy.py",
        (
            f"model.layers=[{{'repeat': 2, 'blocks': [{{'name': 'toy'}}, {_EXPERTS!r}]}}]",
            "optimizer.decay=cosine",
        ),
    ),
    "own_moments": Golden("toy.py", ("optimizer.update_scope=own_moments",)),
    "accumulate": Golden("toy.py", ("optimizer.accumulate=2", "optimizer.ema=0.9")),
}


def block(name: str) -> Block:
    """Return the config of a golden run, as today's code would read it."""
    toyrun.block()
    golden = RUNS[name]
    return configs.override(configs.read_file(str(CONFIGS / golden.config)), golden.overrides)


def sums(workdir: Path) -> dict[str, list[float]]:
    """Return the sum, and the sum of squares, of each parameter in the newest checkpoint."""
    held = {n: x.astype("float64") for n, x in toyrun.parameters(workdir).items()}
    return {n: [float(x.sum()), float((x * x).sum())] for n, x in held.items()}


def vectors(workdir: Path) -> list[list[float]]:
    """Return what the loaded run embeds; nothing for the toys, which embed nothing."""
    model = mmjax.load(str(workdir))
    if not any("text" in embedded(task.objective) for task in model.tasks.values()):
        return []
    vectors: list[list[float]] = model.embed(text=list(TEXTS)).astype(float).tolist()
    return vectors


def write(commit: str, name: str) -> None:
    """Write one golden run."""
    golden = RUNS[name]
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        records = toyrun.run(workdir, config=block(name))
        end: Mapping[str, Any] = {"sums": sums(workdir), "records": records}
        for path in (workdir / "checkpoints").iterdir():
            if path.name.isdigit() and int(path.name) > golden.step:
                shutil.rmtree(path)
        for file in ("results.json", "summary.json", "report.html"):
            (workdir / file).unlink(missing_ok=True)
        assert checkpoint.steps(toyrun.epath.Path(workdir))[0] == golden.step
        expected = {
            "commit": commit,
            "bits": toyrun.bits(workdir),
            "sums": sums(workdir),
            "records": evaluate.evaluate(toyrun.epath.Path(workdir), None, []),
            "vectors": vectors(workdir),
            "end": end,
        }
        out = HERE / commit / f"{name}.zip"
        out.parent.mkdir(exist_ok=True)
        held = [workdir / "checkpoints" / str(golden.step), workdir / "assets"]
        files = [p for h in held for p in sorted(h.rglob("*")) if p.is_file()]
        files += [workdir / "config.json", workdir / "metrics.jsonl", workdir / "goodput.jsonl"]
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
            for path in files:
                file.write(path, Path("run") / path.relative_to(workdir))
            file.writestr("expected.json", json.dumps(expected, indent=1))


def main(arguments: list[str]) -> None:
    commit, *names = arguments
    for name in names or RUNS:
        write(commit, name)


if __name__ == "__main__":
    main(sys.argv[1:])
