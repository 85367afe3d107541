"""Attentional pooling against loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.core.parameters import Declaration
from mmjax.nn.pooler import Pooler
from mmjax.nn.stream import Stream

WIDTH, HEADS = 6, 2
VALID = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0]], bool)


@pytest.mark.parametrize("queries", [1, 3])
def test_against_loops(queries: int) -> None:
    with jax.enable_x64(True):
        declaration = Declaration(Pooler(WIDTH, HEADS, queries))
        rng = np.random.default_rng(0)
        p = {n: rng.normal(size=s.shape) for n, s in declaration.specs.items()}
        x = rng.normal(size=(2, 5, WIDTH))
        stream = Stream(jnp.asarray(x), jnp.asarray(VALID), layout=(("image", 5),))
        out = jax.jit(lambda p, s: declaration.merge(p)(s))(p, stream)
    assert out.valid_BS is None and out.layout == (("image", queries),)
    for b in range(2):
        read = np.zeros((queries, WIDTH))
        for q, h in np.ndindex(queries, HEADS):
            asked = p["queries"][q] @ p["attention/query"][:, h]
            kept = x[b][VALID[b]]
            weight = np.exp(kept @ p["attention/key"][:, h] @ asked / np.sqrt(WIDTH / HEADS))
            value = weight / weight.sum() @ kept @ p["attention/value"][:, h]
            read[q] += value @ p["attention/out"][h]
        centred = read - read.mean(axis=1, keepdims=True)
        normed = centred / np.sqrt(read.var(axis=1, keepdims=True) + 1e-6)
        expected = normed * p["norm/scale"] + p["norm/bias"]
        np.testing.assert_allclose(out.x_BSD[b], expected, rtol=1e-10)


def test_queries_begin_apart_and_do_not_decay() -> None:
    declaration = Declaration(Pooler(64, 4, 16))
    start = np.asarray(declaration.initialise(0)["queries"])
    assert np.std(start) == pytest.approx(1, rel=0.1)
    assert np.abs(np.corrcoef(start) - np.eye(16)).max() < 0.6
    assert not declaration.specs["queries"].decay


def test_biases_and_norms_against_numpy() -> None:
    """open_clip's pooler is `attention(norm(queries), norm(x))`, its projections with biases."""
    eps = 0.01
    with jax.enable_x64(True):
        declaration = Declaration(Pooler(WIDTH, HEADS, 2, bias=True, norms=True, eps=eps))
        rng = np.random.default_rng(0)
        p = {n: rng.normal(size=s.shape) for n, s in declaration.specs.items()}
        x = rng.normal(size=(2, 5, WIDTH))
        stream = Stream(jnp.asarray(x), jnp.asarray(VALID), layout=(("image", 5),))
        out = jax.jit(lambda p, s: declaration.merge(p)(s).x_BSD)(p, stream)

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        spread = np.sqrt(x.var(axis=1, keepdims=True) + eps)
        return (x - x.mean(axis=1, keepdims=True)) / spread * p[f"{name}/scale"] + p[f"{name}/bias"]

    def project(name: str, x: np.ndarray, head: int) -> np.ndarray:
        bias = p[f"attention/{name}_bias"].reshape(HEADS, -1)[head]
        return x @ p[f"attention/{name}"][:, head] + bias

    queries = norm("query_norm", p["queries"])
    for b in range(2):
        seen, read = norm("stream_norm", x[b][VALID[b]]), p["attention/out_bias"]
        for h in range(HEADS):
            q, k, v = (
                project("query", queries, h),
                project("key", seen, h),
                project("value", seen, h),
            )
            weight = np.exp(q @ k.T / np.sqrt(WIDTH / HEADS))
            read = read + weight / weight.sum(axis=1, keepdims=True) @ v @ p["attention/out"][h]
        np.testing.assert_allclose(out[b], norm("norm", read), rtol=1e-10)
