"""The state of a run: parameters, optimizer state and buffers on the devices; the clock in integers."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from mmjax.core.errors import UserError
from mmjax.core.parameters import (
    STAT,
    Arrays,
    Declaration,
    Spec,
    from_canonical,
    to_canonical,
)
from mmjax.core.sharding import named
from mmjax.core.teachers import TEACHER
from mmjax.engine.health import Health, HealthLimits
from mmjax.optim.optimizer import Optimizer
from mmjax.optim.transforms import Axes, LeafState, wide
from mmjax.optim.views import split_name, task_state_name
from mmjax.schedule.schedule import Schedule

EMA = "ema/"
SUM = "sum/"
BESIDE = (STAT, TEACHER)  # what passes read beside parameters
SUMMED = "summed_steps"  # how many steps the sums hold; it belongs to no parameter


@struct.dataclass
class State:
    """The state on the devices.

    Attributes:
      parameters: by name.
      optimizer: parameter name -> its leaf state by field, of what tasks have in common.
      buffers: what changes without an update, by name: `ema/NAME` averages parameter NAME, `sum/NAME`
        adds up its gradients where several steps make one update, and `summed_steps` counts these. `stat/NAME` is
        the buffer NAME of a module, `ema/stat/NAME` its average, and `sum/stat/NAME/STATISTIC` adds up what steps
        propose to it; `teacher/TEACHER/NAME` is a teacher's parameter NAME. All are
        float32 or wider: a bfloat16 average whose weight is 0.999 never changes.
      moments: as `optimizer`, of tasks that have their own: `TASK:NAME` -> leaf state.
    """

    parameters: Arrays
    optimizer: dict[str, LeafState]
    buffers: Arrays
    moments: dict[str, LeafState] = field(default_factory=dict)


@dataclass(frozen=True)
class Clock:
    """The position of a run, in integers.

    Attributes:
      step: completed steps.
      schedule: which task runs at which step.
      positions: examples consumed by each task.
      skipped: steps of each task whose update was skipped for a non-finite loss or gradient.
      invalid: number of examples of each task that could not be read.
      health: what is remembered of each task's losses.
      quarantined: tasks that the run has excluded, and the step from which on.
      invalid_ids: ids of the examples in `invalid`, ascending; checkpoints of version 1 lack those they counted.
    """

    step: int
    schedule: Schedule
    positions: Mapping[str, int]
    skipped: Mapping[str, int]
    invalid: Mapping[str, int]
    health: Mapping[str, Health] = field(default_factory=dict)
    quarantined: Mapping[str, int] = field(default_factory=dict)
    invalid_ids: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def is_healthy(self, bounds: HealthLimits) -> bool:
        """Return whether no active task shows signs of divergence, and the last step was finite."""
        last = self.schedule.task(self.step - 1) if self.step else ""
        if last not in self.quarantined and self.health.get(last, Health()).consecutive_non_finite:
            return False
        return not any(
            h.may_diverge(bounds) for t, h in self.health.items() if t not in self.quarantined
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "segments": self.schedule.to_json(),
            "positions": dict(self.positions),
            "skipped": dict(self.skipped),
            "invalid": dict(self.invalid),
            "invalid_ids": {task: list(ids) for task, ids in self.invalid_ids.items()},
            "health": {task: health.to_json() for task, health in self.health.items()},
            "quarantined": dict(self.quarantined),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Clock:
        schedule = Schedule.from_json(data["segments"])
        # The first checkpoints of format 1 have no health.
        health = {t: Health.from_json(h) for t, h in data.get("health", {}).items()}
        return cls(
            data["step"],
            schedule,
            data["positions"],
            data["skipped"],
            data["invalid"],
            health,
            data.get("quarantined", {}),
            {task: tuple(ids) for task, ids in data.get("invalid_ids", {}).items()},
        )

    def with_invalid(self, task: str, example: int) -> Clock:
        """Return the clock with one more example that could not be read; itself where the example is known."""
        known = self.invalid_ids.get(task, ())
        place = bisect_left(known, example)
        if known[place : place + 1] == (example,):
            return self
        invalid = {**self.invalid, task: self.invalid.get(task, 0) + 1}
        ids = {**self.invalid_ids, task: (*known[:place], example, *known[place:])}
        return replace(self, invalid=invalid, invalid_ids=ids)


def init_state(
    declaration: Declaration,
    optimizer: Optimizer,
    seed: int,
    dtype: Any,
    initial: Mapping[str, Any] | None = None,
) -> State:
    """Return the state at step 0. Meant to be jitted, with the `shardings` of `abstract_state` as its output's.

    `initial` are parameters and buffers to begin with, by canonical name; the others are as their module
    declares them.
    """
    parameters, stats = (
        declaration.initialise(seed, dtype),
        declaration.initial_buffers(seed, dtype),
    )
    initial = initial or {}
    if initial:
        arrays = _begun(declaration.read, {**parameters, **stats}, initial)
        parameters, stats = ({n: arrays[n] for n in part} for part in (parameters, stats))
    buffers: Arrays = {
        **stats,
        **_begun(declaration.read, _copies(declaration, parameters), initial),
    }
    if optimizer.config.ema:
        averaged = {**parameters, **stats}
        buffers |= {EMA + n: p.astype(wide(p.dtype)) for n, p in averaged.items()}
    if optimizer.accumulates:
        summed = {n: parameters[n] for n in sorted(optimizer.accumulates)}
        buffers |= {SUM + n: jnp.zeros(p.shape, wide(p.dtype)) for n, p in summed.items()}
        buffers[SUMMED] = jnp.zeros((), jnp.int32)
        summed_stats = {n: s for n, s in declaration.stored.items() if n not in declaration.read}
        buffers |= {SUM + n: jnp.zeros(s.shape, wide(dtype)) for n, s in summed_stats.items()}
    return State(parameters, optimizer.init(parameters), buffers, optimizer.init_own(parameters))


def _begun(specs: Mapping[str, Spec], arrays: Arrays, initial: Mapping[str, Any]) -> Arrays:
    """Return `arrays` with what `initial` has of them by canonical name in place, in the dtype of each."""
    flat = to_canonical(specs, arrays)
    flat |= {n: jnp.asarray(value, flat[n].dtype) for n, value in initial.items() if n in flat}
    return from_canonical(specs, flat, arrays)


def _copies(declaration: Declaration, parameters: Arrays) -> Arrays:
    """Return the teachers at step 0: what they copy, float32 or wider."""
    return {
        f"{TEACHER}{teacher}/{n}": parameters[n].astype(wide(parameters[n].dtype))
        for teacher, names in declaration.teachers.items()
        for n in sorted(names)
    }


def abstract_state(declaration: Declaration, optimizer: Optimizer, dtype: Any, mesh: Mesh) -> State:
    """Return the shapes, dtypes and shardings of the state on `mesh`.

    Averages and sums lie like their parameter, and optimizer state by the axes that it shares with it.
    """
    shapes = jax.eval_shape(lambda: init_state(declaration, optimizer, 0, dtype))

    def place(name: str, leaf: Any, axes: Axes) -> Any:
        try:
            sharding = named(axes, leaf.shape, mesh)
        except ValueError as error:
            raise UserError(f"'{name}': {error}.") from error
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def place_state(name: str, state: LeafState) -> LeafState:
        axes = optimizer.axes(name)
        return {field: place(name, leaf, axes[field]) for field, leaf in state.items()}

    specs = declaration.stored
    return State(
        {n: place(n, p, specs[n].axes) for n, p in shapes.parameters.items()},
        {n: place_state(n, leaf) for n, leaf in shapes.optimizer.items()},
        {
            n: place(n, b, () if n == SUMMED else specs[parameter_of(n)].axes)
            for n, b in shapes.buffers.items()
        },
        {n: place_state(split_name(n)[1], leaf) for n, leaf in shapes.moments.items()},
    )


def parameter_of(buffer: str) -> str:
    """Return the parameter or `stat/NAME` that a buffer belongs to, by its name or canonical name."""
    return buffer.removeprefix(EMA).removeprefix(SUM)


def read_by_passes(state: State) -> Arrays:
    """Return what a forward pass reads beside the parameters: `stat/NAME`, and `teacher/TEACHER/NAME`."""
    return {n: b for n, b in state.buffers.items() if n.startswith(BESIDE)}


def evaluated(state: State) -> Arrays:
    """Return what evaluation reads: parameters and buffers, or their averages where the state keeps them; teachers."""
    averages = {n.removeprefix(EMA): b for n, b in state.buffers.items() if n.startswith(EMA)}
    return {**(averages or state.parameters), **read_by_passes(state), **averages}


def shardings(abstract: Any) -> Any:
    return jax.tree.map(lambda s: s.sharding, abstract)


# --- the form in which checkpoints hold it -----------------------------------------------------


def state_to_canonical(specs: Mapping[str, Spec], state: State) -> dict[str, Any]:
    """Return the state under canonical names.

    It is `{"parameters": {canonical name: array}, "optimizer": {name: {field: array}}, "buffers": {...}}`, beside them
    `"moments": {TASK:name: {field: array}}`.

    Args:
      specs: those of `Declaration.stored`.
    """
    moments: dict[str, Any] = {}
    for task, task_moments in _by_task(state.moments).items():
        moments |= {
            task_state_name(task, n): leaf for n, leaf in to_canonical(specs, task_moments).items()
        }
    return {
        "parameters": to_canonical(specs, state.parameters),
        "optimizer": to_canonical(specs, state.optimizer),
        "buffers": _by_prefix(state.buffers, lambda part: to_canonical(specs, part)),
        "moments": moments,
    }


def state_from_canonical(specs: Mapping[str, Spec], tree: Mapping[str, Any]) -> State:
    """Return the inverse of `state_to_canonical`."""
    moments: dict[str, Any] = {}
    for task, task_moments in _by_task(tree["moments"]).items():
        moments |= {
            task_state_name(task, n): leaf for n, leaf in _as_stored(specs, task_moments).items()
        }
    return State(
        from_canonical(specs, tree["parameters"], [n for n in specs if not n.startswith(BESIDE)]),
        _as_stored(specs, tree["optimizer"]),
        _by_prefix(tree["buffers"], lambda part: _as_stored(specs, part)),
        moments,
    )


def _by_prefix(
    buffers: Mapping[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """Return `buffers` with `change` applied to those of each prefix, which it sees without the prefix."""
    changed = {n: b for n, b in buffers.items() if not n.startswith((EMA, SUM, *BESIDE))}
    stats = {n: b for n, b in buffers.items() if n.startswith(BESIDE)}
    changed |= change(stats)
    for prefix in (EMA, SUM):
        part = {n.removeprefix(prefix): b for n, b in buffers.items() if n.startswith(prefix)}
        changed |= {prefix + n: b for n, b in change(part).items()}
    return changed


def _by_task(moments: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a dict task -> name -> leaf state."""
    result: dict[str, dict[str, Any]] = {}
    for name, leaf in moments.items():
        task, parameter = split_name(name)
        result.setdefault(task, {})[parameter] = leaf
    return result


def _as_stored(specs: Mapping[str, Spec], flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of `flat` (by canonical names) as the state holds them; some may be missing."""
    return from_canonical(specs, flat, [n for n, s in specs.items() if s.canonical[0] in flat])


def compute_dtype(name: str) -> Any:
    """Return a dtype by its name in a config; float64 needs JAX to be set up for it."""
    known = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}
    if name not in known:
        raise UserError(f"dtype '{name}': expected one of {', '.join(known)}.")
    if name == "float64" and not jax.config.values["jax_enable_x64"]:
        raise UserError("dtype float64 needs JAX_ENABLE_X64=1 in the environment.")
    return known[name]
