"""The contrastive loss some rows at a time: the same to rounding, in memory that grows with the batch alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.core.batch import Batch
from mmjax.core.errors import UserError
from mmjax.core.sharding import MeshConfig, batch_sharding, make_mesh
from mmjax.objectives.contrastive import Contrastive, chunked_info_nce, info_nce

ROWS = 12


def with_gradient(loss: Any) -> Any:
    """Return `(a, b, scale, concept, valid) -> ((value, recall), gradients of the first three)`."""

    def parted(*arguments: Any) -> Any:
        comparison = loss(*arguments)
        return comparison.loss, comparison.recall

    return jax.jit(jax.value_and_grad(parted, (0, 1, 2), has_aux=True))


whole = with_gradient(info_nce)
chunked = {n: with_gradient(partial(chunked_info_nce, chunk=n)) for n in (1, 3, 4, 6, 12, 64)}


def rows(count: int, seed: int = 0, size: int = 4) -> tuple[Any, ...]:
    """Return `a`, `b`, a scale, concepts of several rows, and which rows are valid."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, count, size))
    concept = rng.integers(0, max(count // 2, 1), count)
    return a, b, np.float64(5), concept, rng.random(count) < 0.8


def same(got: Any, expected: Any, close: float = 1e-10) -> None:
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=close, atol=1e-13), got, expected
    )


@given(
    chunk=st.sampled_from([1, 3, 4, 6, 12]),
    concepts=st.lists(st.integers(0, 4), min_size=ROWS, max_size=ROWS),
    valid=st.lists(st.booleans(), min_size=ROWS, max_size=ROWS),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_value_recall_and_gradients(
    chunk: int, concepts: list[int], valid: list[bool], seed: int
) -> None:
    a, b, scale, _, _ = rows(ROWS, seed)
    given = (a, b, scale, np.array(concepts), np.array(valid))
    with jax.enable_x64(True):
        expected, got = whole(*given), chunked[chunk](*given)
        assert got[0][0].dtype == jnp.float64
        same(got, expected)
        assert got[0][1] == expected[0][1]


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 4}], ids=str)
def test_on_eight_devices_as_on_one(x64: None, sizes: dict[str, int]) -> None:
    given, mesh = rows(256), make_mesh(MeshConfig(**sizes))
    placed = [
        x if np.ndim(x) == 0 else jax.device_put(x, batch_sharding(mesh, 256, "")) for x in given
    ]
    with jax.set_mesh(mesh):
        same(chunked[64](*placed), whole(*given))
        text = chunked[64].lower(*placed).compile().as_text()
    # A device compares its 8 rows of a chunk with all candidates; nobody holds a whole chunk's logits.
    assert "f64[8,256]" in text and "f64[64,256]" not in text


def temporaries(function: Any, count: int) -> int:
    """Return bytes that loss and gradient of `count` rows need beside arguments and results."""
    shapes = [jax.ShapeDtypeStruct(s, np.float32) for s in [(count, 64), (count, 64), ()]]
    shapes += [jax.ShapeDtypeStruct((count,), t) for t in (np.int32, np.bool_)]
    size: int = function.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    return size


def test_memory_grows_with_the_batch_and_not_with_its_square() -> None:
    plain = [temporaries(whole, n) for n in (512, 1024, 2048)]
    parts = [temporaries(chunked[64], n) for n in (512, 1024, 2048)]
    print(f"temporary bytes at 512, 1024 and 2048 rows: {plain}, in chunks of 64: {parts}")
    assert plain[1] > 3.5 * plain[0] and plain[2] > 3.5 * plain[1], "the control"
    assert parts[1] < 2.1 * parts[0] and parts[2] < 2.1 * parts[1]
    assert plain[2] > 10 * parts[2]


def test_a_chunk_must_divide_the_batch(x64: None) -> None:
    with pytest.raises(UserError, match="chunk 5 does not divide the batch of 12. Choose one"):
        chunked_info_nce(*rows(ROWS), chunk=5)
    with pytest.raises(UserError, match="chunk is -1"):
        Contrastive(modalities=("a", "b"), chunk=-1)


class _Scaled:
    """Stands for a model of which only the scale is asked."""

    def __init__(self, scale: Any):
        self.heads = {"": self}
        self.scale = lambda: scale


@pytest.mark.parametrize(("chunk", "loops"), [(0, False), (4, True), (12, False), (100, False)])
def test_the_objective_takes_the_rows_in_chunks_where_it_is_told_to(
    x64: None, chunk: int, loops: bool
) -> None:
    a, b, scale, concept, valid = rows(ROWS)
    batch = Batch({}, {"c": jnp.asarray(concept)}, jnp.asarray(valid))
    objective = Contrastive(modalities=("a", "b"), positive_key="c", chunk=chunk)

    def compare(a: Any, b: Any) -> Any:
        model: Any = _Scaled(jnp.asarray(scale))
        loss = objective.compare(model, (a, b), batch)
        return loss.value, loss.metrics["batch_recall"]

    same(compare(a, b), whole(a, b, scale, concept, valid)[0])
    assert ("scan" in str(jax.make_jaxpr(compare)(a, b))) == loops
