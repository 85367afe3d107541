"""One step of tasks on meshes of this process's eight devices, in float64, compared with the same step on one device.

    python tests/pod/sharded.py OUT.json [--extra=FOLDER] [--meshes="data 8,fsdp 8"] CONFIG ...

compares every task of each config, made small, on these meshes (by default all of `CASES`). `mechanisms.py` compares
chosen tasks on chosen meshes, and `matrix.py` makes a table of all systems. Before each compilation the process names
it on standard error, so that XLA's messages there can be attributed.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmjax.core import config as configs
from mmjax.core.sharding import MeshConfig, batch_sharding, make_mesh, replicated
from mmjax.engine import steps as program
from mmjax.engine.gradient import loss_and_gradient
from mmjax.engine.loader import place
from mmjax.engine.requests import train_requests
from mmjax.engine.state import State, compute_dtype, init_state, shardings
from mmjax.engine.steps import ticks
from mmjax.experiment import Experiment, make_experiment
from mmjax.optim.views import SHARED

DEVICES = 8
CASES: dict[str, dict[str, Any]] = {
    "data 8": {"data": 8},
    "fsdp 8": {"data": 1, "fsdp": 8},
    "expert 8": {"data": 1, "expert": 8},
    "tensor 8": {"data": 1, "tensor": 8},
    "sequence 8": {"data": 1, "sequence": 8},
    "slices 2 fsdp 4": {"data": 2, "fsdp": 4, "slices": 2},
    "data 2 expert 4": {"data": 2, "expert": 4},
    "data 2 expert 2 tensor 2": {"data": 2, "expert": 2, "tensor": 2},
    "data 2 tensor 4": {"data": 2, "tensor": 4},
    "data 2 sequence 4": {"data": 2, "sequence": 4},
    "data 2 fsdp 2 sequence 2": {"data": 2, "fsdp": 2, "sequence": 2},
    "tensor 4 sequence 2": {"data": 1, "tensor": 4, "sequence": 2},
    # Slices that are not the outermost blocks of the mesh, so that devices lie in another order.
    "data 2 fsdp 2 tensor 2": {"data": 2, "fsdp": 2, "tensor": 2, "slices": 2, "dcn_axis": "fsdp"},
}
# What of a step is compiled on a mesh: the gradient; the gradient and, in a program that tasks have in common, the
# update; or both in one program, as training does it.
GRADIENT, PARTED, WHOLE = "gradient", "parted", "whole"
# In the matrix, on the meshes of whole programs; parted on all others.
DEPTHS = {"data 2 fsdp 2 sequence 2": WHOLE, "data 2 fsdp 2 tensor 2": WHOLE}
# So that a system's small recipe and its large one are the same here, and run once.
MODALITIES = {
    "text": {"max_positions": 32},
    "image": {"patch": 4, "max_positions": 8},
    "colours": {"levels": 8, "max_positions": 8},
    "video": {"max_time_positions": 2, "max_positions": 8},
    "spectrogram": {"max_positions": 8},
}
# A bias of keys has no gradient but rounding, as it adds the same to all logits of a query; with an eps as small as
# Adam's own, its update would be as large as the others'.
RATES = {"learning_rate": 1e-3, "weight_decay": 0.1, "warmup": 0}
EPS = 1e-6
LEAST = 1e-3  # arrays smaller than this are compared with this
CLOSE = 1e-10  # the largest difference that rounding explains
MARK = "compiles: "
CONTROL = "control"
WARNING = "Involuntary full rematerialization"
ROOT = Path(__file__).resolve().parents[2]
# Quick to compile rather than to run. More threads than collectives can block at once: with as few as there
# are devices, one that waits in each of two independent loops leaves none for the others.
FLAGS = (
    f"--xla_force_host_platform_device_count={DEVICES} --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
)


# --- a config made small -----------------------------------------------------------------------


def small(block: configs.Block) -> configs.Block:
    """Return the same modalities, layers, tasks and optimizer; of each, only sizes that the code reads are smaller."""
    modalities = {
        name: _capped(_without_file(m), vocabulary=512, **MODALITIES.get(m["name"], {}))
        for name, m in block["modalities"].items()
    }
    tasks = {name: _task(task, modalities) for name, task in block["tasks"].items()}
    return {
        "modalities": modalities,
        "steps": 10,
        "model": _model(block["model"]),
        "tasks": tasks,
        "schedule": {"rule": block.get("schedule", {}).get("rule", "shares")},
        # From the first step at the full rate, so that an update moves something.
        "optimizer": _optimizer(block.get("optimizer", {})),
        "dtype": {"parameters": "float64", "compute": "float64"},
    }


def _optimizer(block: configs.Block) -> configs.Block:
    algorithm = {**block.get("algorithm", {}), "eps": EPS}
    return {**block, **RATES, "accumulate": 1, "algorithm": algorithm}


def _without_file(modality: configs.Block) -> configs.Block:
    """Return the modality without a tokenizer: texts are numbers here."""
    return {**modality, "tokenizer": ""} if "tokenizer" in modality else modality


def _model(model: configs.Block) -> configs.Block:
    """Return the model, or each of its towers, of width 32."""
    if "towers" in model:
        return {"towers": {name: _model(tower) for name, tower in model["towers"].items()}}
    return {**model, "width": 32, "layers": [_group(g) for g in model["layers"]], "remat": "none"}


def _group(group: configs.Block) -> configs.Block:
    """Return two repeats, under one scan; every size divides over eight devices."""
    sizes = {"num_heads": 8, "mlp_dim": 64, "state": 8}
    pattern = [
        {
            **_routed(b),
            **{k: n for k, n in sizes.items() if k in b or b["name"] == "mamba" and k == "state"},
        }
        for b in group["blocks"]
    ]
    return {**group, "repeat": min(group["repeat"], 2), "blocks": pattern}


def _routed(layer: configs.Block) -> configs.Block:
    """Keep groups of tokens that compete within devices, as in a batch of the full size."""
    if not layer.get("experts"):
        return layer
    return {**layer, "experts": _capped(layer["experts"], count=16, group_size=8, min_groups=8)}


def _task(task: configs.Block, modalities: configs.Block) -> configs.Block:
    """Return pictures of at most eight patches a side, and not much longer."""
    inputs = {name: _view(view, modalities[name]) for name, view in task["inputs"].items()}
    objective = _capped(task["objective"], queries=8, pooler_heads=8, embed_dim=32, chunk=4)
    if objective["name"] in ("classification", "fusion"):
        objective["init"] = "lecun"  # at zero, as they begin, no gradient would come to the trunk
    objective |= _capped(objective, map_heads=8, map_mlp=64)
    objective |= _capped(
        objective, pack=2, window=2, unet_channels=4, sampling_steps=2, guidance=1.0
    )
    is_groups = {
        k for k, v in objective.items() if isinstance(v, list) and v and isinstance(v[0], dict)
    }
    objective |= {key: [_group(g) for g in objective[key]] for key in is_groups}
    # A device has a sequence at least.
    rows = DEVICES * task.get("microbatches", 1) * objective.get("pack", 1)
    return {**task, "inputs": inputs, "objective": objective, "batch": rows, "evaluators": {}}


def _view(view: configs.Block, modality: configs.Block) -> configs.Block:
    frames = 2 * modality["tube"] if "tube" in modality else 8 * modality.get("patch_frames", 16)
    side = 1 if modality["name"] == "colours" else modality.get("patch", 8)
    return _capped(view, size=8 * side, frames=frames, length=12)


def _capped(block: configs.Block, **most: int) -> configs.Block:
    return {**block, **{key: min(block[key], n) for key, n in most.items() if key in block}}


def numbers(shapes: Any, rows: int) -> Any:
    """Return a batch of numbers that any task can take: integers from 0 to 3, the last row invalid."""
    rng = np.random.default_rng(3)

    def draw(spec: Any) -> np.ndarray[Any, Any]:
        shape = (rows, *spec.shape)
        if spec.dtype == np.bool_:
            return rng.random(shape) < 0.8
        if spec.dtype.kind == "f":
            return rng.normal(size=shape).astype(spec.dtype)
        return rng.integers(0, 256 if spec.dtype == np.uint8 else 4, shape).astype(spec.dtype)

    return replace(jax.tree.map(draw, shapes), valid=np.arange(rows) < rows - 1)


# --- one step ----------------------------------------------------------------------------------


def flat(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(k): x for k, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def begun(experiment: Experiment) -> State:
    """Return the state at step 0, on the host."""

    def fresh() -> State:
        return init_state(experiment.declaration, experiment.optimizers.whole, 0, np.float64)

    result: State = jax.device_get(jax.jit(fresh)())
    return result


def compiled(function: Any, arguments: Any, out_shardings: Any, mesh: Mesh, what: str) -> Any:
    print(f"{MARK}{what}", file=sys.stderr, flush=True)
    with jax.set_mesh(mesh):
        return jax.jit(function, out_shardings=out_shardings).lower(*arguments).compile()


class Steps:
    """One step of each task from the state `before`, on a mesh; its results on the host."""

    def __init__(self, experiment: Experiment, before: State, mesh: Mesh, case: str):
        self.experiment, self.mesh, self.case = experiment, mesh, case
        self.abstract = experiment.abstract_state(mesh)
        self.state = jax.device_put(before, shardings(self.abstract))
        self.requests = train_requests(experiment, mesh)
        self._updates: dict[Any, Any] = {}

    def step(self, name: str, depth: str) -> dict[str, Any]:
        """Return loss, gradient and, but for `GRADIENT`, the state after the step, by name of the array."""
        return self.whole(name) if depth == WHOLE else self.parted(name, depth == PARTED)

    def whole(self, name: str) -> dict[str, Any]:
        """Return the gradient by the program of training itself, which reports its gradient too."""
        updated = program._updated

        def telling(state: State, grads: Any, *rest: Any) -> Any:
            after, metrics = updated(state, grads, *rest)
            return after, {**metrics, **{f"gradient {n}": g for n, g in grads.items()}}

        r = self.requests[name]
        with mock.patch.object(program, "_updated", telling):
            step = compiled(
                r.function, r.arguments, r.out_shardings, self.mesh, f"{self.case} / {name}"
            )
        after, told = step(self.state, self._batch(name), self._ticks(name))
        grads = {
            n.removeprefix("gradient "): g for n, g in told.items() if n.startswith("gradient ")
        }
        return flat(jax.device_get({"loss": told["loss"], "gradient": grads, "state": after}))

    def parted(self, name: str, is_updated: bool = True) -> dict[str, Any]:
        """Return the results of two programs, of gradient and update; tasks that move alike share the second, which
        takes most of the time that a step takes to compile. Without it there is no state in the results."""
        task, view = self.experiment.tasks[name], self.experiment.optimizers.views[name]
        declaration, compute = self.experiment.declaration, compute_dtype("float64")

        def gradient(state: State, batch: Any) -> Any:
            moved, others = program._parted(state, view)
            key = jax.random.fold_in(task.fold(0), 0)
            loss, grads = loss_and_gradient(
                task, lambda m: declaration.merge({**others, **m}, compute), moved, batch, key
            )
            return loss.value, grads

        batch = self.requests[name].arguments[1]
        moves = {n: p for n, p in self.abstract.parameters.items() if n in view.trains}
        out = (replicated(self.mesh), shardings(moves))
        what = f"{self.case} / {name}"
        made = compiled(gradient, (self.abstract, batch), out, self.mesh, what)
        loss, grads = made(self.state, self._batch(name))
        if not is_updated:
            return flat(jax.device_get({"loss": loss, "gradient": grads}))
        after = self._update(name, moves)(self.state, grads, self._ticks(name))
        return flat(jax.device_get({"loss": loss, "gradient": grads, "state": after}))

    def _update(self, name: str, grads: Any) -> Any:
        """Return the program of a task's update, from its abstract gradient."""
        optimizer = self.experiment.optimizers.whole
        averages = program.moving(self.experiment.optimizers.spec.teachers, name)
        alike = optimizer.views[name].kind == SHARED and optimizer.config.unit == "steps"
        key = "" if alike and not averages else name

        def update(state: State, grads: Any, ticks: Any) -> State:
            after: State = program._updated(state, grads, optimizer, name, ticks)[0]
            teachers = program.followed(after.buffers, after.parameters, averages, ticks)
            return replace(after, buffers={**after.buffers, **teachers})

        if key not in self._updates:
            arguments = (self.abstract, grads, self.requests[name].arguments[2])
            out, what = shardings(self.abstract), f"{self.case} / update {key}".strip()
            self._updates[key] = compiled(update, arguments, out, self.mesh, what)
        return self._updates[key]

    def _batch(self, name: str) -> Any:
        task = self.experiment.tasks[name]
        batch = numbers(task.rows().shapes(), task.batch)
        return place(batch, 0, task.batch, batch_sharding(self.mesh, task.batch, name))

    def _ticks(self, name: str) -> Any:
        return ticks(self.mesh, step=0, visit=0, **self.experiment.optimizers.progress(name, 0, {}))


def lies(state: State) -> dict[str, list[Any]]:
    """Return of each leaf its shape, and its shape and bytes on one device."""
    return {
        name: [list(x.shape), list(x.addressable_shards[0].data.shape), x.addressable_shards[0].data.nbytes]
        for name, x in flat(state).items()
    }  # fmt: skip


def difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the largest difference in the loss, the gradient and the state, and where.

    It is relative to the array's size. The state is compared where `other` has one.
    """
    if not any(name.startswith("['state']") for name in other):
        one = {name: a for name, a in one.items() if not name.startswith("['state']")}
    assert one.keys() == other.keys()
    worst: dict[str, list[Any]] = {}
    for name, a in one.items():
        size = max(LEAST, float(np.max(np.abs(a), initial=0.0)))
        by = float(np.max(np.abs(np.asarray(other[name], np.float64) - a), initial=0.0)) / size
        kind = name.split("'")[1]
        largest = worst.get(kind, [0.0, ""])
        worst[kind] = max(largest, [by if math.isfinite(by) else math.inf, name])
    return worst


def compare(
    name: str,
    block: configs.Block,
    tasks_of: Mapping[str, Sequence[str]],
    depths: Mapping[str, str] = DEPTHS,
) -> dict[str, Any]:
    """Return what differs from one device, by mesh and task, and how the state lies on each mesh.

    Args:
      name: of the config, in the lines on standard error.
      tasks_of: names of tasks by name of a mesh of `CASES`.
      depths: by name of a mesh, `GRADIENT` or `WHOLE`; `PARTED` on all others.
    """
    experiment = make_experiment(block)
    before = begun(experiment)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    alone = Steps(experiment, before, mesh, f"{name} / one")
    one = {task: alone.parted(task) for task in experiment.tasks}
    results: dict[str, Any] = {
        "moved": moved(flat({"state": before}), one),
        "cases": {},
        "lies": {},
    }
    results["specs"] = {n: [s.shape, s.axes] for n, s in experiment.declaration.specs.items()}
    for case, tasks in tasks_of.items():
        mesh, depth = make_mesh(MeshConfig(**CASES[case])), depths.get(case, PARTED)
        steps = Steps(experiment, before, mesh, f"{name} / {case}")
        results["cases"][case] = {
            task: difference(one[task], steps.step(task, depth)) for task in tasks
        }
        results["lies"][case] = lies(steps.state)
    return results


def moved(before: dict[str, Any], after: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return by how much each task's step moved the parameters, at most."""
    names = [n for n in before if n.startswith("['state'].parameters")]
    return {
        task: max(float(np.max(np.abs(found[n] - before[n]))) for n in names)
        for task, found in after.items()
    }


def control() -> None:
    """Check a lookup in a table cut along its vectors, asked for cut along its rows: XLA makes it whole first."""
    print(f"{MARK}{CONTROL}", file=sys.stderr, flush=True)
    mesh = make_mesh(MeshConfig(data=2, tensor=4))

    def placed(*entries: Any) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*entries))

    table = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=placed(None, ("data", "tensor")))
    index = jax.ShapeDtypeStruct((16, 16), jnp.int32, sharding=placed("data", "tensor"))
    wanted = placed("data", "tensor", None)
    jax.jit(lambda t, i: jnp.take(t, i, axis=0), out_shardings=wanted).lower(table, index).compile()


# --- a process of its own ----------------------------------------------------------------------


def write(out: str, results: Mapping[str, Any]) -> None:
    """Write results as JSON, after the control."""
    control()
    Path(out).write_text(json.dumps(results))


def run_apart(*words: str, timeout: float) -> tuple[dict[str, Any], dict[str, str]]:
    """Run `python SCRIPT OUT.json WORD ...` on eight devices in 64 bits.

    Returns:
      The results, and what XLA printed to standard error during each compilation.

    Raises:
      RuntimeError: the process failed.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    # A program that is kept on disk is not compiled, and nothing is printed of it.
    env = {
        **os.environ, "JAX_ENABLE_COMPILATION_CACHE": "0", "JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu",
        "NPROC": "64", "PYTHONPATH": path, "XLA_FLAGS": FLAGS,
    }  # fmt: skip
    script, *others = words
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        command = [sys.executable, str(ROOT / "tests/pod" / script), str(out), *others]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=env, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        parts = re.split(rf"^{MARK}(.*)\n", done.stderr, flags=re.MULTILINE)[1:]
        said = dict(zip(parts[::2], parts[1::2], strict=True))
        assert 2 * len(said) == len(parts), "each compilation has a name of its own"
        return json.loads(out.read_text()), said


def main() -> None:
    """Compare the configs that the command line names."""
    out, *words = sys.argv[1:]
    options = dict(word[2:].split("=", 1) for word in words if word.startswith("--"))
    if "extra" in options:
        configs.add_folder(options["extra"])
    cases = options["meshes"].split(",") if "meshes" in options else list(CASES)
    results = {}
    for file in (word for word in words if not word.startswith("--")):
        block = small(configs.read_file(file))
        results[file] = compare(file, block, dict.fromkeys(cases, list(block["tasks"])))
    write(out, results)


if __name__ == "__main__":
    main()
