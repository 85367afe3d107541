"""Attentional pooling against loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.layers.pooler import Pooler
from mmjax.layers.stream import Stream
from mmjax.parameters import Declaration

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
