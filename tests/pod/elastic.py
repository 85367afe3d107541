"""Trains the tiny config in float64 on several meshes of this process's devices, and notes what came of it.

    python tests/pod/elastic.py CONFIG OUT '{"name": {"mesh": {...}, "depends": false}, ...}' [KEY=VALUE ...]

writes OUT/NAME.npz (parameters, state and initial parameters) and OUT/NAME.json (batches, losses, shardings).
With `depends`, the masks' random keys depend on the number of devices, as they must not.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from etils import epath

from mmjax import train
from mmjax.core import config as configs
from mmjax.engine.checkpoint import Checkpoints
from mmjax.engine.compile import use_cache
from mmjax.engine.loader import place
from mmjax.experiment import make_experiment
from mmjax.task import Task
from mmjax.training import flight


class Notes:
    """The record of one run: its batches as they lie on the devices, and what it saved at its end."""

    def __init__(self) -> None:
        self.batches: list[str] = []
        self.parts: list[int] = []
        self.arrays: dict[str, np.ndarray[Any, Any]] = {}
        self.shardings: dict[str, list[int]] = {}

    def place(self, *arguments: Any) -> Any:
        placed = place(*arguments)
        sha = hashlib.sha256()
        for array in jax.tree.leaves(placed):
            sha.update(np.asarray(array).tobytes())
        self.batches.append(sha.hexdigest())
        self.parts.append(len({str(s.index) for s in placed.valid.addressable_shards}))
        return placed

    def save(self, step: int, state: Any, meta: Any) -> None:
        pairs, _tree = jax.tree_util.tree_flatten_with_path(state)
        for path, array in pairs:
            name = "/".join(str(key.key) for key in path)
            self.arrays[name] = np.asarray(array)
            self.shardings[name] = [array.size, array.addressable_shards[0].data.size]


def run(block: configs.Block, mesh: dict[str, int], depends: bool, out: Path, name: str) -> None:
    block = configs.override(block, [f"mesh.{axis}={size}" for axis, size in mesh.items()])
    notes, loss = Notes(), Task.loss

    def elsewhere(self: Task, model: Any, batch: Any, key: Any) -> Any:
        return loss(self, model, batch, jax.random.fold_in(key, jax.device_count()))

    with (
        mock.patch.object(flight, "place", notes.place),
        mock.patch.object(Checkpoints, "save", notes.save),
        mock.patch.object(Task, "loss", elsewhere if depends else loss),
    ):
        train.train(block, epath.Path(out / name))
    lines = [json.loads(x) for x in (out / name / "metrics.jsonl").read_text().splitlines()]
    assert notes.arrays, "the last step was not saved"
    np.savez(out / f"{name}.npz", **notes.arrays, **initial(block))
    told = {
        "devices": jax.device_count(),
        "batches": notes.batches,
        "parts": notes.parts,
        "shardings": notes.shardings,
        "losses": [[x["task"], x["loss"], x["grad_norm"]] for x in lines if x["kind"] == "train"],
    }
    (out / f"{name}.json").write_text(json.dumps(told))


def initial(block: configs.Block) -> dict[str, np.ndarray[Any, Any]]:
    from mmjax.core.parameters import to_canonical

    declaration = make_experiment(block).declaration
    made = jax.jit(lambda: declaration.initialise(block["seed"], np.float64))()
    held = to_canonical(declaration.specs, made)
    return {f"initial/{name}": np.asarray(x) for name, x in held.items()}


def main() -> None:
    config, out, wanted, *overrides = sys.argv[1:]
    use_cache()
    double = ["dtype.parameters=float64", "dtype.compute=float64"]
    block = configs.override(configs.read_file(config), [*double, *overrides])
    for name, how in json.loads(wanted).items():
        run(block, how.get("mesh", {}), how.get("depends", False), Path(out), name)


if __name__ == "__main__":
    main()
