"""Captions token by token: with a cache of the tokens before, against the whole text for each token.

Of a config whose tasks write captions, such as `configs/coca.py:small`; one batch, to the length of its texts. Where
CoCa-pytorch is installed, its training step and its logits, which it recomputes for each token, are timed in the same
pairs at the same widths, depths, heads and lengths (its layers are gated and hold more parameters).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import _coca_pytorch
from benchmarks._pairs import Effort, Quantity, millis, ratios, rounds
from benchmarks._steps import Steps
from mmjax.core.batch import Batch
from mmjax.engine.loader import make_batch
from mmjax.experiment import Experiment, make_experiment
from mmjax.generation.decoding import generate
from mmjax.model import Model
from mmjax.objectives.coca import Coca
from mmjax.task import Task

Call = Callable[[], Any]


def measure(effort: Effort) -> list[Quantity]:
    """Return the ratios, for each task whose objective is `coca`; nothing for a config without such."""
    experiment = make_experiment(effort.block)
    result: list[Quantity] = []
    for task in experiment.tasks.values():
        if isinstance(task.objective, Coca):
            result += _of_task(experiment, task, effort)
    return result


def _of_task(experiment: Experiment, task: Task, effort: Effort) -> list[Quantity]:
    batch, _ = make_batch(
        task.rows(), task.source.open(), range(task.batch), lambda _: None, task.batch
    )
    calls: dict[str, Call] = {
        "cached": _compiled(experiment, task, batch, cached),
        "uncached": _compiled(experiment, task, batch, uncached),
    }
    peer = _coca_pytorch.peer(experiment, task, batch)
    if peer is not None:
        steps = Steps(effort.block)
        order = steps.order(0, steps.period)
        held = {order[each.step]: each for each in steps.batches(0, steps.period)}
        rows = [(task.name, held[task.name])]
        calls |= {
            "step": lambda: steps.run(rows, untimed=0),
            "peer's step": peer.step,
            "peer uncached": peer.write,
        }
    times = rounds(calls, effort.pairs)

    pairs = [("cached", "uncached"), ("cached", "peer uncached"), ("step", "peer's step")]
    found = [
        ratios(times, other, one, "above 1", f"{task.name}: {other} to {one}")
        for one, other in pairs
        if {one, other} <= times.keys()
    ]
    return [*found, *millis(times, f"{task.name}: ")]


def _compiled(
    experiment: Experiment, task: Task, rows: Batch, write: Callable[..., jax.Array]
) -> Call:
    """Return captions of the batch by the model as it begins, on the default device."""
    declaration = experiment.declaration
    parameters = jax.jit(lambda: declaration.initialise(experiment.run.seed))()
    inputs = jax.device_put(dict(rows.inputs))
    call = jax.jit(lambda p, inputs: write(task.objective, declaration.merge(p), inputs))
    return lambda: jax.block_until_ready(call(parameters, inputs))


def cached(objective: Coca, model: Model, inputs: Any) -> jax.Array:
    """Return the captions, each token from a cache of those before."""
    shown, text = objective.modalities
    rows, length = inputs[text]["ids"].shape
    keys = jax.random.split(jax.random.key(0), rows)
    return objective.captions(model, inputs[shown], length, keys)


def uncached(objective: Coca, model: Model, inputs: Any) -> jax.Array:
    """Return the same captions, each token from the whole text: the cache holds the picture alone."""
    shown, text = objective.modalities
    rows, length = inputs[text]["ids"].shape
    keys = jax.random.split(jax.random.key(0), rows)
    seen, _ = objective.see(model, inputs[shown], keys[0])
    there = jnp.ones((rows, length), bool)

    def step(ids_BS: jax.Array, at: jax.Array, held: Any) -> tuple[jax.Array, Any]:
        read, _ = objective.read(model, {"ids": ids_BS[:, 1:], "valid": there}, keys[0])
        decoder = model.heads[objective.head].decoder
        logits_BSV, _ = decoder.predict(read, seen.context, keys[0])
        return jax.lax.dynamic_index_in_dim(logits_BSV, at, axis=1, keepdims=False), held

    stem: Any = model.stems[text]
    return generate(step, (), keys, length, objective.sampling, stem.token_ids)
