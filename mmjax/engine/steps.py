"""Programs: one task at one shape, lowered against one pinned state and compiled before step 0."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from mmjax.analysis import flops
from mmjax.core.batch import Batch
from mmjax.core.parameters import COUNT, STAT, Arrays, Declaration
from mmjax.core.sharding import batch_sharding, replicated, shard_bytes
from mmjax.engine import buffers
from mmjax.engine.compile import Request
from mmjax.engine.gradient import loss_and_gradient
from mmjax.engine.state import EMA, SUM, SUMMED, State, read_by_passes, shardings
from mmjax.engine.teachers import TICK, Teacher, followed, moving
from mmjax.evaluators.base import Computation, device_spec, function
from mmjax.objectives.base import Loss, row_keys
from mmjax.optim.optimizer import Optimizer
from mmjax.optim.reach import Reach, reach
from mmjax.optim.transforms import wide
from mmjax.optim.views import OWN_MOMENTS, UpdateScope, split_name, task_state_name
from mmjax.task import RowSpec, Task

Metrics = dict[str, jax.Array]
StepCounters = Mapping[str, jax.Array]


@dataclass(frozen=True)
class ModelSpec:
    """A model, and how it computes.

    Attributes:
      declaration: its parameters and buffers.
      dtype: of the parameters.
      compute: dtype of the arithmetic.
      seed: of the run.
      teachers: by name.
    """

    declaration: Declaration
    dtype: Any
    compute: Any
    seed: int
    teachers: Mapping[str, Teacher] = field(default_factory=dict)


# --- the functions -----------------------------------------------------------------------------


def loss_function(
    spec: ModelSpec, task: Task
) -> Callable[[Arrays, Arrays, Batch, jax.Array], Loss]:
    """Return a function `(moved parameters, the others and buffers, batch, visit) -> loss` of a task."""

    def loss_of(moved: Arrays, others: Arrays, batch: Batch, visit: jax.Array) -> Loss:
        model = spec.declaration.merge({**others, **moved}, spec.compute)
        return task.loss(model, batch, jax.random.fold_in(task.fold(spec.seed), visit))

    return loss_of


def train_function(
    spec: ModelSpec, task: Task, optimizer: Optimizer
) -> Callable[[State, Batch, StepCounters], tuple[State, Metrics]]:
    """Return a function `(state, batch, {step, visit, perhaps part}) -> (state, metrics)`: loss, gradient, update."""
    view, declared = optimizer.views[task.name], spec.declaration.buffers
    averages = moving(spec.teachers, task.name)

    def settle(state: State, statistics: Arrays, ticks: StepCounters) -> State:
        new = buffers.settled(state.buffers, statistics, declared, spec.seed, ticks["step"])
        after = {**state.buffers, **new}
        decay = optimizer.config.ema
        return replace(state, buffers=_averaged(after, new, new, decay) if decay else after)

    def step(state: State, batch: Batch, ticks: StepCounters) -> tuple[State, Metrics]:
        moved, others = _parted(state, view)

        def model_of(moved: Arrays) -> Any:
            return spec.declaration.merge({**others, **moved}, spec.compute)

        key = jax.random.fold_in(task.fold(spec.seed), ticks["visit"])
        loss, grads = loss_and_gradient(task, model_of, moved, batch, key)
        finite = jnp.isfinite(loss.value) & jnp.isfinite(_norm(grads))
        # A non-finite loss or gradient leaves everything as it was, and the host counts it. So does a batch without
        # a valid row, whose gradient of zero would else decay weights and spend momentum.
        counts = finite & ~loss.is_empty(batch.valid)
        every, frozen = optimizer.config.accumulate, optimizer.frozen_buffers
        statistics = buffers.checked(loss.proposals, declared, frozen, task.name, every)
        if optimizer.accumulates:
            pending = _Pending(grads, statistics, counts)
            after, update_metrics = _accumulated(
                state, pending, optimizer, task.name, ticks, settle
            )
        else:
            after, update_metrics = _updated(state, grads, optimizer, task.name, ticks)
            after = settle(after, statistics, ticks)
            moved_teachers = followed(after.buffers, after.parameters, averages, ticks)
            after = replace(after, buffers={**after.buffers, **moved_teachers})
            after = _where(counts, after, state)
        occupancy = task.objective.occupancy(model_of(moved), batch, key)
        metrics = {"loss": loss.value, **update_metrics, **loss.metrics, "finite": finite}
        metrics["valid_tokens"] = occupancy.valid
        return after, {
            name: jnp.asarray(m, jnp.promote_types(m.dtype, jnp.float32))
            for name, m in metrics.items()
        }

    return step


def _parted(state: State, view: UpdateScope) -> tuple[Arrays, Arrays]:
    """Return the parameters that a step moves, and what else a forward pass reads."""
    parameters = state.parameters
    others = {n: p for n, p in parameters.items() if n not in view.trains}
    return (
        {n: p for n, p in parameters.items() if n in view.trains},
        {**others, **read_by_passes(state)},
    )


def _updated(
    state: State, grads: Arrays, optimizer: Optimizer, task: str, ticks: StepCounters
) -> tuple[State, Metrics]:
    """Return the state after an update with a task's gradient, under the task's view, and what to report."""
    rate = optimizer.rate(task, ticks)
    if optimizer.views[task].kind == OWN_MOMENTS:
        task_moments = {n: state.moments[task_state_name(task, n)] for n in grads}
        updated = optimizer.update(grads, task_moments, state.parameters, rate)
        moments = {task_state_name(task, n): leaf for n, leaf in updated.optimizer.items()}
        after = replace(state, moments={**state.moments, **moments})
    else:
        updated = optimizer.update(grads, state.optimizer, state.parameters, rate)
        after = replace(state, optimizer=updated.optimizer)
    averages = state.buffers
    if optimizer.config.ema:
        averages = _averaged(averages, updated.parameters, grads, optimizer.config.ema)
    return replace(after, parameters=updated.parameters, buffers=averages), updated.metrics


@dataclass(frozen=True)
class _Pending:
    """A step's part of a round of several.

    Attributes:
      grads: the gradient of its loss.
      statistics: what its loss proposes to buffers, by `stat/NAME/STATISTIC`.
      counts: whether the step is part of its round. The mean is over those that are; without any, nothing moves.
    """

    grads: Arrays
    statistics: Arrays
    counts: jax.Array


def _accumulated(
    state: State,
    pending: _Pending,
    optimizer: Optimizer,
    task: str,
    ticks: StepCounters,
    settle: Callable[[State, Arrays, StepCounters], State],
) -> tuple[State, Metrics]:
    """Add gradient and statistics to the sums; in the last step of a round, or of the run, update with them."""
    grads, counts = pending.grads, pending.counts
    sums = {n: state.buffers[SUM + n] + jnp.where(counts, g, 0) for n, g in grads.items()}
    sums = {n: state.buffers[SUM + n] for n in sorted(optimizer.accumulates)} | sums
    steps = state.buffers[SUMMED] + counts.astype(jnp.int32)
    stats = buffers.added(_summed_statistics(state), pending.statistics, counts)

    def holding(after: State, sums: Arrays, steps: jax.Array) -> State:
        buffers_after = {**after.buffers, **{SUM + n: s for n, s in sums.items()}, SUMMED: steps}
        return replace(after, buffers=buffers_after)

    def update() -> State:
        some = jnp.maximum(steps, 1)
        means = {n: s / some.astype(s.dtype) for n, s in sums.items() if n in grads}
        after, _ = _updated(state, means, optimizer, task, ticks)
        after = _settled_round(after, stats, optimizer.frozen_buffers, ticks, settle)
        after = _where((steps > 0) & jnp.isfinite(_norm(means)), after, state)
        return holding(after, jax.tree.map(jnp.zeros_like, sums | stats), jnp.zeros_like(steps))

    is_last = ((ticks["step"] + 1) % optimizer.config.accumulate == 0) | (ticks["last"] > 0)
    after: State = jax.lax.cond(is_last, update, lambda: holding(state, sums | stats, steps))
    return after, {"grad_norm": _norm(grads), "learning_rate": optimizer.rate(task, ticks)}


def _summed_statistics(state: State) -> Arrays:
    """Return the sums of a round's statistics so far, by `stat/NAME/STATISTIC`."""
    prefix = SUM + STAT
    return {n.removeprefix(SUM): b for n, b in state.buffers.items() if n.startswith(prefix)}


def _settled_round(
    state: State,
    sums: Arrays,
    frozen: frozenset[str],
    ticks: StepCounters,
    settle: Callable[[State, Arrays, StepCounters], State],
) -> State:
    """Return the state with each buffer settled to which a step of the round has proposed."""
    names = {n.rpartition("/")[0] for n in sums}
    live = {n for n in names if n.removeprefix(STAT) not in frozen}
    chosen = {n: x for n, x in sums.items() if n.rpartition("/")[0] in live}
    after = settle(state, chosen, ticks)
    buffers_after = dict(after.buffers)
    for name in sorted(live):
        steps = sums[f"{name}/{COUNT}"]
        for full in (name, EMA + name):
            if full in buffers_after:
                ones = (1,) * (buffers_after[full].ndim - steps.ndim)
                is_settled = (steps > 0).reshape(steps.shape + ones)
                buffers_after[full] = jnp.where(
                    is_settled, buffers_after[full], state.buffers[full]
                )
    return replace(after, buffers=buffers_after)


def _norm(grads: Arrays) -> jax.Array:
    """Return the norm of a gradient, in float32 or wider."""
    return optax.tree.norm({n: g.astype(wide(g.dtype)) for n, g in grads.items()})


def _where(chosen: jax.Array, one: State, other: State) -> State:
    after: State = jax.tree.map(lambda a, b: jnp.where(chosen, a, b), one, other)
    return after


def _averaged(buffers: Arrays, parameters: Arrays, moved: Iterable[str], decay: float) -> Arrays:
    """Return the averages of the parameters that moved: like them, they keep to their own clock."""
    averages = {
        EMA + n: decay * buffers[EMA + n] + (1 - decay) * parameters[n] for n in sorted(moved)
    }
    return {**buffers, **averages}


def train_request(
    spec: ModelSpec, task: Task, optimizer: Optimizer, state: State, mesh: Mesh
) -> Request:
    """Return the training program of a task against the pinned abstract `state`."""
    step, loss_of = train_function(spec, task, optimizer), loss_function(spec, task)
    view = optimizer.views[task.name]
    batch = abstract_batch(task.rows(), task.batch, mesh, f"tasks.{task.name}")
    parts = task.config.microbatches
    batch_sharding(mesh, task.batch // parts, f"tasks.{task.name} in {parts} microbatches")
    names = {"step", "visit", *optimizer.ticks}
    ticks = {n: _tick(mesh, float if n == "scale" else np.int32) for n in names}
    ticks |= {TICK + n: _tick(mesh, float) for n in moving(spec.teachers, task.name)}

    def count() -> int:
        moved, others = _parted(state, view)
        return flops.train_flops(
            lambda *arguments: loss_of(*arguments).value, moved, others, batch, ticks["visit"]
        )

    arguments = (state, batch, ticks)
    outputs = (shardings(state), replicated(mesh))
    return Request(
        task.name, "train", step, arguments, outputs, (0,), _shape(task.rows(), task.batch), count,
        {
            "tokens": positions(task, spec.declaration, batch),
            "view": view.kind,
            "optimizer_bytes": optimizer_bytes(state, view.kind, task.name),
        },
    )  # fmt: skip


def positions(task: Task, declaration: Declaration, batch: Batch) -> int:
    """Return how many positions a step computes for a batch's shapes, padding included."""

    def occupancy(parameters: Arrays, batch: Batch) -> Any:
        model = declaration.merge(parameters, jnp.float32)
        return task.objective.occupancy(model, batch, jax.random.key(0))

    arrays = {**declaration.shapes(jnp.float32), **declaration.buffer_shapes(jnp.float32)}
    shapes = jax.eval_shape(occupancy, arrays, batch)
    return int(shapes.positions)


def optimizer_bytes(state: State, kind: str, task: str) -> int:
    """Return the bytes of one device that hold the optimizer state which a task's steps read."""
    task_moments = {n: leaf for n, leaf in state.moments.items() if split_name(n)[0] == task}
    moments = task_moments if kind == OWN_MOMENTS else state.optimizer
    return shard_bytes(moments)


def reach_of(spec: ModelSpec, task: Task) -> Reach:
    """Return what the gradient of a task's loss reaches."""
    loss_of = loss_function(spec, task)
    parameters, batch = spec.declaration.shapes(spec.dtype), task.rows().batch(task.batch)
    beside = spec.declaration.buffer_shapes(spec.dtype)
    visit = jax.ShapeDtypeStruct((), np.int32)
    return reach(lambda p, *others: loss_of(p, *others).value, parameters, beside, batch, visit)


def eval_request(
    spec: ModelSpec,
    task: Task,
    computation: Computation,
    size: int,
    parameters: Arrays,
    mesh: Mesh,
) -> Request:
    """Return the program of evaluation passes, `(parameters, batch, {batch}) -> outputs`, whole on every process.

    With the parameters come the buffers, see `mmjax.engine.state.evaluated`.
    """
    outputs_of = function(task, computation)

    def run(parameters: Arrays, batch: Batch, ticks: StepCounters) -> dict[str, jax.Array]:
        base_key = jax.random.fold_in(task.fold(spec.seed), 2**31)
        key, of_rows = (jax.random.fold_in(base_key, index) for index in (ticks["batch"], 0))
        # An example draws the same whatever the size of the batches that it comes in.
        keyed = replace(batch, keys=row_keys(batch, of_rows, ticks["batch"] * size))
        outputs = outputs_of(spec.declaration.merge(parameters, spec.compute), keyed, key)
        return {**outputs, "valid": batch.valid}

    rows = device_spec(task, computation)
    batch = abstract_batch(rows, size, mesh, f"evaluation.batch (of tasks.{task.name})")
    arguments = (parameters, batch, {"batch": _tick(mesh)})
    return Request(
        task.name, str(computation), run, arguments, replicated(mesh), (), _shape(rows, size),
        lambda: flops.model_flops(run, *arguments),
    )  # fmt: skip


def abstract_batch(spec: RowSpec, size: int, mesh: Mesh, where: str) -> Batch:
    """Return the shapes, dtypes and shardings of a batch of `size` rows."""
    sharding = batch_sharding(mesh, size, where)
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct((size, *s.shape), s.dtype, sharding=sharding), spec.shapes()
    )


def _tick(mesh: Mesh, dtype: Any = np.int32) -> Any:
    return jax.ShapeDtypeStruct((), jnp.result_type(dtype), sharding=replicated(mesh))


def ticks(mesh: Mesh, **values: float) -> StepCounters:
    """Return integers (int32), and floats in the default dtype, as arguments of a program, on every device."""
    real = np.dtype(jnp.result_type(float)).type
    return {
        name: _placed(mesh, real(value) if isinstance(value, float) else np.int32(value))
        for name, value in values.items()
    }


@lru_cache(maxsize=64, typed=True)
def _placed(mesh: Mesh, value: Any) -> jax.Array:
    """Return a number on every device; those that a step has in common with the one before are placed once."""
    sharding = replicated(mesh)
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    # Device by device: a `device_put` over several processes has them compare the values first.
    parts = [jax.device_put(value, d) for d in sharding.addressable_devices]
    return jax.make_array_from_single_device_arrays((), sharding, parts)


def _shape(spec: RowSpec, size: int) -> str:
    parts = [
        "x".join(map(str, next(iter(i.arrays().values())).shape)) for i in spec.inputs.values()
    ]
    return f"{size} x ({'+'.join(parts)})" if len(parts) > 1 else f"{size} x {parts[0]}"


# --- compilation -------------------------------------------------------------------------------
