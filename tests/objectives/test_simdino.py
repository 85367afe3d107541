"""SimDINO: the coding rate's golden values, the loss in NumPy, and one value on meshes and in micro-batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toyrun
import views

from mmjax.core.parameters import Arrays
from mmjax.core.sharding import batch_sharding, make_mesh
from mmjax.engine.gradient import loss_and_gradient
from mmjax.objectives.simdino import coding_rate


@pytest.fixture(scope="module", autouse=True)
def wide() -> Any:
    with jax.enable_x64(True):
        yield


def units(*shape: int) -> np.ndarray:
    z = np.random.RandomState(0).randn(*shape)
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    return z


def test_the_coding_rate_has_its_golden_values() -> None:
    """Two views of 64 rows of 16 numbers, eps 0.5; then all rows equal, `(p + m) / (2 p m) ln(1 + p / eps)`."""
    z, valid = units(2, 64, 16), jnp.ones(64, bool)
    drawn = coding_rate(jnp.asarray(z.swapaxes(0, 1)), valid, 0.5)
    assert float(drawn) == pytest.approx(0.653239, abs=1e-6)
    same = jnp.broadcast_to(jnp.asarray(z[0, 0]), (64, 2, 16))
    assert float(coding_rate(same, valid, 0.5)) == pytest.approx(0.136582, abs=1e-6)
    # Orthogonal directions, each as often: the most there is.
    most = jnp.asarray(np.tile(np.eye(16), (4, 1)))[:, None]
    assert float(coding_rate(most, valid, 0.5)) == pytest.approx(0.686633, abs=1e-6)


def test_rows_that_are_not_valid_do_not_count() -> None:
    z = units(64, 2, 16)
    some = jnp.arange(64) < 48
    found = coding_rate(jnp.asarray(z), some, 0.5)
    np.testing.assert_allclose(found, coding_rate(jnp.asarray(z[:48]), some[:48], 0.5), rtol=1e-12)


def result(parts: int = 1, devices: int = 1) -> Any:
    """Return value, gradients, and the rows that are compared."""
    made = views.make("simdino")
    task = made.tasks["views"]
    task = replace(task, config=replace(task.config, microbatches=parts))
    arrays = views.arrays_of(made)
    others = {n: x for n, x in arrays.items() if n.startswith("teacher/")}
    moved = {n: x for n, x in arrays.items() if n not in others}
    mesh = make_mesh(made.run.mesh, jax.devices()[:devices])
    merge, objective = made.declaration.merge, task.objective

    def of(moved: Arrays, batch: Any) -> Any:
        loss, grads = loss_and_gradient(
            task, lambda p: merge({**others, **p}), moved, batch, jax.random.key(1)
        )
        rows = objective.represent(merge({**others, **moved}), batch, jax.random.key(1)).rows  # type: ignore[attr-defined]
        return loss.value, grads, rows

    batch = jax.device_put(views.batch(), batch_sharding(mesh, views.ROWS, "here"))
    with jax.set_mesh(mesh):
        return toyrun.host(jax.jit(of)(moved, batch))


def test_the_loss_is_that_of_numpy() -> None:
    value, _, (student, teacher) = result()
    student, teacher = student[views.VALID], teacher[views.VALID]
    rows, dim = len(student), student.shape[-1]
    pairs = [(row, g, 1 - g) for row in range(rows) for g in range(2)]
    agreement = np.mean([teacher[row, g] @ student[row, v] for row, g, v in pairs])
    rate = 0.0
    for view in range(2):
        z = (student[:, view] + teacher[:, view]) / 2
        _, log = np.linalg.slogdet(np.eye(dim) + dim / (rows * 0.5) * z.T @ z)
        rate += log / 2 / 2
    rate *= (dim + rows) / (dim * rows)
    np.testing.assert_allclose(value, -agreement - rate, rtol=1e-10)


@pytest.mark.parametrize(("parts", "devices"), [(2, 1), (4, 1), (1, 8)])
def test_micro_batches_and_devices_keep_value_and_gradient(parts: int, devices: int) -> None:
    whole, other = result()[:2], result(parts, devices)[:2]
    assert max(np.abs(g).max() for g in whole[1].values()) > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), whole, other)
