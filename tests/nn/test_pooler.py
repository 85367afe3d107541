"""Pooling against loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.core.parameters import Declaration
from mmjax.nn.pooler import POOLS, MapPooler, Pooler
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


def test_map_against_loops() -> None:
    """One query, biases everywhere; `y + mlp(norm(y))` with a GELU in its tanh form."""
    with jax.enable_x64(True):
        declaration = Declaration(MapPooler(WIDTH, HEADS, 5, eps=1e-3))
        rng = np.random.default_rng(0)
        p = {n: rng.normal(size=s.shape) for n, s in declaration.specs.items()}
        x = rng.normal(size=(2, 5, WIDTH))
        stream = Stream(jnp.asarray(x), jnp.asarray(VALID), layout=(("image", 5),))
        out = jax.jit(lambda p, s: declaration.merge(p)(s))(p, stream)
    a = {n.removeprefix("attention/"): v for n, v in p.items() if n.startswith("attention/")}
    size = WIDTH // HEADS
    for b in range(2):
        kept, read = x[b][VALID[b]], p["attention/out_bias"].copy()
        for h in range(HEADS):
            at = slice(h * size, (h + 1) * size)
            asked = p["query"][0] @ a["query"][:, h] + a["query_bias"][at]
            keys = kept @ a["key"][:, h] + a["key_bias"][at]
            weight = np.exp(keys @ asked / np.sqrt(size))
            value = weight / weight.sum() @ (kept @ a["value"][:, h] + a["value_bias"][at])
            read += value @ a["out"][h]
        normed = (read - read.mean()) / np.sqrt(read.var() + 1e-3) * p["norm/scale"]
        hidden = (normed + p["norm/bias"]) @ p["mlp/up/kernel"] + p["mlp/up/bias"]
        hidden *= 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
        expected = read + hidden @ p["mlp/down/kernel"] + p["mlp/down/bias"]
        np.testing.assert_allclose(out[b], expected, rtol=1e-10)


def test_class_is_the_first_token_and_last_the_last_that_exists() -> None:
    x = np.arange(30, dtype=np.float32).reshape(2, 5, 3)
    valid = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    stream = Stream(jnp.asarray(x), jnp.asarray(valid))
    np.testing.assert_array_equal(POOLS["class"](stream), x[:, 0])
    np.testing.assert_array_equal(POOLS["last"](stream), [x[0, 2], x[1, 4]])
    np.testing.assert_array_equal(POOLS["last"](Stream(jnp.asarray(x))), x[:, 4])
