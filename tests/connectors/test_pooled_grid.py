"""Pooled grids against loops."""

from __future__ import annotations

from typing import Any

import connecting
import jax
import numpy as np
import pytest

from mmjax.connectors.pooled_grid import PooledGrid
from mmjax.nn.positions import grid

pytestmark = pytest.mark.usefixtures("x64")

ROWS, COLUMNS = 4, 6


def valid(frames: int) -> np.ndarray:
    """Return which tokens of two rows exist: some cells have all, some have none."""
    there = np.random.default_rng(2).random((2, frames, ROWS, COLUMNS)) < 0.7
    there[1, 0, :2, :3] = False
    return there.reshape(2, -1)


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("all_exist", [True, False])
def test_against_loops(frames: int, all_exist: bool) -> None:
    size = (ROWS, COLUMNS) if frames == 1 else (frames, ROWS, COLUMNS)
    there = np.ones((2, frames * ROWS * COLUMNS), bool) if all_exist else valid(frames)
    given = connecting.stream(("image", size), width=3, valid=None if all_exist else there)
    call, p = connecting.built(PooledGrid(size=2), 3, 5)
    out = call(p, given)
    assert list(p) == ["out/kernel"]
    assert out.grids == (((2, 2) if frames == 1 else (frames, 2, 2)),)
    x = np.asarray(given.x_BSD).reshape(2, frames, ROWS, COLUMNS, 3)
    there = there.reshape(x.shape[:-1])
    for b, f, i, j in np.ndindex(2, frames, 2, 2):
        cell = x[b, f, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3].reshape(-1, 3)
        exists = there[b, f, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3].reshape(-1)
        mean = cell[exists].mean(axis=0) if exists.any() else np.zeros(3)
        at = (f * 2 + i) * 2 + j
        np.testing.assert_allclose(out.x_BSD[b, at], mean @ p["out/kernel"], rtol=1e-11, atol=1e-13)
        assert all_exist or out.valid_BS[b, at] == exists.any()
    assert (out.valid_BS is None) == all_exist


def test_each_picture_of_a_stream_is_pooled_and_keeps_its_place() -> None:
    """The coordinates are those of the coarser grid."""
    pictures = ("a", (ROWS, COLUMNS)), ("b", (2, 3))
    given = connecting.stream(*pictures, width=3)
    call, p = connecting.built(PooledGrid(size=1, bias=True), 3, 5)
    out = call(p, given)
    assert out.layout == (("a", 1), ("b", 1)) and out.grids == ((1, 1), (1, 1))
    for at, part in enumerate((slice(0, 24), slice(24, 30))):
        mean = np.asarray(given.x_BSD)[:, part].mean(axis=1)
        np.testing.assert_allclose(out.x_BSD[:, at], connecting.affine(p, "out", mean), rtol=1e-11)
    one = connecting.stream(
        ("a", (ROWS, COLUMNS)),
        width=3,
        coordinates=grid(y=ROWS, x=COLUMNS),
        attributes={"span": np.arange(24)[None]},
    )
    call, p = connecting.built(PooledGrid(size=2), 3, 5)
    out = call(p, one)
    for axis, expected in grid(y=2, x=2).items():
        np.testing.assert_array_equal(out.coordinates[axis], expected)
    np.testing.assert_array_equal(out.attributes["span"], [[0, 3, 12, 15]])


def test_padding_has_no_gradient() -> None:
    call, p = connecting.built(PooledGrid(size=2), 3, 5)
    given = connecting.stream(("image", (ROWS, COLUMNS)), width=3, valid=valid(1))

    def total(x: Any) -> Any:
        return (call(p, given.replace(x_BSD=x)).x_BSD).sum()

    gradient = jax.jit(jax.grad(total))(given.x_BSD)
    np.testing.assert_array_equal(np.abs(gradient).max(-1) > 0, valid(1))
