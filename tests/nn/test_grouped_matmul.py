"""Grouped products against one row at a time."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.core.errors import UserError
from mmjax.nn import attention_kernels
from mmjax.nn.grouped_matmul import grouped, megablox

SIZES = [[3, 0, 5, 2], [10, 0, 0, 0], [0, 0, 0, 9], [1, 1, 1, 1]]
ROWS = 10


def problem(inner: int, outer: int, rows: int = ROWS) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(rows, inner)), rng.normal(size=(4, inner, outer))


def loops(x: np.ndarray, w: np.ndarray, sizes: list[int]) -> np.ndarray:
    out = np.zeros((len(x), w.shape[2]))
    for row, group in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        out[row] = x[row] @ w[group]
    return out


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 5), min_size=4, max_size=4))
def test_ragged_against_loops(sizes: list[int]) -> None:
    with jax.enable_x64(True):
        x, w = problem(3, 2, rows=20)
        found = grouped(jnp.asarray(x), jnp.asarray(w), jnp.asarray(sizes, jnp.int32))
        np.testing.assert_allclose(found, loops(x, w, sizes), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("sizes", SIZES)
def test_megablox_against_loops_and_its_gradient(sizes: list[int]) -> None:
    """In interpret mode: groups that are empty, that fill all, and that leave rows out."""
    x, w = problem(128, 128)
    weights = np.random.default_rng(1).normal(size=(ROWS, 128))

    def run(function: Any) -> Any:
        def loss(x: Any, w: Any) -> tuple[jax.Array, jax.Array]:
            out = function(x, w, jnp.asarray(sizes, jnp.int32))
            return (out * weights).sum(), out

        arguments = jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)
        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(*arguments)

    gradients, out = run(partial(megablox, interpret=True))
    np.testing.assert_allclose(out, loops(x, w, sizes), atol=2e-4)
    expected, _ = run(partial(grouped, kernel="ragged"))
    for found, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-4)


def test_megablox_gives_way_where_it_does_not_run(
    x64: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_kernels, "_logged", set())
    caplog.set_level(logging.WARNING)
    x, w = problem(3, 2)
    for _ in range(2):
        found = grouped(jnp.asarray(x), jnp.asarray(w), jnp.asarray(SIZES[0]), "megablox")
        np.testing.assert_allclose(found, loops(x, w, SIZES[0]), rtol=1e-12)
    assert [r.getMessage() for r in caplog.records] == [
        "grouped kernel 'megablox' gives way to 'ragged': it runs on TPUs, and this is compiled for cpu."
    ]


def test_an_unknown_kernel() -> None:
    with pytest.raises(UserError, match="Unknown kernel 'megablocks'.*'megablox'"):
        grouped(jnp.zeros((1, 1)), jnp.zeros((1, 1, 1)), jnp.ones(1, int), "megablocks")
