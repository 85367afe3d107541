"""Positions: which bucket a coordinate reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmjax.core.errors import UserError
from mmjax.core.parameters import Declaration
from mmjax.modalities import image
from mmjax.modalities.colours import Colours
from mmjax.modalities.image import Image, ImageInput
from mmjax.modalities.spectrogram import Spectrogram, SpectrogramInput
from mmjax.modalities.text import Text, TextInput
from mmjax.modalities.video import Video, VideoInput
from mmjax.modalities.waveform import Waveform, WaveformInput
from mmjax.nn.positions import Placed, Positions, Table, grid, place

WIDTH = 3


def built(**buckets: int) -> tuple[Any, dict[str, np.ndarray]]:
    declaration = Declaration(Positions(WIDTH, buckets))
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=spec.shape) for name, spec in declaration.specs.items()}
    call = jax.jit(lambda p, coordinates: declaration.merge(p)(coordinates))
    return lambda coordinates: call(arrays, coordinates), arrays


TABLE = 512


def used(count: int, coordinates: Any) -> list[int]:
    """Return which of `count` buckets the coordinates read."""
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
    assert set(STEMS) == {p.stem for p in Path(image.__file__).parent.glob("*.py")} - {
        "__init__",
        "base",
    }
    positions = Declaration(stem.positions)
    p = positions.initialise(0)
    coordinates = {axis: jnp.array([[0.0, 0.3, 0.9]]) for axis in stem.positions.buckets}
    found = np.asarray(positions.merge(p)(coordinates))
    np.testing.assert_allclose(np.sqrt(np.square(found).mean(axis=-1)), 0.05, rtol=2e-2)


# --- a table, and none --------------------------------------------------------------------------


def test_a_table_has_a_row_for_each_cell_in_row_major_order(x64: None) -> None:
    declaration = Declaration(Table(WIDTH, {"t": 2, "y": 3, "x": 4}))
    (spec,) = declaration.specs.values()
    assert spec.shape == (24, WIDTH) and not spec.decay
    rows = np.random.default_rng(0).normal(size=spec.shape)
    call = jax.jit(lambda p, c: declaration.merge(p)(c))
    np.testing.assert_array_equal(call({"table": rows}, grid(t=2, y=3, x=4))[0], rows)
    # Tokens that stayed where others were dropped, by example; beyond the grid, the last cell of an axis.
    t, y, x = np.array([[0, 1], [1, 0]]), np.array([[2, 0], [1, 7]]), np.array([[3, 1], [0, 2]])
    cells = {"t": t / 2, "y": y / 3, "x": x / 4}
    expected = rows[t * 12 + np.minimum(y, 2) * 4 + x]
    np.testing.assert_array_equal(call({"table": rows}, cells), expected)


def test_a_table_begins_as_a_vits() -> None:
    start = Declaration(Table(64, {"y": 14, "x": 14})).initialise(0)["table"]
    assert np.std(start) == pytest.approx(0.02, rel=0.05)


def test_tokens_without_positions_stay_as_they_are() -> None:
    x = jnp.ones((1, 2, WIDTH))
    assert place(x, Placed(positions="none").make_positions(WIDTH, {"x": 2}), grid(x=2)) is x
    assert isinstance(Placed(positions="table").make_positions(WIDTH, {"x": 2}), Table)
    learned = Placed(positions_scale=1.0).make_positions(WIDTH, {"x": 2})
    start = Declaration(learned).initialise(0)
    np.testing.assert_array_equal(start["norm/scale"], np.ones(WIDTH))


@pytest.mark.parametrize("modality", [Colours, Image, Spectrogram, Text, Video, Waveform])
def test_every_modality_names_mistakes_of_its_positions(modality: Any) -> None:
    name = modality.__name__.lower()
    with pytest.raises(UserError, match=f"{name}: positions is 'learnt'. Did you mean 'learned'"):
        modality(positions="learnt")
    with pytest.raises(
        UserError, match=f"{modality.__name__}.positions_scale is 0; it must be above 0"
    ):
        modality(positions_scale=0)


MODALITIES: list[Any] = [
    (Text(vocabulary=5, max_positions=2, positions="none"), TextInput(length=3)),
    (Colours(levels=2, max_positions=1, positions="none"), ImageInput(size=2)),
    (Image(patch=2, max_positions=1, positions="none"), ImageInput(size=4)),
    (Video(tube=1, patch=2, max_time_positions=1, max_positions=1, positions="none"), VideoInput(frames=2, size=4)),
    (Waveform(patch=4, max_positions=1, positions="none"), WaveformInput(samples=8)),
    (Spectrogram(max_positions=1, positions="none"), SpectrogramInput(frames=32)),
]  # fmt: skip


@pytest.mark.parametrize("modality, view", MODALITIES, ids=lambda x: type(x).__name__)
def test_a_stem_without_positions_has_no_tables_and_no_limit(modality: Any, view: Any) -> None:
    """Equal content gives equal tokens, and more cells than buckets are no error."""
    declaration = Declaration(modality.stem(WIDTH))
    assert not [name for name in declaration.specs if "positions" in name]
    shapes = modality.arrays(view)
    arrays = {n: jnp.ones((2, *s.shape), s.dtype) for n, s in shapes.items()}
    p = declaration.initialise(0)
    x_BSD = declaration.merge(p)(arrays).x_BSD
    assert x_BSD.shape[1] > 1
    np.testing.assert_array_equal(x_BSD, jnp.broadcast_to(x_BSD[:1, :1], x_BSD.shape))
