"""Loss and gradient of a task's batch: at once, or over micro-batches that come to the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from mmjax.core.batch import Batch
from mmjax.core.errors import UserError
from mmjax.core.parameters import Arrays
from mmjax.core.sharding import joined_rows, split_rows
from mmjax.model import Model
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
        _refuse_buffers(loss.buffers, task)
        if loss.parts:
            raise ValueError(f"{type(task.objective).__name__}: a loss of several means is Coupled")
        count = loss.terms(part.valid)
        metrics = {name: count * metric for name, metric in loss.metrics.items()}
        return count * loss.value, (count, count * loss.auxiliary, metrics)

    def of_part(part: Batch, key: jax.Array) -> Any:
        return jax.value_and_grad(weighted, has_aux=True)(parameters, part, key)

    (value, (count, *others)), grads = _total(of_part, *_parts(task, batch, key))
    whole = jnp.where(count > 0, count, 1)
    value, (auxiliary, metrics), grads = jax.tree.map(
        lambda x: x / whole.astype(x.dtype), (value, others, grads)
    )
    return Loss(value, metrics, count=count, auxiliary=auxiliary), grads


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
        _refuse_buffers(represented.aux.buffers, task)
        return represented.rows, represented.aux.loss

    rows, aux = jax.lax.map(
        lambda part_and_key: represent(parameters, *part_and_key), (parts, keys)
    )

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
        _, pull = jax.vjp(lambda p: represent(p, part, key), parameters)
        grads: Arrays = pull((back, share))[0]
        return grads

    back = jax.tree.map(lambda x: split_rows(x, task.config.microbatches, together), back)
    grads = _total(pulled, parts, keys, back, share)
    total = (share * aux).sum()
    loss = replace(loss, value=loss.value + total, auxiliary=loss.auxiliary + total)
    return loss, jax.tree.map(jnp.add, direct, grads)


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


def _refuse_buffers(buffers: Any, task: Task) -> None:
    if buffers:
        raise UserError(
            f"tasks.{task.name}.microbatches: its loss changes buffers ({', '.join(buffers)}), which "
            "need the whole batch. Remove microbatches."
        )
