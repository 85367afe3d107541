"""One step of every task of some configs, made small, on many meshes of this process's eight devices, in float64.

    python tests/pod/sharded.py OUT.json [--every_case] CONFIG ...

writes, by config, what each case of `CASES` differs in from one device, and how its state lies. Systems that are not in
`EVERY_CASE` are compared on the meshes of `FEW` only, unless all are asked for. Before each
compilation it says on standard error which one comes, so that what XLA says there can be told apart.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Sequence
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
    "data 2 tensor 4": {"data": 2, "tensor": 4},
    "data 2 sequence 4": {"data": 2, "sequence": 4},
    "data 2 fsdp 2 sequence 2": {"data": 2, "fsdp": 2, "sequence": 2},
    "tensor 4 sequence 2": {"data": 1, "tensor": 4, "sequence": 2},
    # Slices that are not the outermost blocks of the mesh, so that devices lie in another order.
    "data 2 fsdp 2 tensor 2": {"data": 2, "fsdp": 2, "tensor": 2, "slices": 2, "dcn_axis": "fsdp"},
}
# Each axis alone, and the meshes on which whole programs are compiled: enough for a system whose mechanisms are those
# of layers and objectives that another one has on every mesh.
FEW = ("data 8", "fsdp 8", "expert 8", "tensor 8", "sequence 8", "data 2 fsdp 2 sequence 2",
       "data 2 fsdp 2 tensor 2")  # fmt: skip
EVERY_CASE = ("moma", "quickstart", "transfusion")
# Here each task's program is compiled as training does it; elsewhere its gradient, and its update, which
# tasks have in common.
WHOLE = ("data 2 fsdp 2 sequence 2", "data 2 fsdp 2 tensor 2")
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
RATES = {"learning_rate": 1e-3, "weight_decay": 0.1, "warmup": 0, "eps": 1e-6}
LEAST = 1e-3  # arrays smaller than this are compared with this
MARK = "compiles: "
CONTROL = "control"


# --- a config made small -----------------------------------------------------------------------


def small(block: configs.Block) -> configs.Block:
    """The same modalities, layers, tasks and optimizer; of each, only sizes that the code reads are smaller."""
    model = {"width": 32, "layers": [_group(g) for g in block["model"]["layers"]]}
    modalities = {
        name: _capped(_without_file(m), vocabulary=512, **MODALITIES.get(m["name"], {}))
        for name, m in block["modalities"].items()
    }
    tasks = {name: _task(task, modalities) for name, task in block["tasks"].items()}
    return {
        "modalities": modalities,
        "steps": 10,
        "model": {**block["model"], **model, "remat": "none"},
        "tasks": tasks,
        # From the first step at the full rate, so that an update moves something.
        "optimizer": {**block.get("optimizer", {}), **RATES, "accumulate": 1},
        "dtype": {"parameters": "float64", "compute": "float64"},
    }


def _without_file(modality: configs.Block) -> configs.Block:
    """Texts are numbers here, and need no tokenizer."""
    return {**modality, "tokenizer": ""} if "tokenizer" in modality else modality


def _group(group: configs.Block) -> configs.Block:
    """Two repeats, under one scan; every size divides over eight devices."""
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
    """Groups of tokens that compete do not reach over devices, as in a batch of the full size."""
    if not layer.get("experts"):
        return layer
    return {**layer, "experts": _capped(layer["experts"], count=16, group_size=8, min_groups=8)}


def _task(task: configs.Block, modalities: configs.Block) -> configs.Block:
    """Pictures of at most eight patches a side, and not much longer."""
    inputs = {name: _view(view, modalities[name]) for name, view in task["inputs"].items()}
    objective = _capped(task["objective"], queries=8, pooler_heads=8, embed_dim=32, chunk=4)
    if objective["name"] in ("classification", "fusion"):
        objective["init"] = "lecun"  # at zero, as they begin, no gradient would come to the trunk
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
    """A batch of numbers that any task can take: integers from 0 to 3, the last row invalid."""
    rng = np.random.default_rng(3)

    def draw(spec: Any) -> np.ndarray[Any, Any]:
        shape = (rows, *spec.shape)
        if spec.dtype == np.bool_:
            return rng.random(shape) < 0.8
        if spec.dtype.kind == "f":
            return rng.normal(size=shape).astype(spec.dtype)
        return rng.integers(0, 256 if spec.dtype == np.uint8 else 4, shape).astype(spec.dtype)

    return {**jax.tree.map(draw, shapes), "valid": np.arange(rows) < rows - 1}


# --- one step ----------------------------------------------------------------------------------


def flat(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(k): x for k, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def begun(experiment: Experiment) -> State:
    """The state at step 0, on the host."""

    def fresh() -> State:
        return init_state(experiment.declaration, experiment.optimizers.whole, 0, np.float64)

    made: State = jax.device_get(jax.jit(fresh)())
    return made


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

    def whole(self, name: str) -> dict[str, Any]:
        """By the program of training itself, which tells its gradient too."""
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

    def parted(self, name: str) -> dict[str, Any]:
        """By two programs, of the gradient and of the update; tasks that move alike share the second, which
        takes most of the time that a step takes to compile."""
        task, view = self.experiment.tasks[name], self.experiment.optimizers.whole.views[name]
        declaration, compute = self.experiment.declaration, compute_dtype("float64")

        def gradient(parameters: Any, batch: Any) -> Any:
            moved, others = program._parted(parameters, view)
            key = jax.random.fold_in(task.fold(0), 0)
            loss, grads = loss_and_gradient(
                task, lambda m: declaration.merge({**others, **m}, compute), moved, batch, key
            )
            return loss.value, grads, loss.buffers

        parameters, batch = self.abstract.parameters, self.requests[name].arguments[1]
        moves = {n: p for n, p in parameters.items() if n in view.moves}
        out = (replicated(self.mesh), shardings(moves), None)
        what = f"{self.case} / {name}"
        made = compiled(gradient, (parameters, batch), out, self.mesh, what)
        loss, grads, buffers = made(self.state.parameters, self._batch(name))
        after = self._update(name, moves)(self.state, grads, self._ticks(name))
        after = replace(after, buffers={**after.buffers, **buffers})
        return flat(jax.device_get({"loss": loss, "gradient": grads, "state": after}))

    def _update(self, name: str, grads: Any) -> Any:
        """The program of a task's update, from its abstract gradient."""
        optimizer = self.experiment.optimizers.whole
        alike = optimizer.views[name].kind == SHARED and optimizer.config.unit == "steps"
        key = "" if alike else name

        def update(state: State, grads: Any, ticks: Any) -> State:
            after: State = program._updated(state, grads, optimizer, name, ticks)[0]
            return after

        if key not in self._updates:
            arguments = (self.abstract, grads, self.requests[name].arguments[2])
            out, what = shardings(self.abstract), f"{self.case} / update"
            self._updates[key] = compiled(update, arguments, out, self.mesh, what)
        return self._updates[key]

    def _batch(self, name: str) -> Any:
        task = self.experiment.tasks[name]
        batch = numbers(task.rows().shapes(), task.batch)
        return place(batch, 0, task.batch, batch_sharding(self.mesh, task.batch, name))

    def _ticks(self, name: str) -> Any:
        return ticks(self.mesh, step=0, visit=0, **self.experiment.optimizers.progress(name, 0, {}))


def lies(state: State) -> dict[str, list[Any]]:
    """Of each leaf: its shape, and its shape and bytes on one device."""
    return {
        name: [list(x.shape), list(x.addressable_shards[0].data.shape), x.addressable_shards[0].data.nbytes]
        for name, x in flat(state).items()
    }  # fmt: skip


def difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, list[Any]]:
    """The largest difference in the loss, the gradient and the state, and where: relative to the array's size."""
    assert one.keys() == other.keys()
    worst: dict[str, list[Any]] = {"loss": [0.0, ""], "gradient": [0.0, ""], "state": [0.0, ""]}
    for name, a in one.items():
        size = max(LEAST, float(np.max(np.abs(a), initial=0.0)))
        by = float(np.max(np.abs(np.asarray(other[name], np.float64) - a), initial=0.0)) / size
        kind = name.split("'")[1]
        worst[kind] = max(worst[kind], [by if math.isfinite(by) else math.inf, name])
    return worst


def compare(block: configs.Block, cases: Sequence[str]) -> dict[str, Any]:
    """One device against some cases."""
    experiment = make_experiment(block)
    before = begun(experiment)
    alone = Steps(experiment, before, make_mesh(MeshConfig(data=1), jax.devices()[:1]), "one")
    one = {name: alone.whole(name) for name in experiment.tasks}
    found: dict[str, Any] = {"moved": moved(flat({"state": before}), one), "cases": {}, "lies": {}}
    found["specs"] = {n: [s.shape, s.axes] for n, s in experiment.declaration.specs.items()}
    for case in cases:
        sizes = CASES[case]
        steps = Steps(experiment, before, make_mesh(MeshConfig(**sizes)), case)
        step = steps.whole if case in WHOLE else steps.parted
        found["cases"][case] = {name: difference(one[name], step(name)) for name in one}
        found["lies"][case] = lies(steps.state)
    return found


def moved(before: dict[str, Any], after: dict[str, dict[str, Any]]) -> dict[str, float]:
    """By how much each task's step moved the parameters, at most."""
    names = [n for n in before if n.startswith("['state'].parameters")]
    return {
        task: max(float(np.max(np.abs(found[n] - before[n]))) for n in names)
        for task, found in after.items()
    }


def control() -> None:
    """A lookup in a table cut along its vectors, asked for cut along its rows: XLA makes it whole first."""
    print(f"{MARK}{CONTROL}", file=sys.stderr, flush=True)
    mesh = make_mesh(MeshConfig(data=2, tensor=4))

    def placed(*entries: Any) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*entries))

    table = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=placed(None, ("data", "tensor")))
    index = jax.ShapeDtypeStruct((16, 16), jnp.int32, sharding=placed("data", "tensor"))
    wanted = placed("data", "tensor", None)
    jax.jit(lambda t, i: jnp.take(t, i, axis=0), out_shardings=wanted).lower(table, index).compile()


def system_of(file: str) -> str:
    """Return the system of `configs/SYSTEM.py:SETTING`."""
    return Path(file.partition(":")[0]).stem


def main() -> None:
    out, *files = (word for word in sys.argv[1:] if word != "--every_case")
    # A program that is kept on disk is not compiled, and nothing is said of it.
    jax.config.update("jax_enable_compilation_cache", False)
    found: dict[str, Any] = {"configs": {}, "found": {}}
    for file in files:
        block = small(configs.read_file(file))
        key = hashlib.sha256(json.dumps(block, sort_keys=True).encode()).hexdigest()[:16]
        found["configs"][file] = key
        if key not in found["found"]:  # another config may be the same when it is small
            is_every = system_of(file) in EVERY_CASE or "--every_case" in sys.argv
            found["found"][key] = compare(block, tuple(CASES) if is_every else FEW)
    control()
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
