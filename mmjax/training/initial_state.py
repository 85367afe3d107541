"""The state with which a run begins or continues: initialised, with what a checkpoint or another run holds in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mmjax.core.parameters import STAT
from mmjax.core.teachers import TEACHER
from mmjax.engine.checkpoint import Restored
from mmjax.engine.state import (
    EMA,
    SUMMED,
    State,
    compute_dtype,
    init_state,
    shardings,
    state_from_canonical,
    state_to_canonical,
)
from mmjax.engine.warm_start import Values, WarmStartConfig, sources_of, warm_start, warm_starts
from mmjax.experiment import Experiment


@dataclass
class Fresh:
    """The beginning of a run at step 0.

    Attributes:
      parameters: those taken from elsewhere, by canonical name; the others are initialised randomly. None once they
        are taken.
    """

    parameters: Values | None = field(default_factory=dict)

    def take(self) -> Values:
        """Return the parameters, and keep no reference to them, which would double the memory of the state.

        Raises:
          RuntimeError: they were taken before.
        """
        if self.parameters is None:
            raise RuntimeError("the parameters of this beginning were taken before")
        parameters, self.parameters = self.parameters, None
        return parameters


def pin_of(teacher: str) -> str:
    """Return the file of a workdir that records where a frozen teacher came from."""
    return f"teacher.{teacher}.json"


def teacher_sources(experiment: Experiment) -> dict[str, WarmStartConfig]:
    """Return the sources of frozen teachers that have one."""
    paths = {name: teacher.config.path for name, teacher in experiment.teachers.items()}
    every = (".*",)  # a teacher copies a part
    return {name: WarmStartConfig(path, ignore=every) for name, path in paths.items() if path}


def taken(
    experiment: Experiment,
    log: Callable[[str], None],
    steps: Sequence[int | None],
    teacher_steps: Mapping[str, int | None],
) -> tuple[list[Values], Values]:
    """Return what a run begins with, by canonical name: from each source of `init_from`, and frozen teachers."""
    declaration, run = experiment.declaration, experiment.run
    copies = {n: s for n, s in declaration.read.items() if n.startswith(TEACHER)}
    specs = {n: s for n, s in declaration.read.items() if n not in copies}
    parts = warm_starts(sources_of(run.init_from), specs, log, steps, run.seed, copies)
    teachers: Values = {}
    for name, source in teacher_sources(experiment).items():
        part = {n: declaration.specs[n] for n in declaration.teachers[name]}
        weights = warm_start(source, part, log, teacher_steps[name])
        teachers |= {f"{TEACHER}{name}/{n}": value for n, value in weights.items()}
    return parts, teachers


def joined(parts: Iterable[Values], teachers: Values) -> Fresh:
    """Return the beginning with all of these."""
    return Fresh({n: value for values in (*parts, teachers) for n, value in values.items()})


def initial_state(experiment: Experiment, mesh: Mesh, start: Restored | Fresh) -> State:
    """Return the state on the mesh, initialised, with everything that `start` holds in its place.

    It takes the arrays of `start`, from which therefore one state can be made.
    """
    arrays = start.take()
    if isinstance(start, Fresh):
        function = partial(_initialised, experiment)
    elif _is_whole(experiment, mesh, arrays):
        function = partial(state_from_canonical, experiment.declaration.stored)
    else:
        function = partial(_completed, experiment, start.step)
    return jax.jit(function, out_shardings=shardings(experiment.abstract_state(mesh)))(arrays)


def _is_whole(experiment: Experiment, mesh: Mesh, stored: Mapping[str, Any]) -> bool:
    """Return whether what is stored lacks no array of the state."""
    expected = _placed(experiment, mesh)
    return not any(expected[part].keys() - stored[part].keys() for part in expected)


def _initialised(experiment: Experiment, parameters: Any = None) -> State:
    dtype = compute_dtype(experiment.run.dtype.parameters)
    seed = experiment.run.seed
    return init_state(experiment.declaration, experiment.optimizers.whole, seed, dtype, parameters)


def _completed(experiment: Experiment, step: int, stored: Any) -> State:
    """Return the stored state of `step`, and what it lacks as it is at the beginning of a run."""
    specs = experiment.declaration.stored
    tree = state_to_canonical(specs, _initialised(experiment))
    whole = {part: {**tree[part], **stored.get(part, {})} for part in tree}
    # An average that is new begins at what it averages.
    for name in whole["buffers"].keys() - stored.get("buffers", {}).keys():
        if name.startswith(EMA):
            part = "buffers" if name.startswith(EMA + STAT) else "parameters"
            average = whole[part][name.removeprefix(EMA)]
            whole["buffers"][name] = average.astype(whole["buffers"][name].dtype)
        if name.startswith(TEACHER):  # a new teacher begins at what it copies
            copied = whole["parameters"][name.split("/", 2)[2]]
            whole["buffers"][name] = copied.astype(whole["buffers"][name].dtype)
    # Earlier versions did not count the steps of a round; what was skipped counted as one.
    if SUMMED in whole["buffers"] and SUMMED not in stored.get("buffers", {}):
        whole["buffers"][SUMMED] = jnp.int32(step % experiment.run.optimizer.accumulate)
    return state_from_canonical(specs, whole)


def canonical_shapes(experiment: Experiment, mesh: Mesh) -> Any:
    """Return the shapes of the canonical state, each with the sharding of its (stacked) parameter."""
    abstract = experiment.abstract_state(mesh)
    specs = experiment.declaration.stored
    shapes = jax.eval_shape(lambda s: state_to_canonical(specs, s), abstract)
    return jax.tree.map(
        lambda shape, p: jax.ShapeDtypeStruct(
            shape.shape, shape.dtype, sharding=p.of(len(shape.shape))
        ),
        shapes,
        _placed(experiment, mesh),
    )


def _placed(experiment: Experiment, mesh: Mesh) -> Any:
    """Return a `_Placed` for each array of the canonical state; nothing is traced."""
    abstract = experiment.abstract_state(mesh)
    return state_to_canonical(experiment.declaration.stored, jax.tree.map(_Placed, abstract))


@dataclass(frozen=True)
class _Placed:
    """Stands in for an array when a stacked one is taken apart: its first dimension falls away."""

    leaf: Any
    taken: bool = False

    def __getitem__(self, _: int) -> _Placed:
        return _Placed(self.leaf, True)

    def of(self, rank: int) -> Any:
        sharding = self.leaf.sharding
        if not self.taken or not len(sharding.spec):
            return sharding
        return jax.sharding.NamedSharding(
            sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1 : rank + 1])
        )
