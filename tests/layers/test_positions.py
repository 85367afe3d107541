"""Positions: which bucket a coordinate reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmjax.layers.positions import Positions, grid
from mmjax.modalities import image
from mmjax.modalities.colours import Colours
from mmjax.modalities.image import Image
from mmjax.modalities.spectrogram import Spectrogram
from mmjax.modalities.text import Text
from mmjax.modalities.video import Video
from mmjax.modalities.waveform import Waveform
from mmjax.parameters import Declaration

WIDTH = 3


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def built(**buckets: int) -> tuple[Any, dict[str, np.ndarray]]:
    declaration = Declaration(Positions(WIDTH, buckets))
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=spec.shape) for name, spec in declaration.specs.items()}
    call = jax.jit(lambda p, coordinates: declaration.merge(p)(coordinates))
    return lambda coordinates: call(arrays, coordinates), arrays


TABLE = 512


def used(count: int, coordinates: Any) -> list[int]:
    """Which of `count` buckets the coordinates read."""
    numbers = jnp.arange(TABLE, dtype=jnp.float32)[:, None]
    norm = {"norm/scale": jnp.ones(1), "norm/bias": jnp.zeros(1)}
    layer = Declaration(Positions(1, {"x": TABLE})).merge({"tables/x": numbers, **norm})
    layer.buckets = {"x": count}
    layer.norm = lambda x: x  # so that the number of the table's row comes out
    # One shape for all counts: nothing is compiled twice.
    given = np.zeros(TABLE, np.float32)
    given[: np.size(coordinates)] = np.ravel(coordinates)
    rows = np.asarray(layer({"x": jnp.asarray(given)}))[: np.size(coordinates), 0]
    return rows.astype(int).tolist()


def test_against_numpy(x64: None) -> None:
    layer, p = built(y=4, x=8)
    y, x = np.array([[0.0, 0.3, 0.5, 0.99]]), np.array([[0.99, 0.0, 0.26, 0.124]])
    rows = p["tables/y"][[[0, 1, 2, 3]]] + p["tables/x"][[[7, 0, 2, 0]]]
    spread = np.sqrt(rows.var(axis=-1, keepdims=True) + 1e-6)
    expected = (rows - rows.mean(axis=-1, keepdims=True)) / spread * p["norm/scale"]
    out = layer({"y": jnp.asarray(y), "x": jnp.asarray(x)})
    np.testing.assert_allclose(out, expected + p["norm/bias"], rtol=1e-9)


@given(count=st.integers(1, 300), data=st.data())
@settings(max_examples=50, deadline=None)
def test_a_coordinate_inside_a_bucket_reads_that_bucket(count: int, data: st.DataObject) -> None:
    bucket = data.draw(st.integers(0, count - 1))
    inside = data.draw(st.floats(0.1, 0.9))
    assert used(count, [np.float32((bucket + inside) / count)]) == [bucket]


@given(coarse=st.integers(1, 50), finer=st.integers(1, 5), more=st.integers(1, 2))
@example(coarse=22, finer=1, more=1)  # 15 / 22 * 22 is below 15 in float32
@example(coarse=19, finer=5, more=2)
@settings(max_examples=50, deadline=None)
def test_a_coarse_grid_reads_buckets_of_the_fine_one(coarse: int, finer: int, more: int) -> None:
    fine = coarse * finer
    count = fine * more
    of_coarse, of_fine = (used(count, np.arange(n, dtype=np.float32) / n) for n in (coarse, fine))
    assert of_coarse == of_fine[::finer]
    assert of_fine == [i * more for i in range(fine)], "each cell a bucket of its own, evenly"


def test_out_of_range_reads_the_last_or_the_first_bucket(x64: None) -> None:
    layer, p = built(x=4)
    first, last = (layer({"x": jnp.full((1, 1), c)}) for c in (0.0, 0.9))
    assert np.abs(first - last).min() > 1e-3
    np.testing.assert_array_equal(layer({"x": jnp.full((1, 1), -0.5)}), first)
    np.testing.assert_array_equal(layer({"x": jnp.full((1, 1), 1.0)}), last)
    np.testing.assert_array_equal(layer({"x": jnp.full((1, 1), 7.0)}), last)


def test_gradient_reaches_only_the_rows_used() -> None:
    declaration = Declaration(Positions(WIDTH, {"y": 4, "x": 8}))

    def loss(parameters: dict[str, jax.Array]) -> jax.Array:
        out = declaration.merge(parameters)(grid(y=2, x=2))
        return jnp.square(out - 1.5 * jnp.arange(WIDTH)).sum()

    rng = np.random.default_rng(0)
    given = {n: rng.normal(size=s.shape).astype("f") for n, s in declaration.specs.items()}
    gradient = jax.jit(jax.grad(loss))(given)
    moved = {n: np.flatnonzero(np.abs(g).sum(axis=-1)) for n, g in gradient.items() if "table" in n}
    assert moved["tables/y"].tolist() == [0, 2]
    assert moved["tables/x"].tolist() == [0, 4]


def test_grid_is_row_major() -> None:
    axes = grid(y=2, x=3)
    assert list(axes) == ["y", "x"]
    np.testing.assert_allclose(axes["y"], [[0, 0, 0, 0.5, 0.5, 0.5]])
    np.testing.assert_allclose(axes["x"], [[0, 1 / 3, 2 / 3, 0, 1 / 3, 2 / 3]], rtol=1e-6)


def test_tables_do_not_decay() -> None:
    specs = Declaration(Positions(WIDTH, {"x": 8})).specs
    assert specs["tables/x"].axes == ("positions", "embed") and not specs["tables/x"].decay


def test_embeddings_begin_at_the_stated_size() -> None:
    for scale in (1.0, 0.05):
        start = Declaration(Positions(WIDTH, {"x": 8}, scale)).initialise(0)
        np.testing.assert_allclose(start["norm/scale"], np.full(WIDTH, scale), rtol=1e-6)
        assert not np.any(start["norm/bias"])


STEMS: dict[str, Any] = {
    "colours": Colours(), "image": Image(), "spectrogram": Spectrogram(), "text": Text(), "video": Video(),
    "waveform": Waveform(),
}  # fmt: skip


@pytest.mark.parametrize("name", STEMS)
def test_positions_of_a_stem_begin_small_beside_the_content(name: str) -> None:
    """Each token's has a root mean square of 0.05 at first, whatever its coordinates."""
    stem = STEMS[name].stem(16)
    assert set(STEMS) == {p.stem for p in Path(image.__file__).parent.glob("*.py")} - {"__init__"}
    positions = Declaration(stem.positions)
    p = positions.initialise(0)
    coordinates = {axis: jnp.array([[0.0, 0.3, 0.9]]) for axis in stem.positions.buckets}
    found = np.asarray(positions.merge(p)(coordinates))
    np.testing.assert_allclose(np.sqrt(np.square(found).mean(axis=-1)), 0.05, rtol=2e-2)
