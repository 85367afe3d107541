"""Learned queries: their numbers, which of them depend on what, and rows without tokens."""

from __future__ import annotations

from typing import Any

import connecting
import jax
import numpy as np
import pytest

from mmjax.connectors.queries import Queries
from mmjax.core.parameters import Declaration

pytestmark = pytest.mark.usefixtures("x64")

WIDTH_IN, WIDTH, WIDTH_OUT, COUNT, LENGTH = 6, 4, 5, 3, 5
THERE = np.array([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0]], bool)


def config(**keys: Any) -> Queries:
    return Queries(num_heads=2, mlp_dim=3, count=COUNT, depth=2, width=WIDTH, **keys)


def layer(p: Any, x: np.ndarray, sees: np.ndarray, source: Any = None, there: Any = None) -> Any:
    normed = connecting.layer_norm(p, "attention_norm", x)
    x = x + connecting.attention(p, "attention", normed, normed, sees)
    if source is not None:
        asked = connecting.layer_norm(p, "cross_norm", x)
        read = connecting.layer_norm(p, "context_norm", source)
        x = x + connecting.attention(p, "cross", asked, read, np.tile(there, (COUNT, 1)))
    return x + connecting.mlp(p, "mlp", connecting.layer_norm(p, "mlp_norm", x))


@pytest.mark.parametrize(("causal", "cross_every"), [(True, 1), (False, 2)])
def test_against_numpy(causal: bool, cross_every: int) -> None:
    """The second row has no token: the cross-attention adds nothing there, and no output exists."""
    call, p = connecting.built(config(causal=causal, cross_every=cross_every), WIDTH_IN, WIDTH_OUT)
    given = connecting.stream(("image", (LENGTH,)), width=WIDTH_IN, valid=THERE)
    out = call(p, given)
    assert out.layout == (("image", COUNT),)
    np.testing.assert_array_equal(out.valid_BS, [[True] * COUNT, [False] * COUNT])
    sees = np.tril(np.ones((COUNT, COUNT), bool)) if causal else np.ones((COUNT, COUNT), bool)
    for b in range(2):
        x, source = p["queries"], connecting.affine(p, "into", np.asarray(given.x_BSD[b]))
        for index in range(2 // cross_every):
            for place in range(cross_every):
                of_layer = connecting.under(p, f"trunk/groups/0/blocks/{place}/", index)
                read = (source, THERE[b]) if place == 0 else ()
                x = layer(of_layer, x, sees, *read)
        expected = connecting.affine(p, "out", connecting.layer_norm(p, "trunk/norm", x))
        np.testing.assert_allclose(out.x_BSD[b], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("causal", [True, False])
def test_an_output_depends_on_all_tokens_that_exist_and_on_no_query_after_it(causal: bool) -> None:
    call, p = connecting.built(config(causal=causal), WIDTH_IN, WIDTH_OUT)
    given = connecting.stream(("image", (LENGTH,)), width=WIDTH_IN, valid=THERE)

    def outputs(queries: Any, x: Any) -> Any:
        return call({**p, "queries": queries}, given.replace(x_BSD=x)).x_BSD.sum(-1)

    by_queries, by_x = jax.jit(jax.jacrev(outputs, argnums=(0, 1)))(p["queries"], given.x_BSD)
    reached = np.abs(by_queries).max(-1) > 0  # [B, outputs, queries]
    order = np.tril(np.ones((COUNT, COUNT), bool)) if causal else np.ones((COUNT, COUNT), bool)
    np.testing.assert_array_equal(reached, np.stack([order] * 2))
    read = np.abs(by_x).max(-1) > 0  # [B, outputs, B, tokens]
    np.testing.assert_array_equal(read[0, :, 0], np.tile(THERE[0], (COUNT, 1)))
    assert not read[1].any() and not read[0, :, 1].any() and np.isfinite(by_queries).all()


def test_queries_begin_small_and_do_not_decay() -> None:
    wide = Queries(num_heads=2, mlp_dim=3, count=64, depth=1)
    declaration = Declaration(wide.build(32, 32))
    spec = declaration.specs["queries"]
    start = np.asarray(spec.init(jax.random.key(0), spec.shape))
    assert start.shape == (64, 32) and np.std(start) == pytest.approx(0.02, rel=0.1)
    assert not spec.decay
    assert not any(name.startswith("into") for name in declaration.specs)  # of one width already
