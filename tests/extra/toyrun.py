"""Runs of `tests/configs/toy.py` in this process, and what they read and left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from etils import epath
from jax.sharding import Mesh

from mmjax import show, train
from mmjax.core import config as configs
from mmjax.core.config import Block
from mmjax.core.parameters import digest
from mmjax.core.sharding import batch_sharding, make_mesh
from mmjax.engine import checkpoint
from mmjax.engine.compile import Program, compile_all, use_cache
from mmjax.engine.loader import make_batch, place
from mmjax.engine.state import State, compute_dtype, init_state, shardings
from mmjax.engine.steps import ticks
from mmjax.evaluators.base import Record
from mmjax.experiment import Experiment, make_experiment
from mmjax.training import flight

EXTRA = Path(__file__).resolve().parent
CONFIG = EXTRA.parent / "configs" / "toy.py"
SEED = 0


def block(*overrides: str) -> Block:
    """Return the config as data, with `KEY=VALUE` overrides."""
    if "toy" not in configs.names("objectives"):
        configs.add_folder(str(EXTRA))
    use_cache()
    return configs.override(configs.read_file(str(CONFIG)), overrides)


@dataclass
class Seen:
    """The batches that reached the devices in training, in order: example ids, and the values' shape and sum."""

    ids: list[list[int]] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    sums: list[float] = field(default_factory=list)


@contextmanager
def watched() -> Iterator[Seen]:
    """Note what training places on the devices."""
    seen, place = Seen(), flight.place

    def noted(rows: Any, *arguments: Any) -> Any:
        seen.ids.append([int(i) for i in rows.fields["id"]])
        seen.shapes.append(rows.inputs["toy"]["rows"].shape)
        seen.sums.append(float(rows.inputs["toy"]["rows"].astype(np.float64).sum()))
        return place(rows, *arguments)

    with mock.patch.object(flight, "place", noted):
        yield seen


def run(
    workdir: epath.PathLike,
    *overrides: str,
    allow_change: bool = False,
    devices: int = 1,
    config: Block | None = None,
) -> list[Record] | None:
    """Train in this process."""
    chosen = block(*overrides) if config is None else configs.override(config, overrides)
    folder = epath.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    return train.train(chosen, folder, allow_change, jax.devices()[:devices])


def meta(workdir: epath.PathLike) -> dict[str, Any]:
    """Return the meta data of the newest checkpoint."""
    folder = epath.Path(workdir)
    return meta_of(folder, checkpoint.steps(folder)[0])


def meta_of(workdir: epath.PathLike, step: int) -> dict[str, Any]:
    """Return the meta data of the checkpoint of a step."""
    return checkpoint.read_meta(epath.Path(workdir), step)


def bits(workdir: epath.PathLike) -> str:
    """Return a digest of everything that the newest checkpoint holds: arrays, clock and config."""
    folder = epath.Path(workdir)
    step = checkpoint.steps(folder)[0]
    shapes = checkpoint.read_shapes(folder, step)
    abstract = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), shapes)
    state = checkpoint.read_state(folder, step, abstract)
    pairs, _ = jax.tree_util.tree_flatten_with_path(state)
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in pairs}
    saved = meta(workdir)
    return f"{digest(arrays)} {saved['clock']} {saved['config']}"


def parameters(workdir: epath.PathLike) -> dict[str, np.ndarray[Any, Any]]:
    """Return the parameters of the newest checkpoint by canonical name."""
    return parameters_of(workdir, checkpoint.steps(epath.Path(workdir))[0])


def parameters_of(workdir: epath.PathLike, step: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return the parameters of the checkpoint of a step."""
    folder = epath.Path(workdir)
    return show.read_arrays(folder, step, checkpoint.read_shapes(folder, step)["parameters"])


@dataclass(frozen=True)
class Parts:
    """A toy experiment and what its programs take, on a mesh.

    Attributes:
      state: the initial one.
    """

    experiment: Experiment
    mesh: Mesh
    state: State

    def batch(self, task: str, ids: Sequence[int]) -> Any:
        """Return a batch of these examples, without augmentation; blank rows up to the task's batch."""
        chosen = self.experiment.tasks[task]
        rows, failed = make_batch(
            chosen.rows(), chosen.source.open(), ids, lambda _: None, chosen.batch
        )
        assert not failed
        return place(rows, 0, chosen.batch, batch_sharding(self.mesh, chosen.batch, task))

    def ticks(self, task: str, step: int, visit: int) -> Any:
        """Return what a training program of a task takes beside state and batch."""
        progress = self.experiment.optimizers.progress(task, step, {})
        return ticks(self.mesh, step=step, visit=visit, **progress)


def parts(*overrides: str, devices: int = 1) -> Parts:
    experiment = make_experiment(block(*overrides))
    mesh = make_mesh(experiment.run.mesh, jax.devices()[:devices])
    abstract = experiment.abstract_state(mesh)
    dtype = compute_dtype(experiment.run.dtype.parameters)

    def fresh() -> State:
        return init_state(
            experiment.declaration, experiment.optimizers.whole, experiment.run.seed, dtype
        )

    return Parts(experiment, mesh, jax.jit(fresh, out_shardings=shardings(abstract))())


def host(tree: Any) -> Any:
    """Return a tree of arrays as NumPy arrays of their own, which a later donation does not touch."""
    return jax.tree.map(lambda x: np.array(x, copy=True), tree)


def wrap_calls(monkeypatch: pytest.MonkeyPatch, wrap: Callable[[Any], Any]) -> None:
    """Wrap the call of training programs."""

    def compiled(requests: Mapping[str, Any], *arguments: Any) -> dict[str, Program]:
        programs = compile_all(requests, *arguments)
        return {
            name: replace(p, call=wrap(p.call)) if requests[name].kind == "train" else p
            for name, p in programs.items()
        }

    monkeypatch.setattr(train, "compile_all", compiled)
