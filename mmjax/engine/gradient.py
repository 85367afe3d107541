"""Loss and gradient of a task's batch: at once, or over micro-batches that come to the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from mmjax.core.batch import Batch
from mmjax.core.errors import UserError
from mmjax.core.parameters import Arrays, Rows
from mmjax.core.sharding import joined_rows, split_rows
from mmjax.model import Model
from mmjax.nn.stream import add_proposals
from mmjax.objectives.base import Coupled, Loss, row_keys, with_rows
from mmjax.optim.transforms import wide
from mmjax.task import Task

ModelOf = Callable[[Arrays], Model]


def loss_and_gradient(
    task: Task, model_of: ModelOf, parameters: Arrays, batch: Batch, key: jax.Array
) -> tuple[Loss, Arrays]:
    """Return the loss of a batch and its gradient with respect to `parameters`.

    With micro-batches, one after another, memory is that of one of them. A loss that is a mean stays
    the mean over the whole batch, parts being weighted by `Loss.count`; a `Coupled` objective keeps
    its value over the whole batch as well. Auxiliary losses become the mean over the parts.

    Args:
      model_of: makes the model from `parameters`.
      key: of the visit; each row has a key of its own, whatever part it is in (see `row_keys`).
    """
    batch = with_rows(batch)
    if task.config.microbatches == 1:

        def value_of(parameters: Arrays) -> tuple[jax.Array, Loss]:
            loss = task.loss(model_of(parameters), batch, key)
            return loss.value, loss

        (_, loss), grads = jax.value_and_grad(value_of, has_aux=True)(parameters)
        return loss, grads
    of = _coupled if isinstance(task.objective, Coupled) else _separate
    return of(task, model_of, parameters, batch, key)


def _separate(
    task: Task, model_of: ModelOf, parameters: Arrays, batch: Batch, key: jax.Array
) -> tuple[Loss, Arrays]:
    """Return a mean over rows or tokens: the weighted sum over parts, over the sum of weights."""

    def weighted(parameters: Arrays, part: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
        loss = task.loss(model_of(parameters), part, key)
        _refuse_rows(loss.proposals, task)
        if loss.parts:
            raise ValueError(f"{type(task.objective).__name__}: a loss of several means is Coupled")
        count = loss.terms(part.valid)
        metrics = {name: count * metric for name, metric in loss.metrics.items()}
        return count * loss.value, (count, metrics, loss.proposals)

    def of_part(part: Batch, key: jax.Array) -> Any:
        return jax.value_and_grad(weighted, has_aux=True)(parameters, part, key)

    (value, (count, metrics, proposals)), grads = _total(of_part, *_parts(task, batch, key))
    whole = jnp.where(count > 0, count, 1)
    value, metrics, grads = jax.tree.map(
        lambda x: x / whole.astype(x.dtype), (value, metrics, grads)
    )
    return Loss(value, metrics, proposals, count), grads


def _coupled(
    task: Task, model_of: ModelOf, parameters: Arrays, batch: Batch, key: jax.Array
) -> tuple[Loss, Arrays]:
    """Return loss and gradient of a loss between rows, in two passes (Gao et al. 2021, GradCache).

    First what the loss compares, of all parts, without keeping what a gradient needs; then the loss
    and its gradient with respect to that; then each part again, to pull that gradient back.
    """
    objective: Any = task.objective
    parts, keys = _parts(task, batch, key)

    def represent(parameters: Arrays, part: Batch, key: jax.Array) -> Any:
        represented = objective.represent(model_of(parameters), part, key)
        _refuse_rows(represented.aux.proposals, task)
        return represented.rows, represented.aux.loss, represented.aux.proposals

    rows, aux, proposals = jax.lax.map(
        lambda part_and_key: represent(parameters, *part_and_key), (parts, keys)
    )
    proposals = jax.tree.map(lambda x: x.sum(axis=0), proposals)

    def value_of(parameters: Arrays, rows: Any) -> tuple[jax.Array, Loss]:
        loss = objective.compare(model_of(parameters), rows, batch)
        return loss.value, loss

    gradient = jax.value_and_grad(value_of, argnums=(0, 1), has_aux=True)
    together = objective.rows_together()
    whole = jax.tree.map(lambda x: joined_rows(x, together), rows)
    (_, loss), (direct, back) = gradient(parameters, whole)
    share = parts.valid.sum(axis=1) / jnp.maximum(batch.valid.sum(), 1)
    share = share.astype(aux.dtype)

    def pulled(part: Batch, key: jax.Array, back: Any, share: jax.Array) -> Arrays:
        # The statistics of buffers were taken in the first pass.
        _, pull = jax.vjp(lambda p: represent(p, part, key)[:2], parameters)
        grads: Arrays = pull((back, share))[0]
        return grads

    back = jax.tree.map(lambda x: split_rows(x, task.config.microbatches, together), back)
    grads = _total(pulled, parts, keys, back, share)
    value = loss.value + (share * aux).sum()
    proposals = add_proposals([proposals, loss.proposals])
    return replace(loss, value=value, proposals=proposals), jax.tree.map(jnp.add, direct, grads)


def _parts(task: Task, batch: Batch, key: jax.Array) -> tuple[Batch, jax.Array]:
    """Return the batch in parts, its rows with their keys, and a key for each part: leading axis [n]."""
    count, together = task.config.microbatches, task.objective.rows_together()
    whole = replace(batch, keys=row_keys(batch, key))
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))
    return jax.tree.map(lambda x: split_rows(x, count, together), whole), keys


def _total(fun: Callable[..., Any], *stacked: Any) -> Any:
    """Return the sum of `fun` over the leading axis, one after another, in float32 or wider."""
    first = jax.tree.map(lambda x: x[0], stacked)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, wide(s.dtype)), jax.eval_shape(fun, *first))

    def add(total: Any, arguments: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, fun(*arguments)), None

    return jax.lax.scan(add, zeros, stacked)[0]


def _refuse_rows(proposals: Mapping[str, Any], task: Task) -> None:
    for name, statistics in proposals.items():
        if isinstance(statistics, Rows):
            raise UserError(
                f"tasks.{task.name}.microbatches: buffer '{name}' is replaced by rows of the whole batch, and a part "
                "has not all of them. Remove microbatches, or propose in `compare` of a Coupled objective."
            )
