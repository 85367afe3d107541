"""SigLIP's loss against its equation in NumPy and published values, whole and by chunks, on one device and on many."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.core.errors import UserError
from mmjax.core.sharding import MeshConfig, batch_sharding, make_mesh
from mmjax.nn.towers import Widths
from mmjax.objectives.contrastive import Contrastive, sigmoid_loss

ROWS = 12


def with_gradient(chunk: int) -> Any:
    def loss(*given: Any) -> Any:
        value, *told = sigmoid_loss(*given, chunk=chunk)
        return value, told

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))


losses = {chunk: with_gradient(chunk) for chunk in (0, 1, 3, 4, 12, 64)}


def rows(count: int, seed: int = 0) -> tuple[Any, ...]:
    """Return `a`, `b`, scale, bias, concepts of several rows, and which rows are valid."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, count, 4))
    concept = rng.integers(0, max(count // 2, 1), count)
    return a, b, np.float64(2), np.float64(-1.5), concept, rng.random(count) < 0.8


def same(got: Any, expected: Any) -> None:
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12), got, expected
    )


def reference(
    a: Any, b: Any, scale: float, bias: float, concept: Any, valid: Any
) -> tuple[float, float]:
    """Return the loss, pair by pair, and the cost of the best constant, found by search."""
    there = np.flatnonzero(valid)
    total, signs = 0.0, []
    for i in there:
        for j in there:
            z = 1 if concept[i] == concept[j] else -1
            signs.append(z)
            total -= np.log(1 / (1 + np.exp(-z * (scale * a[i] @ b[j] + bias))))
    constants = np.linspace(-12, 12, 240_001)
    part = np.mean([z == 1 for z in signs]) if signs else 0.0
    costs = part * np.log1p(np.exp(-constants)) + (1 - part) * np.log1p(np.exp(constants))
    count = max(len(there), 1)
    return total / count, costs.min() * len(signs) / count


@pytest.mark.parametrize(("count", "expected"), [(256, 10.051284), (1024, 10.040585)])
def test_the_values_of_open_clip(count: int, expected: float) -> None:
    rng = np.random.RandomState(0)
    a, b = (rng.randn(count, 512).astype(np.float32) for _ in range(2))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    value, *_ = sigmoid_loss(a, b, 10.0, -10.0, np.arange(count), np.ones(count, bool))
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@given(
    chunk=st.sampled_from(sorted(losses)),
    concepts=st.lists(st.integers(0, 4), min_size=ROWS, max_size=ROWS),
    valid=st.lists(st.booleans(), min_size=ROWS, max_size=ROWS),
)
@settings(max_examples=60, deadline=None)
def test_value_gradient_and_baseline(chunk: int, concepts: list[int], valid: list[bool]) -> None:
    a, b, scale, bias, _, _ = rows(ROWS)
    given = (a, b, scale, bias, np.array(concepts), np.array(valid))
    with jax.enable_x64(True):
        (value, (_, baseline)), gradient = losses[chunk](*given)
        (_, told), whole = losses[0](*given)
    expected, best = reference(*given)
    np.testing.assert_allclose(value, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(baseline, best, rtol=1e-6, atol=1e-4)
    same(gradient, whole)


def test_gradients_are_the_slopes(x64: None) -> None:
    given = list(rows(ROWS))
    _, gradient = losses[0](*given)
    for at in range(4):
        moved = []
        for sign in (1, -1):
            other = [np.array(x, copy=True) for x in given]
            other[at].reshape(-1)[0] += sign * 1e-6
            moved.append(reference(*other)[0])
        slope = (moved[0] - moved[1]) / 2e-6
        np.testing.assert_allclose(np.ravel(gradient[at])[0], slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("chunk", [0, 64])
def test_on_eight_devices_as_on_one(x64: None, chunk: int) -> None:
    given, mesh = rows(256), make_mesh(MeshConfig(data=2, fsdp=4))
    placed = [
        x if np.ndim(x) == 0 else jax.device_put(x, batch_sharding(mesh, 256, "")) for x in given
    ]
    with jax.set_mesh(mesh):
        got = losses[chunk](*placed)
    same(got, losses[0](*given))


def test_memory_of_chunks_grows_with_the_batch_alone() -> None:
    def bytes_of(count: int, chunk: int) -> int:
        call = jax.jit(jax.grad(lambda *x: sigmoid_loss(*x, chunk=chunk).loss))
        memory = call.lower(*rows(count)).compile().memory_analysis()
        return int(memory.temp_size_in_bytes)

    assert bytes_of(1024, 32) < 3 * bytes_of(512, 32)
    assert bytes_of(1024, 0) > 3 * bytes_of(512, 0), "the control"


def test_the_head_has_a_bias() -> None:
    made = Contrastive(modalities=("image", "text"), loss="sigmoid", init_temperature=0.1)
    assert set(made.heads(Widths.same(4), {})) == {"image", "text", "scale", "bias"}
    with pytest.raises(UserError, match="loss is 'sigmod'. Did you mean 'sigmoid'"):
        Contrastive(modalities=("image", "text"), loss="sigmod")
